"""Captions become the ids that the released models were trained with (against the published tokenizer: test_parity.py)."""
import hashlib
import warnings

import pytest
import torch

from tokenizer import CLS, MASK, SEP, UNK, VOCAB, Tokenizer


def test_vocabulary_is_the_published_one():
    assert hashlib.md5(VOCAB.read_bytes()).hexdigest() == "3b5b76c4aef48ecf8cb3abaafe960f09"
    vocab = VOCAB.read_text(encoding="utf-8").split("\n")
    assert len(vocab) - 1 == 21128 and [vocab[i] for i in (0, UNK, CLS, SEP, MASK)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_layout_of_the_ids():
    ids = Tokenizer()(["一只猫", "明月松间照"], context_length=8)
    assert ids.dtype == torch.int64 and ids.tolist() == [[101, 671, 1372, 4344, 102, 0, 0, 0], [101, 3209, 3299, 3351, 7313, 4212, 102, 0]]
    assert Tokenizer()("一只猫").shape == (1, 52) and Tokenizer()([]).shape == (0, 52)


def test_no_room_for_a_token_is_refused():
    assert Tokenizer()("猫", 3).tolist() == [[CLS, 4344, SEP]]
    with pytest.raises(ValueError, match="context_length 2: .* need 3"):
        Tokenizer()("猫", 2)


def test_case_and_quotes():
    tokenizer = Tokenizer()
    assert tokenizer("“Cat”").equal(tokenizer('"cat"'))


def test_special_tokens_typed_in_a_caption_are_plain_text():
    assert not {0, UNK, MASK} & set(Tokenizer()("[MASK]猫[SEP][PAD]", 20)[0, 1:12].tolist())
    assert Tokenizer()("[SEP]", 20)[0].tolist().count(SEP) == 1


def test_cut_captions_are_counted_once():
    tokenizer = Tokenizer()
    with pytest.warns(UserWarning, match="2 of 3 captions are longer than 50 tokens"):
        ids = tokenizer(["猫" * 50, "猫" * 51, "猫" * 90])
    assert (ids[:, 51] == SEP).all() and (ids[:, 1:51] == 4344).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["猫" * 51])


def test_where_the_library_is_not_bert():
    """CJK Extension E stands alone, a private-use character makes its word [UNK], and Python's lower case counts."""
    ids = lambda text: [i for i in Tokenizer()(text)[0].tolist() if i not in (0, CLS, SEP)]
    assert ids("x\U0002B820y") == [*ids("x"), UNK, *ids("y")] and ids("x\ue000 猫") == [UNK, 4344]
    assert ids("İ") == ids("i̇") and ids("É") == ids("e")


def test_many_captions_are_the_rows_of_each():
    """The library gets 1,000 at a time."""
    texts = [f"第{i}张" for i in range(2001)]
    tokenizer = Tokenizer()
    ids = tokenizer(texts, 9)
    for i in (0, 999, 1000, 1999, 2000):
        assert ids[i].equal(tokenizer(texts[i], 9)[0])
