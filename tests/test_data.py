"""Reading data: both layouts, the order of samples, the painted set, transforms; and every kind of damaged input named in one line."""
import base64
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, bomb, jpeg, png, write_tar, write_tsv_split
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

import checkpoint
import data
import evaluate
from data import Batches, open_split, training_loader
from model import CLIP, CONFIGS
from support import images as support_images, run, shards
from support.captions import sentence_key
from support.images import decoded, jpeg_decoder, jpeg_pixels, resized, to_rgb, to_uint8, training_pixels
from support.shard_writer import write_shards
from support.settings import parse_args
from support.shards import ShardOrder, opened_index, scan, shards_of
from support.system import BadInput, remove_folder
from tools import classify, prepare, search
from tools.check import check


# ---------------------------------------------------------------------------------------------------------------- layouts


def test_chinese_clip_layout(tmp_path):
    write_tsv_split(tmp_path / "d", "train", images=3, captions_per_image=2, start=7)
    split = open_split(tmp_path / "d", "train")
    assert split.image_ids == [7, 8, 9] and len(split.texts) == 6 and split.positives == [[0], [0], [1], [1], [2], [2]] and len(split) == 6
    assert np.array_equal(np.array(split.image(1)), np.array(Image.open(io.BytesIO(png(seed=8)))))


def test_captions_with_several_images_and_with_none(tmp_path):
    write_tsv_split(tmp_path / "d", "train", images=3)
    texts = [{"text_id": 1, "text": "多", "image_ids": [1, 3, 3]}, {"text_id": 2, "text": "无", "image_ids": []}]
    (tmp_path / "d/train_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    split = open_split(tmp_path / "d", "train")
    assert split.positives == [[0, 2], []] and split.pairs == [(0, 0), (0, 2)]


def test_both_base64_alphabets_and_no_final_newline(tmp_path):
    write_tsv_split(tmp_path / "d", "train", images=40)
    path = tmp_path / "d/train_imgs.tsv"
    assert "+" in path.read_text() and "/" in path.read_text()
    plain = [np.array(open_split(tmp_path / "d", "train").image(i)) for i in range(40)]
    path.write_text(path.read_text().replace("+", "-").replace("/", "_").replace("\n", "\n\n", 1).rstrip("\n"))           # blank lines say nothing
    urlsafe = open_split(tmp_path / "d", "train")
    assert all(np.array_equal(np.array(urlsafe.image(i)), plain[i]) for i in range(40))


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
    assert split.image(1).size == (20, 12)
    assert open_split(tmp_path / "own", "test").texts == ["一只鸟"]
    with pytest.raises(BadInput, match="no split 'valid'; it has test, train; the column `split`"):
        open_split(tmp_path / "own", "valid")


def test_folder_without_a_split_column_divides_by_image(tmp_path):
    write_folder(tmp_path / "own", [(f"{i}.png", f"第{i}张") for i in range(400)])
    names = {split: set(open_split(tmp_path / "own", split).image_ids) for split in ("train", "valid", "test")}
    assert sum(map(len, names.values())) == 400 and len(set.union(*names.values())) == 400
    assert 280 < len(names["train"]) < 350 and 20 < len(names["valid"]) < 70 and 20 < len(names["test"]) < 70


def test_one_sentence_in_several_rows_describes_several_images(tmp_path):
    write_folder(tmp_path / "own", [("a.png", "一只猫", "train"), ("b.png", " 一只猫 ", "train"), ("b.png", "猫", "train")], columns="image,caption,split")
    split = open_split(tmp_path / "own", "train")
    assert split.texts == ["一只猫", "猫"] and split.positives == [[0, 1], [1]] and len(split) == 3


def test_caption_files_as_spreadsheets_write_them(tmp_path):
    """Byte-order mark, CRLF, capital headings with blanks, rows of empty cells, Windows paths."""
    write_folder(tmp_path / "own", [("sub/a.png", "x")])
    (tmp_path / "own/captions.csv").write_bytes("\ufeffImage, Caption ,split\r\nsub\\a.png ,一只猫,Train\r\n,,,\r\n\r\n".encode())
    split = open_split(tmp_path / "own", "train")
    assert split.image_ids == ["sub/a.png"] and split.texts == ["一只猫"] and split.image(0).size == (20, 12)


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
    "image line without a tab": (edit("train_imgs.tsv", nth(3, "3 abc")), "train_imgs.tsv, line 3: expected `number<TAB>base64 image`"),
    "image id that is no number": (edit("train_imgs.tsv", nth(2, "x\tabc")), "train_imgs.tsv, line 2: expected"),
    "blank image line": (edit("train_imgs.tsv", nth(5, "")), "train_texts.jsonl, line 5: image_id 5 is not in train_imgs.tsv"),
    "image id twice": (edit("train_imgs.tsv", nth(4, "2\tabc")), "train_imgs.tsv, line 4: image id 2 stands in line 2 already"),
    "caption line that is not JSON": (edit("train_texts.jsonl", nth(6, '{"text_id": 6,')), "train_texts.jsonl, line 6: not JSON"),
    "caption line that is no object": (edit("train_texts.jsonl", nth(6, "[1, 2]")), "train_texts.jsonl, line 6: expected an object"),
    "caption without a text": (edit("train_texts.jsonl", nth(2, '{"text_id": 20, "image_ids": [1]}')), "train_texts.jsonl, line 2: expected"),
    "caption id twice": (edit("train_texts.jsonl", nth(2, '{"text_id": 10, "text": "x", "image_ids": [1]}')), "train_texts.jsonl, line 2: text_id 10 stands in line 1 already"),
    "image that is not there": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "x", "image_ids": [777]}')), "train_texts.jsonl, line 2: image_id 777 is not in train_imgs.tsv"),
    "image id that cannot be one": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "x", "image_ids": [[1]]}')), "train_texts.jsonl, line 2: image_id [1] is not in"),
    "half a character": (edit("train_texts.jsonl", nth(2, '{"text_id": 99, "text": "\\ud800", "image_ids": [1]}')), "train_texts.jsonl, line 2: the text holds a broken character"),
    "endless brackets": (edit("train_texts.jsonl", nth(2, "[" * 100_000)), "train_texts.jsonl, line 2: not JSON"),
    "endless number": (edit("train_texts.jsonl", nth(2, "1" * 5000)), "train_texts.jsonl, line 2: not JSON"),
    "caption id true": (edit("train_texts.jsonl", nth(1, '{"text_id": true, "text": "x", "image_ids": [1]}')), "train_texts.jsonl, line 1: expected"),
    "no captions": (edit("train_texts.jsonl", lambda _: ""), "little/train: the split is empty (12 images, 0 captions)"),
    "no images": (lambda folder: [(folder / n).write_text("") for n in ("train_imgs.tsv", "train_texts.jsonl")], "the split is empty"),
    "captions missing": (lambda folder: (folder / "train_texts.jsonl").unlink(), "train_texts.jsonl is missing beside train_imgs.tsv"),
    "split missing": (lambda folder: (folder / "train_imgs.tsv").unlink(), "no split 'train' (train_imgs.tsv or train-000000.tar, …); it has valid, test"),
    "captions not in UTF-8": (lambda folder: (folder / "train_texts.jsonl").write_bytes(b'{"text": "\xff"}'), "train_texts.jsonl, line 1: not UTF-8"),
}


