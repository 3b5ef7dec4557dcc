"""Chinese text -> token ids, as the released Chinese CLIP models were trained and evaluated.

    from tokenizer import Tokenizer
    ids = Tokenizer()(["一只猫", "明月松间照"], context_length=52)            # (2, 52) int64

lower case, “ and ” become ", then BERT's WordPiece over the 21,128 entries of bert-base-chinese (vocab.txt; its origin stands in vocab.NOTICE):
[CLS] first context_length - 2 tokens [SEP], padded with 0. Each Chinese character is a token of its own; other words split into the longest known pieces.
"""
import re
import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers

VOCAB = Path(__file__).with_name("vocab.txt")
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103

# Where the library's normalizer is not BERT's: it takes this part of CJK Extension E for letters of a longer word, and drops private-use characters (icons of web fonts), which
# make their word [UNK] in BERT. The first are spaced out here, the others become a letter that no entry of the vocabulary has.
ODD = re.compile("([\U0002B820-\U0002B91F])|[\uE000-\uF8FF\U000F0000-\U0010FFFF]")
UNKNOWN_LETTER = "ꀀ"                                                             # of the Yi script


class Tokenizer:
    def __init__(self, name=""):
        """`name` says in the warning whose captions were cut."""
        vocab = {token: i for i, token in enumerate(VOCAB.read_text(encoding="utf-8").split("\n")[:-1])}
        # [CLS], [SEP], … are not registered as special tokens: typed in a caption they are ordinary characters, and cannot steer the model.
        self.wordpiece = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
        self.wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)      # clean control characters, space out Chinese, strip accents
        self.wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.prefix = f"{name}: " if name else ""
        self.warned = False

    def __call__(self, texts, context_length: int = 52):
        """A list of strings (or one string) -> (len(texts), context_length) int64. Warns once, with the count, when captions are cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = [ODD.sub(lambda c: f" {c[1]} " if c[1] else UNKNOWN_LETTER, t.lower().replace("“", '"').replace("”", '"')) for t in texts]
        room, cut, rows = context_length - 2, 0, []
        for encoding in self.wordpiece.encode_batch_fast(texts):
            tokens = encoding.ids
            cut += len(tokens) > room
            rows.append([CLS, *tokens[:room], SEP] + [PAD] * (room - len(tokens)))
        if cut and not self.warned:
            self.warned = True
            warnings.warn(f"{self.prefix}{cut} of {len(texts)} captions are longer than {room} tokens and were cut", stacklevel=2)
        return torch.tensor(rows, dtype=torch.int64).view(len(texts), context_length)
