"""The painted data sets: their images show what their captions say, everywhere and for ever."""
import csv
import hashlib
import multiprocessing
import random
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

import data
from support import painter
from support.system import BadInput
from support.tables import TABLE_1
from tokenizer import Tokenizer
from tools import landscapes

KINDS = {"demo": painter.DEMO, **landscapes.SETS}


@pytest.fixture(scope="module")
def pairs():
    """{(set, split): (scene, caption) of each image}, at full size."""
    return {(name, split): painter.random_pairs(name, split, kind) for name, kind in KINDS.items() for split in kind.sizes}


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [landscapes.random_landscape(rng) for _ in range(n)]


# ---- the same for ever


def test_sets_are_the_same_for_ever(pairs):
    """Captions, splits and pixels of earlier versions. (How polygons are filled is up to Pillow: of its version 12 here.)"""
    rng, said, painted = random.Random(0), hashlib.sha256(), hashlib.sha256()
    for scene in [painter.random_scene(rng) for _ in range(200)]:
        said.update((painter.describe(scene) + painter.describe(scene, rng) + painter.DEMO.split_of(scene)).encode())
    assert said.hexdigest()[:16] == "8c637b7149fb1c40"
    said = hashlib.sha256()
    for (name, split), some in pairs.items():
        if (name, split) != ("demo", "train"):              # which was endless
            said.update("".join(text for _, text in some).encode())
            for i, (scene, _) in enumerate(some[:20]):
                painted.update(KINDS[name].paint(scene, random.Random(f"{name} {split} {i}")).tobytes())
    assert (said.hexdigest()[:16], painted.hexdigest()[:16]) == ("59c9230a4d0c8618", "69f369a6f8037992")


# ---- folders


@pytest.mark.parametrize("name", KINDS)
def test_a_set_is_a_folder_that_data_reads(name, tmp_path, monkeypatch, capsys):
    kind = KINDS[name]._replace(sizes={"train": 30, "valid": 8, "test": 8})
    painter.write_folder(tmp_path / name, name, kind)
    assert capsys.readouterr().out == f"{tmp_path / name}: painting 46 images, once\n"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    painter.write_folder(tmp_path / name, name, kind)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} and capsys.readouterr().out == ""
    for split_name, size in kind.sizes.items():
        split = data.open_split(name, split_name, tmp_path)
        expected = painter.random_pairs(name, split_name, kind)
        assert split.texts == [text for _, text in expected] and split.positives == [[i] for i in range(size)]
        for i in (0, size - 1):
            assert split.image(i).tobytes() == kind.paint(expected[i][0], random.Random(f"{name} {split_name} {i}")).tobytes()
            assert split.image(i).size == (128, 128)


def test_a_folder_is_painted_whole_or_not_at_all(tmp_path, monkeypatch):
    demo = painter.DEMO._replace(sizes={"train": 30, "valid": 8, "test": 8})
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BadInput, match="demo: cannot be made .*No space left on device.*; is there room"):
            painter.write_folder(tmp_path / "demo", "demo", demo)
    left = lambda: [path for path in tmp_path.iterdir() if not path.name.startswith(".")]           # but for the lock
    assert left() == []
    (tmp_path / "demo.ce-clip-part/train").mkdir(parents=True)                  # of a killed run
    helpers = [multiprocessing.get_context("fork").Process(target=painter.write_folder, args=(tmp_path / "demo", "demo", demo)) for _ in range(2)]
    [helper.start() for helper in helpers]
    [helper.join() for helper in helpers]
    assert [helper.exitcode for helper in helpers] == [0, 0] and left() == [tmp_path / "demo"]
    with open(tmp_path / "demo/captions.csv", encoding="utf-8", newline="") as f:
        assert all((tmp_path / "demo" / row["image"]).is_file() for row in csv.DictReader(f))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.txt").touch()
    with pytest.raises(BadInput, match="own: something else is there"):
        painter.write_folder(tmp_path / "own", "demo", demo)


# ---- coloured things


def test_captions_of_the_demo_say_every_statement():
    scene = frozenset({("左上角", "两", "红色", "鱼"), ("右下角", "一", "蓝色", "房子")})
    for text in (painter.describe(scene), painter.describe(scene, random.Random(0))):
        assert "两条红色的鱼" in text and "左上角" in text and "一座蓝色的房子" in text and "右下角" in text


def test_painted_place_and_colour_are_where_the_caption_says():
    image = np.array(painter.paint(frozenset({("左上角", "一", "红色", "方块")}), random.Random(0))).astype(int)
    red = image[..., 0] - image[..., 1:].max(axis=2) > 80
    rows, columns = np.nonzero(red)
    assert len(rows) > 300 and rows.max() < 80 and columns.max() < 80


# ---- landscapes


