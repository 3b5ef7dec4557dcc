"""Chinese text -> token ids, as the released Chinese CLIP models were trained and evaluated.

    from tokenizer import Tokenizer
    ids = Tokenizer()(["一只猫", "明月松间照"], context_length=52)            # (2, 52) int64

Text is lower-cased and “ and ” become ". BERT's WordPiece then cuts it into the 21,128 entries of
bert-base-chinese (vocab.txt; vocab.NOTICE names its origin): each Chinese character is one token,
other words are split into the longest known pieces. A row is [CLS], the first context_length - 2
tokens, [SEP], and 0 = [PAD] up to its end.
"""
import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

VOCAB = Path(__file__).with_name("vocab.txt")
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103

# Where the library differs from BERT. Each of these characters is a word of its own in BERT.
EXTENSION_E = Regex("[\U0002B820-\U0002B91F]")
# One of these (icons of web fonts) makes its word [UNK]; so does ꀀ, which takes its place.
PRIVATE_USE = Regex("[\uE000-\uF8FF\U000F0000-\U0010FFFF]")


class Tokenizer:
    """Captions -> token ids. Call it with a list of captions."""

    def __init__(self, name=""):
        """`name` stands before the warning about cut captions."""
        tokens = VOCAB.read_text(encoding="utf-8").split("\n")[:-1]
        vocab = {token: i for i, token in enumerate(tokens)}
        # No special tokens: [SEP] typed in a caption is plain text and cannot steer the model.
        wordpiece = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200)
        self.bert = tokenizers.Tokenizer(wordpiece)
        self.bert.normalizer = normalizers.Sequence([
            normalizers.Replace(Regex("[“”]"), '"'), normalizers.Replace(PRIVATE_USE, "ꀀ"),
            normalizers.BertNormalizer(lowercase=True)])
        self.bert.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(EXTENSION_E, "isolated"), pre_tokenizers.BertPreTokenizer()])
        self.bert.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
        self.prefix, self.warned = f"{name}: " if name else "", False

    def __call__(self, texts, context_length=52):
        """A list of T strings (or one string) -> (T, context_length) int64.

        Warns once, with their number, when captions are cut. ValueError: context_length below 3.
        """
        if context_length < 3:
            raise ValueError(f"context_length {context_length}: [CLS], one token and [SEP] need 3")
        texts = [texts] if isinstance(texts, str) else list(texts)
        self.bert.enable_truncation(context_length)
        self.bert.enable_padding(length=context_length)
        ids, cut = torch.zeros(len(texts), context_length, dtype=torch.int64), 0
        for start in range(0, len(texts), 1000):            # a row of the library takes 5 KB
            part = [text.lower() for text in texts[start : start + 1000]]
            rows = self.bert.encode_batch_fast(part)
            ids[start : start + 1000] = torch.tensor([row.ids for row in rows])
            cut += sum(bool(row.overflowing) for row in rows)
        if cut and not self.warned:
            self.warned = True
            warnings.warn(f"{self.prefix}{cut} of {len(texts)} captions are longer than "
                          f"{context_length - 2} tokens and were cut", stacklevel=2)
        return ids
