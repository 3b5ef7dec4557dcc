"""Chinese text -> token ids, as the released Chinese CLIP models were trained and evaluated.

    from tokenizer import Tokenizer
    ids = Tokenizer()(["一只猫", "明月松间照"], context_length=52)            # (2, 52) int64

lower case, “ and ” become ", then BERT's WordPiece over the 21,128 entries of bert-base-chinese (vocab.txt; its origin stands in vocab.NOTICE):
[CLS] first context_length - 2 tokens [SEP], padded with 0. Each Chinese character is a token of its own; other words split into the longest known pieces.
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
        # A Chinese character or a punctuation mark is a token of its own wherever it stands: looked up here, which is twenty times as fast. (Not those that Unicode takes for another one.)
        self.alone = {c: i for c, i in vocab.items() if len(c) == 1 and is_alone(c) and unicodedata.normalize("NFD", c) == c}
        self.prefix = f"{name}: " if name else ""
        self.warned = False

    def __call__(self, texts, context_length: int = 52):
        """A list of strings (or one string) -> (len(texts), context_length) int64. Warns once, with the count, when captions are cut."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        texts = [ODD.sub(lambda c: f" {c[1]} " if c[1] else UNKNOWN_LETTER, t.lower().replace("“", '"').replace("”", '"')) for t in texts]
        room, tokens, others = context_length - 2, [], []
        for text in texts:
            try:
                tokens.append([self.alone[c] for c in text])
            except KeyError:                                                    # it has something else: letters, digits, spaces, …
                others.append(len(tokens))
                tokens.append(None)
        for i, encoding in zip(others, self.wordpiece.encode_batch_fast([texts[i] for i in others])):
            tokens[i] = encoding.ids
        cut = sum(len(row) > room for row in tokens)
        rows = [[CLS, *row[:room], SEP] for row in tokens]
        ids = np.zeros((len(rows), context_length), np.int64)                   # 0 = [PAD]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids[np.arange(context_length) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int64, lengths.sum())
        if cut and not self.warned:
            self.warned = True
            warnings.warn(f"{self.prefix}{cut} of {len(texts)} captions are longer than {room} tokens and were cut", stacklevel=2)
        return torch.from_numpy(ids)


def is_alone(c):
    """Whether BERT sets this character apart from its neighbours: Chinese characters (eight blocks of Unicode) and punctuation, to which BERT counts the symbols of ASCII."""
    point = ord(c)
    chinese = any(first <= point <= last for first, last in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))
    return chinese or unicodedata.category(c).startswith("P") or point < 128 and c.isprintable() and not c.isalnum() and c != " "