@pytest.mark.parametrize("harm, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_named_with_their_line(tsv_folder, harm, message):
    harm(tsv_folder)
    with pytest.raises(BadInput) as caught:
        open_split(tsv_folder, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["no base64 at all!", base64.b64encode(b"not a image").decode(), base64.b64encode(png(seed=1)[:-300]).decode(), ""],
                         ids=["not base64", "not a image", "cut short", "nothing"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_does_not_decode_is_replaced_and_reported(tsv_folder, content, workers):
    edit("train_imgs.tsv", nth(4, f"4\t{content}"))(tsv_folder)
    split = open_split(tsv_folder, "train")
    loader = training_loader(split, 32, Batches(split, 12, 0, 0, 1), workers)
    (pixels, ids, image_keys, text_keys, bad), = loader
    assert [(report["pair"], report["image"], report["caption"]) for report in bad] == [(3, 4, "第4张图片，说法0")]
    assert bad[0]["reason"].startswith("little/train: image 4 cannot be read (") and "\n" not in bad[0]["reason"]
    assert sorted(text_keys.tolist()) == sorted(split.text_keys[:3] + 2 * split.text_keys[4:5] + split.text_keys[5:])      # its place takes the pair after it
    with open(bad[0]["file"], "rb") as f:
        f.seek(bad[0]["offset"])
        assert f.readline().decode() == content + "\n"


@pytest.mark.parametrize("rows, message", [
    ("image,caption\nno.png,猫\n", "captions.csv, line 2: there is no image"),
    ("image,text\na.png,猫\n", "captions.csv, line 1: expected the column names image,caption (with a comma between them, each once); found image,text"),
    ("", "captions.csv, line 1: expected the column names image,caption (with a comma between them, each once); found nothing"),
    ('image,caption\na.png,"一只猫\na.png,狗\n', "captions.csv, line 2: not CSV (unexpected end of data); every"),
    ("image,caption,split\na.png,猫,train\n./a.png,狗,test\n", "captions.csv, line 3: image a.png is in the split test here and in train above"),
    ("image,caption\na.png,\n", "captions.csv, line 2: the caption is empty; fill it in or delete the row"),
    ("image,caption,split\na.png,猫,train\na.png,狗,\n", "captions.csv, line 3: give a `split` in every row or in none"),
    ("image,caption\ra.png,猫\r", "captions.csv, line 1: not CSV (new-line"),
    ("image,caption\na.png,一只猫,坐着\n", 'captions.csv, line 2: more columns than line 1 names; put a caption that has commas in "quotes"'),
])
def test_damaged_caption_files(tmp_path, rows, message):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "captions.csv").write_text(rows, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        open_split(tmp_path, "train")
    assert message in str(caught.value)


OUTSIDE = {
    "absolute": ("{tmp}/private/secret.png", None), "..": ("../private/secret.png", None), "a detour": ("sub/../../private/secret.png", None),
    "Windows": ("sub\\..\\..\\private\\secret.png", None), "a link": ("l.png", "../private/secret.png"), "a link to a folder": ("l/secret.png", "../private"),
    "a link of a link": ("l.png", "sub/m.png"),
}


@pytest.mark.parametrize("image, link", OUTSIDE.values(), ids=OUTSIDE)
def test_captions_do_not_read_outside_their_folder(tmp_path, called, stopped, image, link):
    own, secret = tmp_path / "own", tmp_path / "private/secret.png"
    write_folder(own, [("a.png", "猫", "test")], columns="image,caption,split")
    secret.parent.mkdir()
    secret.write_bytes(png(seed=99))
    (own / "sub").mkdir()
    (own / "sub/m.png").symlink_to(secret)
    if link:
        (own / image.split("/")[0]).symlink_to(link)
    image = image.format(tmp=tmp_path)
    with open(own / "captions.csv", "a") as f:
        f.write(f'\n"{image}",外面,test')
    line = stopped(prepare, "shards", own, tmp_path / "shards")
    shown = image.replace("\\", "/").replace("sub/../", "")
    assert line == f"{own}/captions.csv, line 3: {shown} is outside the folder; --allow-outside reads it"
    with pytest.raises(BadInput, match="line 3: .* is outside the folder"):
        open_split(own, "test")
    assert "2 images" in called(prepare, "counts", own, "--allow-outside")
    assert open_split(own, "test", allow_outside=True).image_bytes(1) == png(seed=99)


def test_a_captions_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path):
    write_folder(tmp_path / "theirs", [("a.png", "猫", "test")], columns="image,caption,split")
    write_folder(tmp_path / "own", [("a.png", "狗", "test")], columns="image,caption,split")
    (tmp_path / "own/captions.csv").rename(tmp_path / "own/c.csv")
    for target, refused in (("../theirs/captions.csv", True), ("c.csv", False)):
        (tmp_path / "own/captions.csv").unlink(missing_ok=True)
        (tmp_path / "own/captions.csv").symlink_to(target)
        with pytest.raises(BadInput, match="captions.csv: a link out of the folder") if refused else contextlib.nullcontext():
            assert open_split(tmp_path / "own", "test").texts == ["狗"]
        assert len(open_split(tmp_path / "own", "test", allow_outside=True)) == 1


def test_every_program_that_reads_captions_refuses_images_outside_and_has_the_flag(tmp_path, called, stopped, stops, capsys):
    own = tmp_path / "own"
    rows = [("a.png", "猫", "train"), ("bb.png", "狗", "valid"), ("ccc.png", "鸟", "test")]
    write_folder(own, rows, columns="image,caption,split")
    (own / "captions.csv").write_text("image,caption,split\na.png,猫,train\nbb.png,狗,valid\n../ccc.png,鸟,test\n")
    (own / "ccc.png").rename(tmp_path / "ccc.png")
    word = "captions.csv, line 4: ../ccc.png is outside the folder; --allow-outside reads it"
    checkpoint.save(tmp_path / "tiny.pt", CLIP(CONFIGS["tiny"]))
    assert word in stops("train.py", "--stage", 2, "--data", own, "--out", tmp_path / "run")
    args = evaluate, "--ckpt", tmp_path / "tiny.pt", "--data", own, "--workers", 0
    assert word in stopped(*args)
    assert "own" in called(*args, "--allow-outside")
    for command in (["counts", own], ["shards", own, tmp_path / "s"], ["convert", own, tmp_path / "c"], ["sheet", own, tmp_path / "s.png"]):
        assert word in stopped(prepare, *command)
        called(prepare, *command, "--allow-outside")
    assert not check(str(own), "data", 1, None) and word in capsys.readouterr().out
    assert check(str(own), "data", 1, None, allow_outside=True)
    assert parse_args(["--stage", "2", "--allow-outside"]).allow_outside and "allow_outside" in run.MAY_CHANGE_ON_RESUME


def test_paths_and_links_that_stay_in_the_folder_are_read(tmp_path):
    own = tmp_path / "own"
    write_folder(own, [("a.png", "猫", "test"), ("sub/b.png", "狗", "test")], columns="image,caption,split")
    (own / "l.png").symlink_to("sub/b.png")
    (own / "l").symlink_to("sub")
    (tmp_path / "root").symlink_to(own)                                         # the folder itself may be a link
    text = f"image,caption,split\nsub/../a.png,甲,test\n.//a.png,乙,test\nl.png,丙,test\nl/b.png,丁,test\n{own}/sub/b.png,戊,test\n"
    (own / "captions.csv").write_text(text, encoding="utf-8")
    split = open_split(tmp_path / "root", "test")
    assert split.image_ids == ["a.png", "l.png", "l/b.png", f"{own}/sub/b.png"] and split.positives == [[0], [0], [1], [2], [3]]


@pytest.mark.parametrize("image", ["a\0b.png", "x" * 5000 + ".png", "x/" * 2400 + "a.png", "sub", ".", "pipe.png", "zero.png", "loop.png", "a.png\nerror: b"],
                         ids=["NUL", "5,000 letters", "2,400 folders", "a folder", "itself", "a pipe", "a device", "a link to itself", "a line end"])
def test_a_name_that_is_no_image_is_one_line_and_does_not_hang(tmp_path, image):
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": image, "caption": "猫"}))
    with pytest.raises(BadInput, match="captions.jsonl, line 1: there is no image") as caught:
        open_split(tmp_path, "train")
    assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "captions.csv")                                        # is no captions file
    (tmp_path / "captions.jsonl").unlink()
    with pytest.raises(BadInput, match="no captions.csv or captions.jsonl with rows"):
        open_split(tmp_path, "train")


def test_unknown_places(tmp_path):
    for name, message in (("imagenet", "known data set"), ("flickr30k-cn", "no folder"), (str(tmp_path), r"nor \*_imgs.tsv")):
        with pytest.raises(BadInput, match=message):
            open_split(name, "train", tmp_path / "root")


def test_known_names(tmp_path):
    """A painted set that is not there is told how to get, the others where to put."""
    with pytest.raises(BadInput, match=f"no folder {tmp_path}/poems; paint it: python -m tools.prepare paint poems {tmp_path}/poems"):
        open_split("poems", "test", tmp_path)
    with pytest.raises(BadInput, match=f"no folder {tmp_path}/COCO-CN; unpack the data set there"):
        open_split("coco-cn", "test", tmp_path)
    write_folder(tmp_path / "demo", [("a.png", "猫", "test")], columns="image,caption,split")
    assert open_split("demo", "test", tmp_path).name == "demo/test" and data.all_names("demo", tmp_path) == ["test"]
    assert [data.data_name(name) for name in ("poems", tmp_path / "poems", "data/coco-CN", "a/b", "x/{0..3}.tar")] == ["poems", "poems", "coco-cn", "b", "x/{0..3}.tar"]


# ---------------------------------------------------------------------------------------------------------------- order


class Numbers:
    """Ten pairs, or n, of which only the order matters."""

    def __init__(self, n=10):
        self.n, self.order = n, lambda seed, epoch: np.random.default_rng([seed, epoch]).permutation(n)

    def __len__(self):
        return self.n


def batches(size=6, steps=(0, 5), seed=3, **process):
    return list(Batches(Numbers(), size, seed, *steps, **process))


def test_every_pair_once_per_epoch_and_every_batch_full():
    pairs = sum(batches(), [])
    assert all(len(b) == 6 for b in batches()) and len(pairs) == 30
    for epoch in range(3):
        assert sorted(pairs[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert pairs[:10] != pairs[10:20] and sum(batches(seed=4), []) != pairs


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 1, 2, 4])
def test_a_step_takes_the_same_pairs_for_any_number_of_processes_and_any_micro_batch(world, micro):
    """12 pairs a step. What is in the part of the batch that the processes run together depends on world x micro_batch alone."""
    shares = [batches(size=12, rank=r, world_size=world, micro_batch=micro) for r in range(world)]
    assert len({len(share) for share in shares}) == 1
    parts = [sum(parts, []) for parts in zip(*shares)]
    assert sum(parts, []) == sum(batches(size=12), [])
    assert all(len(part) <= world * (micro or 12) for part in parts)
    assert parts == batches(size=12, micro_batch=min(12, world * (micro or 12)))


def test_order_can_be_taken_up_at_any_step():
    assert batches(steps=(3, 5)) == batches()[3:]


def test_workers_change_nothing(tsv_folder):
    split = open_split(tsv_folder, "train")
    several = [list(training_loader(split, 32, Batches(split, 6, 0, 0, 5), workers)) for workers in (0, 1, 2)]
    for other in several[1:]:
        assert all(torch.equal(x, y) for a, b in zip(several[0], other) for x, y in zip(a[:4], b[:4]))


def test_a_reader_puts_the_images_of_a_batch_right_into_shared_memory(tsv_folder):
    split = open_split(tsv_folder, "train")
    samples = [data.TrainingPairs(split, 32)[k] for k in range(3)]
    assert not data.collate(samples)[0].is_shared() and torch.equal(data.collate(samples)[0], torch.stack([sample[0] for sample in samples]))
    where = lambda samples: data.collate(samples)[0].is_shared()
    assert list(DataLoader(samples, batch_size=3, num_workers=1, collate_fn=where)) == [True]


def test_images_are_not_kept_in_memory(tsv_folder):
    split = open_split(tsv_folder, "train")
    assert not any(isinstance(v, (bytes, Image.Image)) for value in vars(split).values() for v in (value if isinstance(value, list) else [value]))


def test_a_image_knows_all_its_sentences_and_the_same_sentence_has_one_key(tmp_path):
    write_tsv_split(tmp_path / "d", "train", images=3)
    texts = [{"text_id": i, "text": text, "image_ids": images} for i, text, images in ((1, "猫", [1]), (2, "狗", [2, 1]), (3, "猫", [3]))]
    (tmp_path / "d/train_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    split = open_split(tmp_path / "d", "train")
    cat, dog = sentence_key("猫"), sentence_key("狗")
    assert split.text_keys == [cat, dog, cat] and split.image_keys == [[cat, dog], [dog], [cat]]
    assert split.pairs == [(0, 0), (1, 1), (1, 0), (2, 2)]
    _, _, image_keys, text_keys, _ = next(iter(training_loader(split, 32, [[1, 2, 3]], 0)))
    assert image_keys.tolist() == [[dog, -1], [cat, dog], [cat, -1]] and text_keys.tolist() == [dog, dog, cat]


# ---------------------------------------------------------------------------------------------------------------- tar shards


def shard(path, numbers):
    """A shard of images that are their number's noise, captioned with it."""
    return write_tar(path, {name: content for i in numbers for name, content in ((f"{i:06}.png", png(seed=i)), (f"{i:06}.txt", f"第{i}张".encode()))})


def read_all(split, seed=0, epoch=0):
    """Every pair of an epoch, in its order: the images' bytes, the captions' tokens, the keys."""
    order = split.order(seed, epoch)
    return [split.sample(int(order[place])) for place in range(len(split))]


def test_shards_in_all_their_forms(tmp_path):
    """As webdataset, img2dataset and our own writer make them; several captions; folders inside; what macOS adds; files of other kinds."""
    write_tar(tmp_path / "a.tar", {
        "x/1.jpg": png(seed=1), "x/1.txt": "\ufeff 第一张\n".encode(),
        "x/2.PNG": png(seed=2), "x/2.json": json.dumps({"text": "第二张"}).encode(),
        "x/3.webp": png(seed=3), "x/3.txt": "第三张".encode(), "x/3.json": json.dumps({"caption": "not this", "width": 3}).encode(),
        "x/._3.jpg": b"macOS", "x/4.cls": b"7", "README": b"hello",
        "y/1.jpg": png(seed=4), "y/1.json": json.dumps({"texts": ["甲", "", "乙"]}).encode(),
        "z" * 150 + "/5.jpeg": png(seed=5), "z" * 150 + "/5.json": json.dumps({"caption": "第五张"}).encode()})
    split = open_split(tmp_path / "a.tar", "train")
    assert len(split) == 6 and split.texts == ["第一张", "第二张", "第三张", "甲", "乙", "第五张"] and split.positives == [[0], [1], [2], [3], [3], [4]]
    for k, seed in enumerate([1, 2, 3, 4, 4, 5]):
        image, ids, sentences, sentence = split.sample(k)
        assert image == png(seed=seed) and np.array_equal(ids, split.ids[k])
        assert sentence == sentence_key(split.texts[k]) and sentences == ([sentence_key("甲"), sentence_key("乙")] if k in (3, 4) else [sentence])


def test_patterns_of_shards(tmp_path):
    for n in (8, 9, 10):
        shard(tmp_path / f"s-{n:03}.tar", range(n * 10, n * 10 + 5))
    assert len(open_split(f"{tmp_path}/s-{{008..010}}.tar", "train")) == 15 and len(open_split(f"{tmp_path}/s-*.tar", "train")) == 15
    assert shards_of(f"{tmp_path}/s-0{{08..09}}.tar")[1].name == "s-009.tar"
    shard(tmp_path / "br[1]/train-000.tar", range(3))
    shard(tmp_path / "br[1]/train-hidden-000.tar", range(4))
    assert len(open_split(f"{tmp_path}/br[1]/train-000.tar", "train")) == len(open_split(tmp_path / "br[1]", "train")) == 3
    with pytest.raises(BadInput, match="more than a million shards"):
        open_split(f"{tmp_path}/{{0..99999999999}}.tar", "train")
    with pytest.raises(BadInput, match="2 of 4 shards are missing, the first .*s-011.tar"):
        open_split(f"{tmp_path}/s-{{009..012}}.tar", "train")
    for pattern, message in (("t-*.tar", r"1 of 1 shards are missing, the first .*/t-\*.tar"), ("s-{010..008}.tar", "no images with captions in 0 shards")):
        with pytest.raises(BadInput, match=message):
            open_split(f"{tmp_path}/{pattern}", "train")


def test_any_layout_can_be_written_as_shards_and_holds_the_same(capsys, tsv_folder, tmp_path):
    """By two processes; killed half-way it goes on; other shards in the folder are not touched."""
    text = json.dumps({"text_id": 1, "text": "三张", "image_ids": [3, 1, 7]}) + "\n"
    (tsv_folder / "train_texts.jsonl").write_text(text + (tsv_folder / "train_texts.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    write = lambda split="train", per_shard=5: write_shards(open_split(tsv_folder, split), tmp_path / "shards", split, per_shard, processes=2)
    write("train"), write("valid"), write("test")
    assert "12 images with 15 captions in 3 shards" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "shards").glob("*.tar")) == [f"{s}-{n:06}.tar" for s in ("test", "train", "valid") for n in range(3)]
    before, after = open_split(tsv_folder, "train"), open_split(tmp_path / "shards", "train")
    seen = lambda split: sorted((p, ids.tolist(), tuple(sorted(keys)), key) for p, ids, keys, key in read_all(split))
    assert len(after) == 15 and seen(before) == seen(after)
    relation = lambda split: sorted((text, sorted(split.image(i).tobytes() for i in images)) for text, images in zip(split.texts, split.positives))
    assert relation(before) == relation(after)
    whole = {p: p.read_bytes() for p in (tmp_path / "shards").glob("*.tar")}
    lost = tmp_path / "shards/train-000001.tar"
    lost.rename(lost.with_name(lost.name + ".part"))
    write()
    assert {p: p.read_bytes() for p in whole} == whole
    with pytest.raises(BadInput, match="it holds other shards of 'train'; name another folder, or delete them and train.json"):
        write(per_shard=6)
    with pytest.raises(BadInput, match="the split's name becomes a part of file names"):
        write_shards(before, tmp_path / "shards", "../train")
    again = tmp_path / "again"                                                  # shards as shards of another size
    write_shards(after, again, "train", per_shard=7)
    assert seen(open_split(again, "train")) == seen(before) and len(list(again.glob("*.tar"))) == 2
    assert len(after.shards) == 3 and after.incomplete() == 0


def test_killed_at_any_moment_shards_are_whole_and_the_next_call_goes_on(tsv_folder, tmp_path):
    split, out = open_split(tsv_folder, "train"), tmp_path / "out"
    write_shards(split, tmp_path / "whole", "train", per_shard=2)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    slow = open_split(tsv_folder, "train")
    slow.image_bytes = lambda i: time.sleep(0.1) or split.image_bytes(i)
    parent = multiprocessing.get_context("fork").Process(target=write_shards, args=(slow, out, "train", 2, 2))
    parent.start()
    while not list(out.glob("*.tar")):
        time.sleep(0.01)
    with pytest.raises(BadInput, match="out: another process is writing shards there"):
        write_shards(split, out, "train", per_shard=2)
    with pytest.raises(BadInput, match="out: another process is writing shards there"):
        write_shards(split, out, "train", per_shard=3)                          # it looks at what is there when it has the lock
    parent.kill()
    parent.join()
    time.sleep(0.3)                                                             # its workers would write on
    (out / "train-000009.tar.index.123.part").touch()
    done = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert 0 < len(done) < 6 and done.items() <= whole.items()
    write_shards(split, out, "train", per_shard=2, processes=2)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    assert not list(out.glob("*.part"))


def test_an_index_is_made_once_for_each_state_of_a_shard(tmp_path, monkeypatch):
    path, scans = shard(tmp_path / "a.tar", range(4)), []
    monkeypatch.setattr(shards, "scan", lambda path, scan=scan: scans.append(path) or scan(path))
    for _ in range(2):
        assert len(open_split(path, "train")) == 4
    assert len(scans) == 1 and (tmp_path / "a.tar.index").is_file()
    shard(path, range(7))
    assert len(open_split(path, "train")) == 7 and len(scans) == 2
    whole = (tmp_path / "a.tar.index").read_bytes()
    np.savez(tmp_path / "z.npz", [1])
    for n, damaged in enumerate((whole[:100], b"", whole[:10] + b"(((" + whole[13:], (tmp_path / "z.npz").read_bytes()), 3):
        (tmp_path / "a.tar.index").write_bytes(damaged)
        assert len(open_split(path, "train")) == 7 and len(scans) == n
    scans.clear()
    (tmp_path / "a.tar.index").write_bytes(whole[:-48] + (-5).to_bytes(8, "little", signed=True) + whole[-40:])    # an offset that cannot be
    opened_index.cache_clear()
    assert open_split(path, "train").sample(6)[0] == png(seed=6) and len(scans) == 1
    scans += [0, 0]
    monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.tar.index").unlink()
    (tmp_path / "a.tar.index").mkdir()                                          # cannot be written: as on a disk that is only read
    for _ in range(2):
        assert len(open_split(path, "train")) == 7 and len(scans) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="set CE_CLIP_CACHE to a folder with room"):
        open_split(path, "train")


def forged(path, change):
    """A shard's index, as a stranger may write it."""
    open_split(path, "train")
    index = np.load(f"{path}.index").copy()
    changed = change(index)
    np.save(f"{path}.index", index if changed is None else changed)
    os.rename(f"{path}.index.npy", f"{path}.index")
    opened_index.cache_clear()
    return open_split(path, "train")


def exchange(index):
    index[[2, 3], 2:4] = index[[3, 2], 2:4]


def move(index):
    index[1:-1, 2:4] = index[2:, 2:4]


@pytest.mark.parametrize("change", [exchange, move])
def test_an_index_of_another_shard_never_gives_another_caption(change, tmp_path):
    split = forged(shard(tmp_path / "a.tar", range(4)), change)
    said = set()
    for k in range(4):
        try:
            image, ids, *_ = split.sample(k)
            assert image == png(seed=k) and np.array_equal(ids, split.tokenizer([f"第{k}张"])[0])
        except BadInput as error:
            said.add(re.sub(".*: the caption", "", str(error)))
    assert said == {f" cannot be read ({tmp_path}/a.tar.index has another one; delete that file); replace or remove it"}
    with pytest.raises(BadInput, match="a.tar.index has another one; delete that file"):
        split.texts


def put(rows):
    def change(index):
        for (row, column), number in rows.items():
            index[row, column] = number
    return change


@pytest.mark.parametrize("change", [put({(1, 0): 2**62, (1, 1): 2**62}), put({(2, 0): 100}), put({(2, 3): 2**40}), put({(3, 1): -1, (3, 3): -1}), put({(1, 5): -1}), lambda index: index.astype(">i8"), lambda index: index[:, :5],
                                    lambda index: np.array([{"a": 1}], dtype=object), lambda index: index[0], lambda index: index[:0]])
def test_an_index_that_makes_no_sense_is_made_anew(change, tmp_path):
    split = forged(shard(tmp_path / "a.tar", range(4)), change)
    assert [split.sample(k)[0] for k in range(4)] == [png(seed=k) for k in range(4)] and split.texts == [f"第{k}张" for k in range(4)]


def test_an_index_whose_header_promises_a_billion_rows(tmp_path):
    path = shard(tmp_path / "a.tar", range(4))
    for shape in ((10**9, 6), (-4, 6)):
        with open(f"{path}.index", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<i8", "fortran_order": False, "shape": shape})
            f.write(bytes(480))
        assert len(open_split(path, "train")) == 4


def test_an_index_is_never_written_through_a_link_or_into_a_pipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "cache"))
    path = shard(tmp_path / "a.tar", range(4))
    (tmp_path / "precious").write_text("of the user")
    for make in (lambda file: file.symlink_to(tmp_path / "precious"), lambda file: file.symlink_to(tmp_path / "new"), os.mkfifo):
        make(tmp_path / "a.tar.index")
        for _ in range(2):                                                      # the second finds the index in the cache
            assert len(open_split(path, "train")) == 4
        assert (tmp_path / "precious").read_text() == "of the user" and not (tmp_path / "new").exists() and len(list((tmp_path / "cache/index").iterdir())) == 1
        (tmp_path / "a.tar.index").unlink()
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(BadInput, match="train-000000.tar: not a file that can be read"):
        open_split(tmp_path, "train")


