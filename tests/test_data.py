"""Reading data: both layouts, the order of samples, the painted set, transforms; and every kind of damaged input named in one line."""
import base64
import io
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import png, refused, script, write_tsv_split
from PIL import Image

import data
from data import BadInput, Batches, open_split, training_loader


# ---------------------------------------------------------------------------------------------------------------- layouts


def test_chinese_clip_layout(tmp_path):
    write_tsv_split(tmp_path / "d", "train", pictures=3, captions_per_picture=2, start=7)
    split = open_split(tmp_path / "d", "train")
    assert split.image_ids == [7, 8, 9] and len(split.texts) == 6 and split.positives == [[0], [0], [1], [1], [2], [2]] and len(split) == 6
    assert np.array_equal(np.array(split.picture(1)), np.array(Image.open(io.BytesIO(png(seed=8)))))


def test_captions_with_several_pictures_and_with_none(tmp_path):
    write_tsv_split(tmp_path / "d", "train", pictures=3)
    texts = [{"text_id": 1, "text": "多", "image_ids": [1, 3, 3]}, {"text_id": 2, "text": "无", "image_ids": []}]
    (tmp_path / "d/train_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    split = open_split(tmp_path / "d", "train")
    assert split.positives == [[0, 2], []] and split.pairs == [(0, 0), (0, 2)]


def test_both_base64_alphabets_and_no_final_newline(tmp_path):
    write_tsv_split(tmp_path / "d", "train", pictures=40)
    path = tmp_path / "d/train_imgs.tsv"
    assert "+" in path.read_text() and "/" in path.read_text()
    plain = [np.array(open_split(tmp_path / "d", "train").picture(i)) for i in range(40)]
    path.write_text(path.read_text().replace("+", "-").replace("/", "_").replace("\n", "\n\n", 1).rstrip("\n"))           # blank lines say nothing
    urlsafe = open_split(tmp_path / "d", "train")
    assert all(np.array_equal(np.array(urlsafe.picture(i)), plain[i]) for i in range(40))


def write_folder(folder, rows, kind="csv", columns="image,caption"):
    folder.mkdir(exist_ok=True)
    for row in rows:
        (folder / row[0]).parent.mkdir(exist_ok=True)
        (folder / row[0]).write_bytes(png(seed=len(row[0])))
    if kind == "csv":
        text = "\n".join([columns, *(",".join(f'"{x}"' for x in row) for row in rows)])
    else:
        text = "\n".join(json.dumps(dict(zip(columns.split(","), row)), ensure_ascii=False) for row in rows)
    (folder / f"captions.{kind}").write_text(text, encoding="utf-8-sig" if kind == "csv" else "utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_folder_with_captions(tmp_path, kind):
    rows = [("a 猫.png", "一只猫，坐着", "train"), ("sub/b.png", "一条狗", "train"), ("a 猫.png", "一只橘猫", "train"), ("a 猫.png", "一只橘猫", "train"), ("c.png", "一只鸟", "test")]
    write_folder(tmp_path / "own", rows, kind, "image,caption,split")
    split = open_split(tmp_path / "own", "train")
    assert split.image_ids == ["a 猫.png", "sub/b.png"] and split.texts == ["一只猫，坐着", "一条狗", "一只橘猫"] and split.positives == [[0], [1], [0]]
    assert split.picture(1).size == (20, 12)
    assert open_split(tmp_path / "own", "test").texts == ["一只鸟"]
    with pytest.raises(BadInput, match="no split 'valid'; it has test, train; the column `split`"):
        open_split(tmp_path / "own", "valid")


def test_folder_without_a_split_column_divides_by_picture(tmp_path):
    write_folder(tmp_path / "own", [(f"{i}.png", f"第{i}张") for i in range(400)])
    names = {split: set(open_split(tmp_path / "own", split).image_ids) for split in ("train", "valid", "test")}
    assert sum(map(len, names.values())) == 400 and len(set.union(*names.values())) == 400
    assert 280 < len(names["train"]) < 350 and 20 < len(names["valid"]) < 70 and 20 < len(names["test"]) < 70


def test_one_sentence_in_several_rows_describes_several_pictures(tmp_path):
    write_folder(tmp_path / "own", [("a.png", "一只猫", "train"), ("b.png", " 一只猫 ", "train"), ("b.png", "猫", "train")], columns="image,caption,split")
    split = open_split(tmp_path / "own", "train")
    assert split.texts == ["一只猫", "猫"] and split.positives == [[0, 1], [1]] and len(split) == 3


def test_caption_files_as_spreadsheets_write_them(tmp_path):
    """Byte-order mark, CRLF, capital headings with blanks, rows of empty cells, Windows paths."""
    write_folder(tmp_path / "own", [("sub/a.png", "x")])
    (tmp_path / "own/captions.csv").write_bytes("\ufeffImage, Caption ,split\r\nsub\\a.png ,一只猫,Train\r\n,,,\r\n\r\n".encode())
    split = open_split(tmp_path / "own", "train")
    assert split.image_ids == ["sub/a.png"] and split.texts == ["一只猫"] and split.picture(0).size == (20, 12)


# ---------------------------------------------------------------------------------------------------------------- damaged input


def edit(name, change):
    return lambda folder: (folder / name).write_text(change((folder / name).read_text(encoding="utf-8")), encoding="utf-8")


def nth(line, new):
    """Replace the line-th line (from 1)."""
    def change(text):
        lines = text.splitlines()
        lines[line - 1] = new
        return "\n".join(lines) + "\n"
    return change


DAMAGE = {
    "picture line without a tab": (edit("train_imgs.tsv", nth(3, "3 abc")), "train_imgs.tsv, line 3: expected `number<TAB>base64 picture`"),
    "picture id that is no number": (edit("train_imgs.tsv", nth(2, "x\tabc")), "train_imgs.tsv, line 2: expected"),
    "blank picture line": (edit("train_imgs.tsv", nth(5, "")), "train_texts.jsonl, line 5: image_id 5 is not in train_imgs.tsv"),
    "picture id twice": (edit("train_imgs.tsv", nth(4, "2\tabc")), "train_imgs.tsv, line 4: picture id 2 stands in line 2 already"),
    "caption line that is not JSON": (edit("train_texts.jsonl", nth(6, '{"text_id": 6,')), "train_texts.jsonl, line 6: not JSON"),
    "caption line that is no object": (edit("train_texts.jsonl", nth(6, "[1, 2]")), "train_texts.jsonl, line 6: expected an object"),
    "caption without a text": (edit("train_texts.jsonl", nth(2, '{"text_id": 20, "image_ids": [1]}')), "train_texts.jsonl, line 2: expected"),
    "caption id twice": (edit("train_texts.jsonl", nth(2, '{"text_id": 10, "text": "x", "image_ids": [1]}')), "train_texts.jsonl, line 2: text_id 10 stands in line 1 already"),
    "picture that is not there": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "x", "image_ids": [777]}')), "train_texts.jsonl, line 2: image_id 777 is not in train_imgs.tsv"),
    "picture id that cannot be one": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "x", "image_ids": [[1]]}')), "train_texts.jsonl, line 2: image_id [1] is not in"),
    "half a character": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "\\ud800", "image_ids": [1]}')), "train_texts.jsonl, line 2: the text holds a broken character"),
    "endless brackets": (edit("train_texts.jsonl", nth(2, "[" * 100_000)), "train_texts.jsonl, line 2: not JSON"),
    "endless number": (edit("train_texts.jsonl", nth(2, "1" * 5000)), "train_texts.jsonl, line 2: not JSON"),
    "caption id true": (edit("train_texts.jsonl", nth(1, '{"text_id": true, "text": "x", "image_ids": [1]}')), "train_texts.jsonl, line 1: expected"),
    "no captions": (edit("train_texts.jsonl", lambda _: ""), "little/train: the split is empty (12 pictures, 0 captions)"),
    "no pictures": (lambda folder: [(folder / n).write_text("") for n in ("train_imgs.tsv", "train_texts.jsonl")], "the split is empty"),
    "captions missing": (lambda folder: (folder / "train_texts.jsonl").unlink(), "train_texts.jsonl is missing beside train_imgs.tsv"),
    "split missing": (lambda folder: (folder / "train_imgs.tsv").unlink(), "no split 'train': train_imgs.tsv is missing; it has valid, test"),
    "captions not in UTF-8": (lambda folder: (folder / "train_texts.jsonl").write_bytes(b'{"text": "\xff"}'), "train_texts.jsonl, line 1: not UTF-8"),
}


