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


def test_characters_that_are_looked_up_are_the_tokens_that_the_library_finds_alone_and_among_others():
    tokenizer = Tokenizer()
    by_library = lambda texts: [encoding.ids for encoding in tokenizer.wordpiece.encode_batch_fast(texts)]
    characters, ids = tokenizer.id_of_single.keys(), tokenizer.id_of_single.values()
    assert len(characters) > 7000 and {"猫", "，", "《", "·", "!", "$"} <= characters and not {"a", "1", " ", "é", "…", "の"} & characters
    assert by_library(list(characters)) == [[i] for i in ids]
    cat, letter = by_library(["猫", "x"])
    assert by_library([f"猫{c}猫x{c}x" for c in characters]) == [[*cat, i, *cat, *letter, i, *letter] for i in ids]