@pytest.mark.parametrize("element", landscapes.ELEMENTS)
def test_every_element_is_seen_at_64_pixels(element, monkeypatch):
    """Under the same light, many pixels differ between an image with it and one without it."""
    light = next(light for names, *light in landscapes.TABLES["lights"] if not names or element in names.split())
    monkeypatch.setitem(landscapes.TABLES, "lights", [["", *light]])
    scene = landscapes.with_water({element})
    a, b = (np.array(landscapes.paint_landscape(s, random.Random(1), 64)).astype(int) for s in (scene, scene - {element}))
    assert (np.abs(a - b).max(axis=2) > 40).sum() > 60


def test_random_landscapes_can_be_painted_and_their_captions_name_every_element():
    rng, seen = random.Random(3), set()
    for scene in scenes(1000):
        seen |= scene
        assert 2 <= len(scene) <= 5 and landscapes.goes_together(scene) and scene == landscapes.with_water(scene)
        for text in (landscapes.describe_landscape(scene), landscapes.describe_landscape(scene, rng)):
            assert len(text) <= 50                                              # tokens that a text tower takes
            assert all(any(name in text for name in landscapes.ELEMENTS[element]["names"]) for element in scene)
            assert text.count("，") == len(scene) - 1
    assert seen == set(landscapes.ELEMENTS)


def test_names_of_elements_are_never_the_same():
    names = [name for element in landscapes.ELEMENTS.values() for name in element["names"]]
    assert not [(a, b) for a, b in combinations(names, 2) if a in b or b in a]
    assert len({element["english"] for element in landscapes.ELEMENTS.values()}) == len(landscapes.ELEMENTS)


def test_tables_name_elements_and_methods():
    tables, elements = landscapes.TABLES, set(landscapes.ELEMENTS)
    named = [tables["on_water"], *tables["rivals"], *(row[0] for row in tables["lights"])]
    assert {element for line in named for element in line.split()} <= elements
    assert all(hasattr(landscapes.Brush, method) for element in landscapes.ELEMENTS.values() for method, _ in element["paint"])


# ---- verses


def test_verses_have_five_or_seven_characters_and_elements_that_go_together():
    for verse, scene in landscapes.SCENE.items():
        assert len(verse) in (5, 7) and landscapes.POET[verse] and scene <= set(landscapes.ELEMENTS) and landscapes.goes_together(scene)
    assert len(landscapes.SCENE) == len(landscapes.POEMS) == len(set(landscapes.SCENE.values()))            # none stands twice


def test_every_character_is_in_the_vocabulary():
    words = [*landscapes.SCENE, *(word for element in landscapes.ELEMENTS.values() for word in element["places"] + element["names"]), "有在是，"]
    tokens = Tokenizer()(words)
    assert [word for word, row in zip(words, tokens.tolist()) if 100 in row] == [] and 100 in Tokenizer()(["𠮷"])[0].tolist()


# ---- splits


def test_each_painted_caption_is_true_of_one_image(pairs):
    for (name, split), some in pairs.items():
        texts, shown = [text for _, text in some], [scene for scene, _ in some]
        assert len(set(texts)) == len(set(shown)) == len(some) == KINDS[name].sizes[split]
        if split != "train":
            assert not any(a <= b or b <= a for a, b in combinations(shown, 2))


def test_scenes_of_one_split_are_in_no_other(pairs):
    """Not even with English captions. (Poems are told apart by their lines.)"""
    for names in (["demo"], ["landscapes", "english-landscapes"]):
        shown = {split: {scene for name in names for scene, _ in pairs[name, split]} for split in ("train", "valid", "test")}
        assert not any(shown[a] & shown[b] for a, b in combinations(shown, 2))


def test_english_captions_name_every_element(pairs):
    for scene, text in pairs["english-landscapes", "test"]:
        assert sorted(text.replace(" and ", ", ").split(", ")) == sorted(landscapes.ELEMENTS[element]["english"] for element in scene)


def test_poems_have_the_sizes_of_the_papers_set(pairs):
    assert {split: len(pairs["poems", split]) for split in TABLE_1["ap-id"]} == TABLE_1["ap-id"]


def test_two_verses_belong_to_one_split_in_either_order(pairs):
    poems = {split: {frozenset(text.split("，")) for _, text in pairs["poems", split]} for split in ("train", "valid", "test")}
    assert all(len(poems[split]) == len(pairs["poems", split]) for split in poems)
    assert not any(poems[a] & poems[b] for a, b in combinations(poems, 2))
    for split in poems:
        for pair in list(map(tuple, poems[split]))[:100]:
            assert landscapes.split_of_poem(pair[::-1]) == landscapes.split_of_poem(pair) == split


def test_every_verse_of_valid_and_test_is_trained_on_in_other_pairs(pairs):
    verses = {split: {verse for _, text in pairs["poems", split] for verse in text.split("，")} for split in ("train", "valid", "test")}
    assert verses["valid"] | verses["test"] <= verses["train"] == set(landscapes.SCENE)


def test_a_poem_shows_what_its_two_lines_speak_of(pairs):
    for scene, text in pairs["poems", "test"]:
        a, b = text.split("，")
        assert scene == landscapes.SCENE[a] | landscapes.SCENE[b] and landscapes.POET[a] != landscapes.POET[b]
        assert 3 <= len(scene) <= 6 and landscapes.goes_together(scene)