def test_a_sample_that_has_a_name_twice_is_not_guessed_at(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.png", png(seed=1)), ("1.txt", "第1张".encode()), ("1.png", png(seed=9)), ("2.png", png(seed=2)), ("2.txt", "第2张".encode()), ("3.txt", b"a"), ("3.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    split = open_split(tmp_path / "a.tar", "train")
    assert len(split) == 2 and split.incomplete() == 1 and split.sample(1)[0] == png(seed=2)
    with pytest.raises(BadInput, match="the caption cannot be read"):
        split.sample(0)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_lengths_in_all_kinds_of_tar(format, tmp_path):
    """A header holds 100 bytes of a name, split at a folder or cut; the index is checked against it."""
    names = [folder + stem * length for length in (1, 90, 95, 96, 97, 99) for stem in "ab" for folder in ("", "f/", "f/" * 30, "g" * 120 + "/")]
    names += [] if format == tarfile.USTAR_FORMAT else ["长" * 40, "长" * 31 + "/" + "短" * 32, "c" * 240]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for n, name in enumerate(names):
            for ending, content in (("jpeg", png(seed=n)), ("json", json.dumps({"text": f"第{n}张"}).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                try:
                    tar.addfile(member, io.BytesIO(content))
                except ValueError:                                              # too long for ustar
                    break
    split = open_split(tmp_path / "a.tar", "train")
    assert len(split) >= 24 and split.incomplete() < 10
    for k in range(len(split)):
        if split.row(k)[1][3] >= 0:
            assert split.sample(k)[0] == png(seed=int(re.search(r"\d+", split.captions(k)[1][0])[0]))


def test_damaged_shards_are_named_and_what_is_whole_is_used(tmp_path):
    whole = shard(tmp_path / "a.tar", range(6)).read_bytes()
    second = whole.index(b"000002.png")
    for name, content, left in (("cut", whole[: second + 700], 2), ("cut-header", whole[: second + 100], 2), ("broken-header", whole[:second] + b"\xff" * 300 + whole[second + 300 :], 2), ("two-in-one", whole + whole, 6),
                                ("endless", whole[: second + 124] + b"\x80" + b"\x7f" * 11 + whole[second + 136 :], 2)):
        (tmp_path / f"{name}.tar").write_bytes(content)
        for _ in range(2):                                                      # with the index made now, and with the one that is there
            with pytest.warns(UserWarning, match=rf"{name}.tar: damaged or cut short at byte [\d,]+; what comes after is lost \({left} pairs"):
                split = open_split(tmp_path / f"{name}.tar", "train")
        assert len(split) == left
        with pytest.raises(BadInput, match="damaged, so recall would be of a part; replace it"):
            split.texts                                                         # evaluation asks for them
    (tmp_path / "b.tar").write_bytes(gzip.compress(whole))
    write_tar(tmp_path / "c.tar", {"a.cls": b"1"})
    (tmp_path / "d.tar").write_bytes(b"")
    for name, message in (("b", "not an uncompressed tar archive"), ("c", "no images with captions in 1 shards; expected"), ("d", "not an uncompressed tar archive")):
        with pytest.raises(BadInput, match=message):
            open_split(tmp_path / f"{name}.tar", "train")


BAD_SAMPLES = {
    "truncated JPEG": ({"b.jpg": jpeg()[:-400], "b.txt": "坏".encode()}, "the image cannot be read (image file is truncated"),
    "wrong bytes": ({"b.jpg": b"not a image at all", "b.txt": "坏".encode()}, "the image cannot be read (not an image in a format"),
    "empty image": ({"b.jpg": b"", "b.txt": "坏".encode()}, "the image cannot be read (it is empty)"),
    "missing text": ({"b.jpg": jpeg()}, "the caption cannot be read (it is missing)"),
    "missing image": ({"b.txt": "坏".encode()}, "the image cannot be read (it is missing)"),
    "empty text": ({"b.jpg": jpeg(), "b.txt": b" \n"}, "the caption cannot be read (it is empty)"),
    "text that is no UTF-8": ({"b.jpg": jpeg(), "b.txt": b"\xff\xfe"}, "the caption cannot be read ('utf-8' codec can't decode"),
    "texts that is no list": ({"b.jpg": jpeg(), "b.json": json.dumps({"texts": "一只猫"}).encode()}, "the caption cannot be read (it needs \"text\", \"caption\" or a list \"texts\")"),
    "only blank texts": ({"b.jpg": jpeg(), "b.json": json.dumps({"texts": ["", " "]}).encode()}, "the caption cannot be read (it is empty)"),
    "broken JSON": ({"b.jpg": jpeg(), "b.json": b'{"text": '}, "the caption cannot be read (Expecting value"),
    "JSON without a text": ({"b.jpg": jpeg(), "b.json": b'{"width": 3}'}, "the caption cannot be read (it needs \"text\", \"caption\" or a list \"texts\")"),
    "JSON that is no object": ({"b.jpg": jpeg(), "b.json": b"[1]"}, "the caption cannot be read (it needs \"text\", \"caption\" or a list \"texts\")"),
    "deep JSON": ({"b.jpg": jpeg(), "b.json": b"[" * 10**5}, "the caption cannot be read (maximum recursion depth"),
    "too many captions": ({"b.jpg": jpeg(), "b.json": json.dumps({"texts": ["好"] * 10_001}).encode()}, "the caption cannot be read (it has 10,001 captions, more than 10,000"),
    "a huge caption": ({"b.jpg": jpeg(), "b.txt": b"a" * (2**22 + 1)}, "the caption cannot be read (it has more than 4 MiB"),
    "half a character": ({"b.jpg": jpeg(), "b.json": b'{"text": "\\ud800"}'}, "the caption cannot be read ('utf-8' codec can't encode"),
    "decompression bomb": ({"b.png": bomb(), "b.txt": "坏".encode()}, "the image cannot be read (Image size (100000000 pixels) exceeds limit"),
    "larger bomb": ({"b.png": bomb(100_000), "b.txt": "坏".encode()}, "the image cannot be read (Image size (10000000000 pixels) exceeds limit"),
}


@pytest.mark.parametrize("files, message", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_bad_samples_are_replaced_by_the_next_one_and_reported_with_file_and_offset(tmp_path, files, message):
    good = {name: content for i in (1, 2) for name, content in ((f"{i}.png", png(seed=i)), (f"{i}.txt", f"第{i}张".encode()))}
    path = write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(), "0.txt": "好".encode()} | files | good)
    split = open_split(path, "train")
    assert len(split) == 4
    pixels, ids, _, text_keys, bad = next(iter(training_loader(split, 16, [[0, 1, 2, 3]], 0)))
    assert [key for key in text_keys.tolist()] == [sentence_key(text) for text in ("好", "第1张", "第1张", "第2张")] and torch.equal(pixels[1], pixels[2])
    (report,) = bad
    assert report["pair"] == 1 and report["file"] == str(path) and message in report["reason"] and "\n" not in report["reason"]
    name, first = next(iter(files.items()))
    assert report["member"] == name
    assert path.read_bytes()[report["offset"] :].startswith(first)


def test_when_nothing_can_be_read_the_run_stops(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" for i in range(3)})
    with pytest.raises(BadInput, match="100 pairs in a row cannot be read; the first: .*a.tar, offset 512: the caption cannot be read .it is missing."):
        next(iter(training_loader(open_split(path, "train"), 16, [[0]], 0)))


def test_shard_order_takes_every_pair_once_and_reads_nearly_from_front_to_back():
    counts = np.array([1000, 20, 0, 3000, 1] + [1000] * 60)
    n, starts = counts.sum(), np.cumsum(counts) - counts
    epochs = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = ShardOrder(counts, seed, epoch)
        pairs = np.array([order[place] for place in range(n)])
        assert np.array_equal(np.sort(pairs), np.arange(n)) and np.array_equal([ShardOrder(counts, seed, epoch)[p] for p in (0, 5000, n - 1)], pairs[[0, 5000, n - 1]])
        shards = np.searchsorted(starts, pairs, side="right") - 1
        for a in range(0, n - 2000, 500):                                       # what 2,000 pairs in a row touch: a few stretches of files
            here = shards[a : a + 2000]
            assert len(set(here)) <= 2 * ShardOrder.TOGETHER
        for s in (0, 3, 30):                                                    # each shard is read forwards: a pair never comes more than a window's stretch too early
            rows = (pairs - starts[s])[shards == s]
            lag = np.maximum.accumulate(rows) - rows
            assert lag.max() < 0.8 * counts[s] and np.corrcoef(np.arange(len(rows)), rows)[0, 1] > 0.5
        epochs.append(pairs)
    assert all((a != b).mean() > 0.99 for a, b in ((epochs[0], epochs[1]), (epochs[0], epochs[2])))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_sample_of_the_shards_once_per_epoch_also_across_a_stop(tmp_path, seed):
    """The shares of 2 processes with 4 readers each, in runs that begin anew at step 3 of 10 an epoch. (CE_CLIP_SAMPLES=10000: with so many samples.)"""
    n = int(os.environ.get("CE_CLIP_SAMPLES", 600)) // 60 * 60
    for s in range(6):
        shard(tmp_path / f"{s}.tar", range(s * n // 6, (s + 1) * n // 6))
    split, keys = open_split(f"{tmp_path}/{{0..5}}.tar", "train"), []
    for rank in range(2):
        for first, last in ((0, 3), (3, n // 60)):
            loader = training_loader(split, 16, Batches(split, 60, seed, first, last, rank, 2, micro_batch=14), 4)
            keys += [key for batch in loader for key in batch[3].tolist()]
    assert sorted(keys) == sorted(sentence_key(f"第{i}张") for i in range(n))


# ---------------------------------------------------------------------------------------------------------------- images


def test_images_are_seen_as_a_person_sees_them():
    """Turned as EXIF says; black on transparent is black on white; 16-bit grey keeps its shades; bilevel, palette, CMYK are converted."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
    exif = upright.getexif()
    exif[0x0112] = 6                                                            # "turn by 90 degrees to see it upright"
    file = io.BytesIO()
    upright.rotate(90, expand=True).save(file, "PNG", exif=exif)
    assert np.array_equal(np.array(to_rgb(Image.open(file))), np.array(upright))
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (4, 4), 0)
        clear.paste(Image.new(mode, (2, 4), (0, 0, 0, 255) if mode == "RGBA" else (0, 255)))
        assert np.array(to_rgb(clear))[0, :, 0].tolist() == [0, 0, 255, 255]
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.array(to_rgb(grey))[0, :, 0].tolist() == [0, 100, 255]
    assert all(to_rgb(upright.convert(mode)).mode == "RGB" for mode in ("1", "L", "P", "CMYK", "YCbCr"))


def test_palette_images_become_rgb_before_they_are_resized():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert("P")
    assert torch.equal(to_uint8(colours, 24), to_uint8(colours.convert("RGB"), 24))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_postscript_program_is_no_image_and_is_run_by_no_reader(tmp_path, monkeypatch, called, stopped):
    """A `gs` on PATH that leaves a mark stands for Ghostscript, which Pillow starts for EPS."""
    mark, word = tmp_path / "mark", "not an image in a format that is read"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)                      # it remembers a search
    with pytest.raises(OSError):
        Image.open(io.BytesIO(EPS)).load()
    mark.unlink()                                                               # so the mark works
    checkpoint.save(tmp_path / "tiny.pt", CLIP(CONFIGS["tiny"]))
    rows = [(f"{split}{name}", f"{split}，{name}", split) for split in ("train", "test") for name in ("a.png", "b.png", "x.jpg", "x.png", "x.tif")]
    own = tmp_path / "own"
    write_folder(own, rows, columns="image,caption,split")
    for path in own.glob("*x.*"):
        path.write_bytes(EPS)
    ckpt = "--ckpt", tmp_path / "tiny.pt", "--workers", 0

    assert word in stopped(evaluate, "--data", own, *ckpt)
    assert not check(str(own), "data", 1, None) and not check(str(own), "data", 2, None)
    called(search, "猫", "--images", own, *ckpt)
    assert word in stopped(search, "--image", own / "trainx.jpg", "--images", own, *ckpt)
    split = open_split(own, "train")
    for data_set in (split, write_shards(split, tmp_path / "shards", "train") or open_split(tmp_path / "shards", "train")):
        for workers in (0, 1):
            *_, bad = next(iter(training_loader(data_set, 32, [range(5)], workers)))
            assert len({report["pair"] for report in bad}) == 3 and all(word in report["reason"] for report in bad)
    assert word in stopped(evaluate, "--data", tmp_path / "shards/train-000000.tar", *ckpt)
    for path in own.glob("test*"):
        for name in "猫狗":
            (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "classes" / name / path.name).write_bytes(path.read_bytes())
    assert word in stopped(classify, tmp_path / "classes", *ckpt)
    called(prepare, "convert", own, tmp_path / "converted")                     # bytes that it does not open
    with pytest.raises(SystemExit):
        called(prepare, "check", tmp_path / "converted")
    for name in ("a", "b"):
        (own / f"test{name}.png").write_bytes(EPS)
    assert word in stopped(prepare, "sheet", own, tmp_path / "sheet.png")
    assert not mark.exists()


def test_the_formats_that_are_read_are_named():
    for kind in support_images.FORMATS:                                         # Image.open takes names that it knows alone
        assert kind in (Image.init(), Image.OPEN)[1]
        assert decoded(lambda: saved(PLAIN, kind), "it").mode == "RGB"
    assert decoded(lambda: saved(PLAIN, "MPO", save_all=True, append_images=[PLAIN]), "it").size == (70, 50)
    for kind in ("EPS", "ICNS", "PCX", "SGI", "IM", "SPIDER", "PDF"):
        with pytest.raises(BadInput, match="not an image in a format that is read: JPEG, PNG, WebP"):
            decoded(lambda: saved(PLAIN.convert("F") if kind == "SPIDER" else PLAIN, kind), "it")


def test_large_greys_and_transparent_images_are_converted_with_little_memory_to_the_same_pixels():
    """All 16-bit values, those of mode I that are cut off, every colour with every opacity: against what needs several times as much memory."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wide = np.array([[-(2**31), -1, 0, 256, 257, 65535, 65536, 2**31 - 1], range(1000, 65536, 8192)], dtype=np.int32)
    for image, grey in ((Image.fromarray(values), values), (Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes()), values),
                        (Image.frombytes("I;16L", (256, 256), values.astype("<u2").tobytes()), values), (Image.fromarray(wide), wide)):
        assert image.mode.startswith("I") and np.array_equal(np.array(to_rgb(image))[..., 0], grey.astype(np.int64).clip(0, 65535) // 257)
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    image = Image.fromarray(np.stack([colour, 255 - colour, colour ^ alpha, alpha], axis=2))
    for image in (image, image.convert("LA"), image.convert("P")):
        exact = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        assert np.array_equal(np.array(to_rgb(image)), np.array(exact))


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path):
    where = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("x", dir_fd=where)
        deeper = os.open("x", os.O_RDONLY, dir_fd=where)
        os.close(where)
        where = deeper
    with os.fdopen(os.open("a.png", os.O_CREAT | os.O_WRONLY, dir_fd=where), "wb") as f:
        f.write(png())
    os.close(where)
    assert support_images.image_files(tmp_path) == (["x/" * 1500 + "a.png"], {})
    remove_folder(tmp_path / "x")                                               # pytest would recurse


def chunks_added(encoded, kind, content):
    """A PNG with one more chunk, after its header."""
    return encoded[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) + encoded[33:]


def test_what_takes_far_more_time_or_words_than_its_size_is_refused_or_silent():
    """A JPEG of 244 kB whose scans pass over its pixels 20,000 times (12 s); EXIF with 40,000 tags, for each of which Pillow warns."""
    image = saved(photo(64, 48), progressive=True)
    last = image[image.rindex(b"\xff\xda") : -2]
    colours = saved(Image.new("RGB", (64, 48)))
    empty = b"".join(b"\xff\xda\0\x08\1" + bytes([1 + k % 3, 17 * (k % 3 > 0), 0, 63, 0]) for k in range(300))
    for encoded in (image[:-2] + 300 * last + image[-2:], colours[: colours.index(b"\xff\xda")] + empty + b"\xff\xd9"):
        for read in (lambda: decoded(lambda: encoded, "a.jpg"), lambda: training_pixels(encoded, 16, "a.jpg")):
            with pytest.raises(BadInput, match="a.jpg cannot be read .a JPEG with more than 200 scans.; replace"):
                read()
    assert decoded(lambda: image[:-2] + 20 * last + image[-2:], "a.jpg").size == (64, 48)
    yellow = saved(Image.new("RGB", (20, 20), (255, 218, 0)), "PPM")            # the bytes that begin a scan, 400 times
    assert decoded(lambda: yellow, "a.ppm").getpixel((9, 9)) == (255, 218, 0)
    for size in ((1, 70_000), (70_000, 1)):                                     # resizing a line of 80 million pixels would take 72 GB
        for read in (lambda: decoded(lambda: png(size=size), "a.png"), lambda: training_pixels(png(size=size), 16, "a.png")):
            with pytest.raises(BadInput, match="a side has more than 65,535 pixels"):
                read()
    tags = b"".join(struct.pack("<HHII", 1000 + n, 7, 500, 8) for n in range(100))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert decoded(lambda: chunks_added(png(), b"eXIf", b"II*\0" + struct.pack("<IH", 8, 100) + tags + bytes(4)), "it").size == (20, 12)
    assert seen == []


@pytest.mark.slow
@pytest.mark.parametrize("depth, colours, most", [(16, 0, 800), (8, 6, 1000), (8, 3, 1000)], ids=["16-bit grey", "transparent", "palette"])
def test_an_image_of_88_million_pixels_needs_at_most_12_bytes_for_each(tmp_path, depth, colours, most):
    """Its file has some 100 kB. Before: 1,523, 1,349 and 1,096 MiB."""
    side, row = 9400, 1 + 9400 * {0: 2, 6: 4, 3: 1}[colours]
    encoded = bomb().replace(bomb()[8:33], b"")[:8]
    palette = b"" if colours != 3 else bytes(768)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0)), (b"PLTE", palette), (b"tRNS", palette[:256]),
             (b"IDAT", zlib.compress(bytes(row * side))), (b"IEND", b"")]
    for kind, content in parts:
        if content or kind == b"IEND":
            encoded += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    (tmp_path / "a.png").write_bytes(encoded)
    code = """if True:
        import sys
        from support.images import decoded
        peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        before = peak()
        decoded(open(sys.argv[1], "rb").read, "it")
        print((peak() - before) // 1024)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < most, done.stderr


# ---------------------------------------------------------------------------------------------------------------- pixels of training


def photo(width, height, detail=True):
    """A image with soft shapes and, in equal parts, every finer structure; without `detail` the soft shapes alone."""
    rng, layers = np.random.default_rng(width), [(1.0, 4), (0.4, 12), (0.2, 40), (0.1, 150)] if detail else [(1.0, 4)]
    noise = lambda cells: Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(sum(share * np.asarray(noise(cells), dtype=float) / sum(share for share, _ in layers) for share, cells in layers).astype(np.uint8))


def saved(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image):
    """Its JPEG, stored lying on its side, with the EXIF tag that says so."""
    exif = image.getexif()
    exif[0x0112] = 6
    return saved(image.rotate(90, expand=True), quality=90, exif=exif)


def apart(encoded, size):
    """By how much the pixels of training differ from those of evaluation: at most, on average."""
    ours, exact = training_pixels(encoded, size, "it"), to_uint8(decoded(lambda: encoded, "it"), size)
    assert ours.shape == (3, size, size) and ours.dtype == torch.uint8 and ours.is_contiguous()
    difference = (ours.int() - exact.int()).abs()
    return difference.max().item(), difference.float().mean().item()


JPEGS = {"RGB": saved(photo(250, 187), quality=90), "grey": saved(photo(200, 230).convert("L")), "progressive": saved(photo(121, 77), progressive=True),
         "4:4:4": saved(photo(99, 45), subsampling=0), "a line": saved(photo(200, 1)), "a dot": saved(photo(1, 1))}


@pytest.mark.parametrize("encoded", JPEGS.values(), ids=JPEGS)
def test_jpegs_train_on_what_pillow_sees_but_for_rounding(encoded, monkeypatch):
    fast = jpeg_pixels(encoded)
    assert fast is not None                                                     # else torchvision has no decoder of JPEGs any more: then training is right, but reads at a third of the speed
    assert np.array_equal(fast.permute(1, 2, 0).numpy(), np.array(decoded(lambda: encoded, "it")))
    monkeypatch.setattr(Image.Image, "resize", None) if torch.backends.cpu.get_cpu_capability().startswith("AVX") else None
    ours = training_pixels(encoded, 112, "it")                             # without Pillow's resize
    monkeypatch.undo()
    most, mean = apart(encoded, 112)
    assert most <= 3 and mean < 0.03 and torch.equal(ours, training_pixels(encoded, 112, "it"))


@pytest.mark.parametrize("encode", [lambda p: saved(p, quality=90), lambda p: saved(p.convert("L")), lambda p: saved(p.convert("CMYK"), quality=90), turned],
                         ids=["RGB", "grey", "CMYK", "turned"])
def test_a_jpeg_much_larger_than_needed_is_decoded_at_a_reduced_scale_and_looks_the_same(encode, monkeypatch):
    seen = []
    monkeypatch.setattr(support_images, "resized", lambda pixels, size, resized=resized: seen.append(tuple(pixels.shape[1:])) or resized(pixels, size))
    for detail, most, mean in ((False, 4, 0.6), (True, 9, 1.0)):                # measured: 3 and 0.40, 7 and 0.79; of sizes that can be halved twice 2 and 0.21, 1 and 0.24
        found = apart(encode(photo(900, 650, detail)), 80)
        assert found[0] <= most and found[1] <= mean, found
    assert seen == [(163, 225)] * 2                                             # a quarter: an eighth would be less than twice 80


def test_a_reduced_scale_leaves_twice_what_is_needed(monkeypatch):
    seen = []
    monkeypatch.setattr(support_images, "resized", lambda pixels, size: seen.append(tuple(pixels.shape[1:])))
    for width, height, size in ((319, 500, 80), (320, 320, 80), (639, 2000, 80), (1280, 1300, 80), (3000, 40, 16), (2000, 1, 16)):
        training_pixels(saved(Image.new("RGB", (width, height))), size, "it")
        reduced = seen[-1] != (height, width)
        assert reduced == (min(width, height) >= 4 * size) and (not reduced or min(seen[-1]) >= 2 * size), seen


PLAIN = photo(70, 50)
OTHERS = {
    "PNG": saved(PLAIN, "PNG"), "large PNG": saved(photo(400, 300), "PNG"), "WebP": saved(PLAIN, "WEBP"), "bilevel": saved(PLAIN.convert("1"), "PNG"),
    "palette": saved(PLAIN.convert("P"), "PNG"), "transparent palette": saved(PLAIN.convert("P"), "GIF", transparency=3),
    "transparent": saved(Image.merge("RGBA", (*PLAIN.split(), PLAIN.split()[0])), "PNG"),
    "16-bit grey": saved(Image.fromarray(np.arange(0, 64000, 40, dtype=np.uint16).reshape(40, 40)), "PNG"),
    "CMYK JPEG": saved(PLAIN.convert("CMYK")), "turned JPEG": turned(PLAIN),
}


@pytest.mark.parametrize("encoded", OTHERS.values(), ids=OTHERS)
def test_images_that_are_no_upright_rgb_or_grey_jpegs_train_on_what_pillow_sees_but_for_rounding(encoded, monkeypatch):
    most, mean = apart(encoded, 48)
    assert most <= 2 and mean < 0.2
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")                # then Pillow resizes it, too
    assert apart(encoded, 48) == (0, 0)


@pytest.mark.parametrize("missing", ["no torchvision", "no library", "a library that does not load", "no operator"])
def test_training_needs_neither_torchvisions_decoder_nor_avx2(missing, monkeypatch):
    spec = {"no torchvision": None, "no library": type("Spec", (), {"submodule_search_locations": [os.devnull]})}
    if missing in spec:
        monkeypatch.setattr(support_images.importlib.util, "find_spec", lambda _: spec[missing])
    elif missing == "no operator":
        monkeypatch.setattr(torch.ops, "image", None)
    else:
        monkeypatch.setattr(torch.ops, "load_library", lambda path: (_ for _ in ()).throw(OSError("undefined symbol")))
    monkeypatch.setattr(support_images, "jpeg_decoder", jpeg_decoder.__wrapped__)
    assert jpeg_pixels(JPEGS["RGB"]) is None and apart(JPEGS["RGB"], 112)[0] <= 3
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert jpeg_pixels(JPEGS["RGB"]) is not None and apart(JPEGS["RGB"], 112) == (0, 0)


def test_the_decoder_warns_of_nothing_and_costs_no_import_of_torchvision(monkeypatch):
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)              # another test may need it
    monkeypatch.setattr(support_images, "jpeg_decoder", jpeg_decoder.__wrapped__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jpeg_pixels(jpeg()).shape == (3, 30, 40) and "torchvision" not in sys.modules


@pytest.mark.parametrize("size", [64, 16], ids=["whole", "reduced"])
def test_training_refuses_the_same_files_as_evaluation_in_the_same_words(size):
    """Cut anywhere, with wrong bytes anywhere, and what is no image: what one way refuses the other does, and what passes looks the same."""
    rng, whole = random.Random(0), [saved(photo(130, 96), quality=75), saved(photo(97, 70).convert("L"), progressive=True)]
    huge = whole[0].replace((96).to_bytes(2, "big") + (130).to_bytes(2, "big"), (20_000).to_bytes(2, "big") * 2)       # a header that says 20,000 x 20,000
    files, refused = [b"", b"no image", bomb(), huge, *(file[:n] for file in whole for n in range(0, len(file), 61))], 0
    for n in range(120):
        file = bytearray(whole[n % 2])
        for place in rng.sample(range(2, len(file)), 2):
            file[place] = rng.randrange(256)
        files.append(bytes(file))
    for file in files:
        try:
            image = to_uint8(decoded(lambda: file, "a.jpg"), size)
        except BadInput as error:
            refused += 1
            with pytest.raises(BadInput) as caught:
                training_pixels(file, size, "a.jpg")
            assert str(caught.value) == str(error)
        else:
            difference = (training_pixels(file, size, "a.jpg").int() - image.int()).abs().float().mean()
            assert difference < 1 or size == 16                                 # wild coefficients, of a image that is none any more, are cut off elsewhere at another scale
    assert len(files) - 110 < refused < len(files)


# ---------------------------------------------------------------------------------------------------------------- augmentation


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


def test_real_images(real_data):
    """The counts of the real set, and that every image decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, images, captions in (("train", 1572, 2918), ("valid", 300, 549), ("test", 1272, 2369), ("unseen", 277, 523)):
            split = open_split(real_data, name)
            assert (len(split.image_ids), len(split.texts)) == (images, captions)
            assert {split.image(i).size for i in range(images)} == {(64, 64)}


def test_the_older_command_line_says_where_it_went():
    done = subprocess.run([sys.executable, "data.py", "check", "nowhere"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "python -m tools.prepare" in done.stderr