@pytest.mark.parametrize("harm, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named_with_their_line(tsv_folder, harm, message):
    harm(tsv_folder)
    with pytest.raises(BadInput) as caught:
        open_split(tsv_folder, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["no base64 at all!", base64.b64encode(b"not a picture").decode(), base64.b64encode(png(seed=1)[:-300]).decode(), ""],
                         ids=["not base64", "not a picture", "cut short", "nothing"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_does_not_decode_is_named_by_its_id(tsv_folder, content, workers):
    edit("train_imgs.tsv", nth(4, f"4\t{content}"))(tsv_folder)
    loader = training_loader(open_split(tsv_folder, "train"), 32, Batches(12, 12, 0, 0, 1), workers)
    with pytest.raises(BadInput, match="^little/train: picture 4 cannot be read") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows, message", [
    ("image,caption\nno.png,猫\n", "captions.csv, line 2: there is no picture"),
    ("picture,text\na.png,猫\n", "captions.csv, line 1: expected the column names image,caption (with a comma between them, each once); found picture,text"),
    ("", "captions.csv, line 1: expected the column names image,caption (with a comma between them, each once); found nothing"),
    ('image,caption\na.png,"一只猫\na.png,狗\n', "captions.csv, line 2: not CSV (unexpected end of data); every"),
    ("image,caption,split\na.png,猫,train\n./a.png,狗,test\n", "captions.csv, line 3: picture a.png is in the split test here and in train above"),
    ("image,caption\na.png,\n", "captions.csv, line 2: expected an `image` and a `caption`"),
    ("image,caption,split\na.png,猫,train\na.png,狗,\n", "captions.csv, line 3: `split` is empty here but given in the rows above"),
    ("image,caption\ra.png,猫\r", "captions.csv, line 1: not CSV (new-line"),
    ("image,caption\na.png,一只猫,坐着\n", 'captions.csv, line 2: more columns than the first line names; put a caption that has commas in "quotes"'),
])
def test_damaged_caption_files(tmp_path, rows, message):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "captions.csv").write_text(rows, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        open_split(tmp_path, "train")
    assert message in str(caught.value)


def test_messages_are_one_line_and_a_workers_message_is_unwrapped():
    assert str(BadInput("a.jsonl, line 3: 第一行\n第二行\u2028?")) == "a.jsonl, line 3: 第一行 第二行 ?"
    assert str(BadInput("Caught BadInput in DataLoader worker process 0.\nTraceback …\ndata.BadInput: picture 3 cannot be read\n")) == "picture 3 cannot be read"


def test_unknown_places(tmp_path):
    for name, message in (("imagenet", "known data set"), ("flickr30k-cn", "no folder"), (str(tmp_path), r"nor \*_imgs.tsv")):
        with pytest.raises(BadInput, match=message):
            open_split(name, "train", tmp_path / "root")


def test_command_line(tsv_folder, tmp_path):
    assert "train          12 pictures       12 captions       12 pairs" in script("data.py", tsv_folder)
    assert "train    endless; 8,192 pairs an epoch" in script("data.py", "demo")
    script("data.py", "demo", "--draw", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (804, 536)
    assert script("data.py", tsv_folder, "--draw", tmp_path / "sheet.png").count("picture 2") == 12
    assert "endless" in refused("data.py", "demo", "--split", "train", "--draw", tmp_path / "sheet.png")
    assert "neither a folder" in refused("data.py", "nothing-here")


# ---------------------------------------------------------------------------------------------------------------- order


def batches(n=10, size=6, steps=(0, 5), seed=3, **process):
    return list(Batches(n, size, seed, *steps, **process))


def test_every_pair_once_per_epoch_and_every_batch_full():
    places = sum(batches(), [])
    assert all(len(b) == 6 for b in batches()) and [e for e, _ in places] == [0] * 10 + [1] * 10 + [2] * 10
    for epoch in range(3):
        assert sorted(k for e, k in places if e == epoch) == list(range(10))
    assert places[:10] != [(0, k) for _, k in places[10:20]] and sum(batches(seed=4), []) != places


def test_order_is_the_same_for_any_number_of_processes():
    for world in (2, 3):
        shares = [batches(rank=r, world=world) for r in range(world)]
        assert [sum(parts, []) for parts in zip(*shares)] == batches()


def test_order_can_be_taken_up_at_any_step():
    assert batches(steps=(3, 5)) == batches()[3:]


def test_workers_change_nothing(tsv_folder):
    split = open_split(tsv_folder, "train")
    several = [list(training_loader(split, 32, Batches(12, 6, 0, 0, 5), workers)) for workers in (0, 1, 2)]
    for other in several[1:]:
        assert all(torch.equal(x, y) for a, b in zip(several[0], other) for x, y in zip(a, b))


def test_pictures_are_not_kept_in_memory(tsv_folder):
    split = open_split(tsv_folder, "train")
    assert not any(isinstance(v, (bytes, Image.Image)) for value in vars(split).values() for v in (value if isinstance(value, list) else [value]))


def test_the_same_sentence_has_one_key(tmp_path):
    write_tsv_split(tmp_path / "d", "train", pictures=3)
    texts = [{"text_id": i, "text": text, "image_ids": [i]} for i, text in ((1, "猫"), (2, "狗"), (3, "猫"))]
    (tmp_path / "d/train_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    assert open_split(tmp_path / "d", "train").text_keys == [0, 1, 0]


# ---------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_seen_as_a_person_sees_them():
    """Turned as EXIF says; black on transparent is black on white; 16-bit grey keeps its shades; bilevel, palette, CMYK are converted."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    exif = upright.getexif()
    exif[0x0112] = 6                                                            # "turn by 90 degrees to see it upright"
    file = io.BytesIO()
    upright.rotate(90, expand=True).save(file, "PNG", exif=exif)
    assert np.array_equal(np.array(data.to_rgb(Image.open(file))), np.array(upright))
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (4, 4), 0)
        clear.paste(Image.new(mode, (2, 4), (0, 0, 0, 255) if mode == "RGBA" else (0, 255)))
        assert np.array(data.to_rgb(clear))[0, :, 0].tolist() == [0, 0, 255, 255]
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.array(data.to_rgb(grey))[0, :, 0].tolist() == [0, 100, 255]
    assert all(data.to_rgb(upright.convert(mode)).mode == "RGB" for mode in ("1", "L", "P", "CMYK", "YCbCr"))


def test_palette_pictures_become_rgb_before_they_are_resized():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert("P")
    assert torch.equal(data.to_uint8(colours, 24), data.to_uint8(colours.convert("RGB"), 24))


def test_augmentation_without_strength_changes_nothing():
    pixels = torch.rand(2, 3, 32, 32)
    nothing = dict.fromkeys(data.AUGMENT["drawing"], 0)
    torch.testing.assert_close(data.augment(pixels, torch.rand(2, data.DRAWS), **nothing), pixels, rtol=0, atol=1e-5)


def test_augmentation_never_mirrors_and_keeps_paper_white():
    pixels = torch.ones(64, 3, 32, 32)
    pixels[:, :, 8:24, 6:10] = 0                                                # a dark bar left of the middle
    draws = 2 * torch.rand(64, data.DRAWS, generator=torch.Generator().manual_seed(0)) - 1
    changed = data.augment(pixels, draws, **data.AUGMENT["drawing"])
    ink = 1 - changed.mean(dim=1)
    centre = (ink.sum(1) * torch.arange(32)).sum(1) / ink.sum((1, 2))
    assert (centre < 16).all() and not torch.equal(changed[0], changed[1])
    assert (changed[:, :, 0, 31] == 1).all() and changed.min() >= 0 and changed.max() <= 1


# ---------------------------------------------------------------------------------------------------------------- the painted set


def test_each_painted_caption_is_true_of_one_picture():
    for name, size in (("valid", 300), ("test", 500)):
        split = open_split("demo", name)
        assert len(set(split.texts)) == len(split.texts) == size
        for a, scene in enumerate(split.scenes):
            assert [b for b, other in enumerate(split.scenes) if scene <= other] == [a]


def test_painted_training_scenes_never_show_a_test_scene_and_are_new_in_every_epoch(monkeypatch):
    train = open_split("demo", "train")
    painted = []
    monkeypatch.setattr(data, "paint", lambda scene, rng: painted.append(scene))
    for epoch in (0, 1):
        for k in range(400):
            train.sample(epoch, k)
    assert {data.split_of_scene(s) for s in painted} == {"train"} and painted[:400] != painted[400:]


def test_painted_pictures_are_reproducible_and_captions_say_every_statement():
    train = open_split("demo", "train")
    a, b = train.sample(3, 5), train.sample(3, 5)
    assert np.array_equal(np.array(a[0]), np.array(b[0])) and np.array_equal(a[1], b[1])
    scene = frozenset({("左上角", 2, "红色", "鱼"), ("右下角", 1, "蓝色", "房子")})
    for text in (data.describe(scene), data.describe(scene, data.random.Random(0))):
        assert "两条红色的鱼" in text and "左上角" in text and "一座蓝色的房子" in text and "右下角" in text


def test_painted_place_and_colour_are_where_the_caption_says():
    picture = np.array(data.paint(frozenset({("左上角", 1, "红色", "方块")}), data.random.Random(0))).astype(int)
    red = picture[..., 0] - picture[..., 1:].max(axis=2) > 80
    rows, columns = np.nonzero(red)
    assert len(rows) > 300 and rows.max() < 80 and columns.max() < 80


def test_real_pictures(real_data):
    """The counts of the real set, and that every picture decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, pictures, captions in (("train", 1572, 2918), ("valid", 300, 549), ("test", 1272, 2369), ("unseen", 277, 523)):
            split = open_split(real_data, name)
            assert (len(split.image_ids), len(split.texts)) == (pictures, captions)
            assert {split.picture(i).size for i in range(pictures)} == {(64, 64)}
