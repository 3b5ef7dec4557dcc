"""The painted data sets: what their images show is what their captions say, and it is the same everywhere and for ever."""
import hashlib
import random
from itertools import combinations

import numpy as np
import pytest

import data
from data import PAINTED, open_split
from support import painter
from support.tables import TABLE_1
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def poems():
    return {name: open_split("poems", name) for name in PAINTED["poems"].sizes}


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [painter.random_landscape(rng) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------- coloured things


def test_the_demo_says_what_it_said():
    """Results of earlier versions stay comparable. (How polygons are filled is up to Pillow, so of the images there is no such test.)"""
    rng, digest = random.Random(0), hashlib.sha256()
    for scene in [painter.random_scene(rng) for _ in range(200)]:
        digest.update((painter.describe(scene) + painter.describe(scene, rng) + painter.split_of_scene(scene)).encode())
    assert digest.hexdigest()[:16] == "8c637b7149fb1c40"


def test_painted_images_are_reproducible_and_captions_say_every_statement():
    train = open_split("demo", "train")
    a, b = train.sample(3, 5), train.sample(3, 5)
    assert np.array_equal(np.array(a[0]), np.array(b[0])) and np.array_equal(a[1], b[1])
    scene = frozenset({("左上角", 2, "红色", "鱼"), ("右下角", 1, "蓝色", "房子")})
    for text in (painter.describe(scene), painter.describe(scene, random.Random(0))):
        assert "两条红色的鱼" in text and "左上角" in text and "一座蓝色的房子" in text and "右下角" in text


def test_painted_place_and_colour_are_where_the_caption_says():
    image = np.array(painter.paint(frozenset({("左上角", 1, "红色", "方块")}), random.Random(0))).astype(int)
    red = image[..., 0] - image[..., 1:].max(axis=2) > 80
    rows, columns = np.nonzero(red)
    assert len(rows) > 300 and rows.max() < 80 and columns.max() < 80


# ---------------------------------------------------------------------------------------------------------------- landscapes


@pytest.mark.parametrize("element", painter.ELEMENTS)
def test_every_element_is_seen_at_64_pixels(element, monkeypatch):
    """Under the same light, many pixels differ between a image with it and one without it."""
    monkeypatch.setattr(painter, "LIGHTS", [("", *next(light for names, *light in painter.LIGHTS if not names or element in names.split()))])
    scene = painter.with_water({element})
    a, b = (np.array(painter.paint_landscape(s, random.Random(1), 64)).astype(int) for s in (scene, scene - {element}))
    assert (np.abs(a - b).max(axis=2) > 40).sum() > 60


def test_the_same_seed_paints_the_same_landscape_and_another_one_another():
    for scene in scenes(20):
        a, b, c = (painter.paint_landscape(scene, random.Random(seed)) for seed in (1, 1, 2))
        assert a.size == (128, 128) and a.tobytes() == b.tobytes() != c.tobytes()


def test_random_landscapes_can_be_painted_and_their_captions_name_every_element():
    rng, seen = random.Random(3), set()
    for scene in scenes(1000):
        seen |= scene
        assert 2 <= len(scene) <= 5 and painter.goes_together(scene) and scene == painter.with_water(scene)
        for text in (painter.describe_landscape(scene), painter.describe_landscape(scene, rng)):
            assert len(text) <= 50                                              # tokens that a text tower takes
            assert all(any(name in text for name in painter.ELEMENTS[element].names) for element in scene) and text.count("，") == len(scene) - 1
    assert seen == set(painter.ELEMENTS)


def test_names_of_elements_are_never_the_same():
    names = [name for element in painter.ELEMENTS.values() for name in element.names]
    assert not [(a, b) for a, b in combinations(names, 2) if a in b or b in a]


def test_landscape_rules_name_elements():
    assert painter.ON_WATER | frozenset().union(*painter.RIVALS) | set(painter.STAMPS) | {e for names, *_ in painter.LIGHTS for e in names.split()} <= set(painter.ELEMENTS)
    assert all((element.draw is None) == (name in painter.STAMPS) for name, element in painter.ELEMENTS.items())


# ---------------------------------------------------------------------------------------------------------------- verses


def test_verses_have_five_or_seven_characters_and_elements_that_go_together():
    for verse, (poet, scene) in painter.VERSES.items():
        assert len(verse) in (5, 7) and poet and scene <= set(painter.ELEMENTS) and painter.goes_together(scene)
    assert len(painter.VERSES) == sum(map(len, painter.POETS.values()))         # none stands twice
    assert len({scene for _, scene in painter.VERSES.values()}) == len(painter.VERSES)


def test_every_character_is_in_the_vocabulary():
    words = [*painter.VERSES, *(word for element in painter.ELEMENTS.values() for word in element.places + element.names), "有在是，"]
    tokens = Tokenizer()(words)
    assert [word for word, row in zip(words, tokens.tolist()) if 100 in row] == [] and 100 in Tokenizer()(["𠮷"])[0].tolist()


# ---------------------------------------------------------------------------------------------------------------- splits


def test_each_painted_caption_is_true_of_one_image(poems):
    for name in PAINTED:
        for split_name in ("valid", "test"):
            split = poems[split_name] if name == "poems" else open_split(name, split_name)
            assert len(set(split.texts)) == len(split.texts) == len(split) == PAINTED[name].sizes[split_name]
            assert not any(a <= b or b <= a for a, b in combinations(split.scenes, 2))
            assert split.image(0).size == (128, 128)


def test_painted_training_scenes_never_show_a_test_scene_and_are_new_in_every_epoch(monkeypatch):
    train, painted = open_split("demo", "train"), []
    monkeypatch.setattr(train, "paint", lambda scene, rng: painted.append(scene))
    for epoch in (0, 1):
        for k in range(400):
            train.sample(epoch, k)
    assert {painter.split_of_scene(scene) for scene in painted} == {"train"} and painted[:400] != painted[400:]


def test_landscapes_of_one_split_are_in_no_other_not_even_with_english_captions():
    shown = {split: set().union(*(open_split(name, split).scenes for name in ("landscapes", "english-landscapes"))) for split in ("train", "valid", "test")}
    assert not any(shown[a] & shown[b] for a, b in combinations(shown, 2))
    english = open_split("english-landscapes", "test")
    for scene, text in zip(english.scenes, english.texts):
        assert sorted(text.replace(" and ", ", ").split(", ")) == sorted(painter.ELEMENTS[element].english for element in scene)
    assert len({element.english for element in painter.ELEMENTS.values()}) == len(painter.ELEMENTS)


def test_poems_have_the_sizes_of_the_papers_set(poems):
    assert {name: len(split) for name, split in poems.items()} == TABLE_1["ap-id"]
    assert not any(split.endless for split in poems.values()) and len(set(poems["train"].scenes)) == 2000


def test_two_verses_belong_to_one_split_in_either_order(poems):
    pairs = {name: {frozenset(text.split("，")) for text in split.texts} for name, split in poems.items()}
    assert all(len(pairs[name]) == len(split) for name, split in poems.items())
    assert not any(pairs[a] & pairs[b] for a, b in combinations(pairs, 2))
    assert all(painter.split_of_poem(pair[::-1]) == painter.split_of_poem(pair) == name for name in pairs for pair in list(map(tuple, pairs[name]))[:100])


def test_every_verse_of_valid_and_test_is_trained_on_in_other_pairs(poems):
    verses = {name: {verse for text in split.texts for verse in text.split("，")} for name, split in poems.items()}
    assert verses["valid"] | verses["test"] <= verses["train"] == set(painter.VERSES)


def test_a_poem_shows_what_its_two_lines_speak_of(poems):
    for text, scene in zip(poems["test"].texts, poems["test"].scenes):
        (a, of_a), (b, of_b) = (painter.VERSES[verse] for verse in text.split("，"))
        assert scene == of_a | of_b and a != b and 3 <= len(scene) <= 6 and painter.goes_together(scene)


def test_command_line_of_painted_sets(called, tmp_path, monkeypatch):
    for name in ("demo", "poems"):
        endless = PAINTED[name].endless
        monkeypatch.setitem(PAINTED, name, PAINTED[name]._replace(sizes=dict.fromkeys(PAINTED[name].sizes, 24)))
        assert called(data, name).count("24 pairs") == 3
        assert called(data, name, "--draw", tmp_path / "sheet.png").count("image") == 24
        called(data, name, "--write-shards", tmp_path / name)
        assert data.split_names(tmp_path / name) == (["valid", "test"] if endless else ["train", "valid", "test"])
        shown, written = open_split(name, "test"), open_split(tmp_path / name, "test")
        assert {shown.image(i).tobytes() for i in range(24)} == {written.image(i).tobytes() for i in range(24)}
