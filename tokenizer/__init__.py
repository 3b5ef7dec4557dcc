"""Chinese text -> token ids, as the released Chinese CLIP models were trained and evaluated.

    from tokenizer import Tokenizer
    ids = Tokenizer()(["一只猫", "明月松间照"], context_length=52)            # (2, 52) int64

Text is lower-cased and “ and ” become ", then BERT's WordPiece cuts it over the 21,128 entries of bert-base-chinese
(vocab.txt; its origin stands in vocab.NOTICE): each Chinese character is a token of its own, other words split into the
longest known pieces. A row is [CLS], the first context_length - 2 tokens, [SEP], and 0 = [PAD] up to its end.
"""
import itertools
import re
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers

VOCAB = Path(__file__).with_name("vocab.txt")
PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103

# Where the library's normalizer is not BERT's: it takes this part of CJK Extension E for letters of a longer word, and drops
# private-use characters (icons of web fonts), which make their word [UNK] in BERT. The first are spaced out here, the others
# become a letter that no entry of the vocabulary has.
ODD = re.compile("([\U0002B820-\U0002B91F])|[\uE000-\uF8FF\U000F0000-\U0010FFFF]")
UNKNOWN_LETTER = "ꀀ"                                                             # of the Yi script


class Tokenizer:
    """Chinese captions -> their token ids: call it with a list of them."""

    def __init__(self, name=""):
        """`name` says in the warning whose captions were cut."""
        vocab = {token: i for i, token in enumerate(VOCAB.read_text(encoding="utf-8").split("\n")[:-1])}
        # [CLS], [SEP], … are not registered as special tokens: typed in a caption they are ordinary characters, and cannot steer the model.
        self.wordpiece = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
        # The normalizer cleans control characters, spaces out Chinese, strips accents.
        self.wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        # A Chinese character or a punctuation mark is a token of its own wherever it stands: looked up here, which is twenty times
        # as fast. (Not those that NFD writes in another way: the normalizer changes them first.)
        self.id_of_single = {c: i for c, i in vocab.items() if len(c) == 1 and is_single(c) and unicodedata.normalize("NFD", c) == c}
        self.prefix = f"{name}: " if name else ""
        self.warned = False

    def __call__(self, texts, context_length: int = 52):
        """A list of T strings (or one string) -> (T, context_length) int64. Warns once, with the count, when captions are cut.

        Raises ValueError for a context_length below 3: [CLS], one token and [SEP] need that.
        """
        if context_length < 3:
            raise ValueError(f"context_length {context_length}: [CLS], one token and [SEP] need 3")
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = [ODD.sub(lambda c: f" {c[1]} " if c[1] else UNKNOWN_LETTER, t.lower().replace("“", '"').replace("”", '"')) for t in texts]
        room = context_length - 2

        # the common case: every character of the caption is a token of its own
        tokens, others = [], []                                                 # ids of each caption; numbers of those for the library
        for text in texts:
            try:
                tokens.append([self.id_of_single[c] for c in text])
            except KeyError:                                                    # it has something else: letters, digits, spaces, …
                others.append(len(tokens))
                tokens.append(None)
        for i, encoding in zip(others, self.wordpiece.encode_batch_fast([texts[i] for i in others])):
            tokens[i] = encoding.ids

        # one row each, without a loop over the captions: NumPy fills the places before each row's end in reading order
        cut = sum(len(row) > room for row in tokens)
        rows = [[CLS, *row[:room], SEP] for row in tokens]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))              # (T,)
        ids = np.full((len(rows), context_length), PAD, np.int64)
        ids[np.arange(context_length) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, lengths.sum())
        if cut and not self.warned:
            self.warned = True
            warnings.warn(f"{self.prefix}{cut} of {len(texts)} captions are longer than {room} tokens and were cut", stacklevel=2)
        return torch.from_numpy(ids)


# Where Unicode has its Chinese characters: the eight blocks that BERT names.
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
           (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


def is_single(c):
    """Whether BERT sets this character apart from its neighbours: Chinese ones and punctuation, to which it counts ASCII's symbols."""
    point = ord(c)
    chinese = any(first <= point <= last for first, last in CHINESE)
    ascii_symbol = point < 128 and c.isprintable() and not c.isalnum() and c != " "
    return chinese or unicodedata.category(c).startswith("P") or ascii_symbol
