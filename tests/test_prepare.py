"""Getting the data: fetched whole or not at all, no archive can write outside of its folder, conversions that lose nothing, and a look through that finds what is wrong."""
import base64
import errno
import gzip
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, bomb, jpeg, png, refused, script, write_tar, write_tsv_split
from PIL import Image

import data
from data import open_split
from support import painter, system
from support.shard_writer import write_shards
from support.system import BadInput, filled_beside, remove_folder
from support.tables import TABLE_1
from tools import check, landscapes, prepare, releases
from tools.check import BLIND, BROKEN, CLOSED, EMPTY, LEAKED, LONG, SHARED, SILENT, SIMILAR, TWICE, UNKNOWN


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def relation(split):
    """What a split says, apart from the numbers of its images: captions in order, each with the bytes of its images."""
    return [(text, [split.image_bytes(i) for i in images]) for text, images in zip(split.texts, split.positives)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "sync", lambda: None)


# ---------------------------------------------------------------------------------------------------------------- fetch


@pytest.fixture
def published(hub, tmp_path):
    """The hub with COCO-CN.zip, a tenth of a percent of it -> (hub, publish, the files as they must be unpacked)."""
    for split, count, start in (("train", 5, 1), ("valid", 3, 101), ("test", 2, 201)):
        write_tsv_split(tmp_path / "made", split, count, start=start)
    files = contents(tmp_path / "made")

    def publish(entries, damage=lambda content: content):
        hub.file, hub.content = "COCO-CN.zip", damage(write_zip(tmp_path / "made.zip", entries).read_bytes())
    publish({f"COCO-CN/{name}": content for name, content in files.items()})
    return SimpleNamespace(hub=hub, publish=publish, files=files, root=tmp_path / "data", folder=tmp_path / "data/COCO-CN", hub_cache=tmp_path / "hub")


def left(root):
    """What lies in a folder; a lock, which is empty, may stay."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock")) if root.exists() else []


def test_a_published_set_is_fetched_and_told_beside_table_1(published, called, tmp_path):
    said = called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == published.files and left(published.root) == ["COCO-CN"]
    assert published.hub.asked[0][1] == "/datasets/OFA-Sys/chinese-clip-eval/resolve/main/COCO-CN.zip"
    first, *counts, last = said.splitlines()
    zip_file = first.partition("unpacked. ")[2].removesuffix(" is no longer needed")
    assert (tmp_path / "hub") in Path(zip_file).parents and os.path.getsize(zip_file) == len(published.hub.content)
    assert counts[0] == "train           5 images        5 captions        5 pairs; the paper's table 1 has 22,980"
    assert last == (f"Next: python -m tools.prepare check coco-cn --data-root {published.root}; "
                    f"then python train.py --recipe coco-cn-base --micro-batch 256 --data-root {published.root}")
    asked = len(published.hub.asked)
    assert "is there already" in called(prepare, "fetch", "coco-cn", "--data-root", published.root) and len(published.hub.asked) == asked


def test_what_cannot_be_downloaded_can_be_put_in_place_by_hand(published, called, stopped):
    published.hub.file = "another.zip"
    line = stopped(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert re.search("chinese-clip-eval/COCO-CN.zip: cannot be downloaded .*404 Not Found.*HF_ENDPOINT names a mirror.*put it at .*data/COCO-CN.zip. From the original release", line)
    assert left(published.root) == []
    asked = len(published.hub.asked)
    files = {"README": b"r", "__MACOSX/._train_imgs.tsv": b"x", "._train_imgs.tsv": b"x", **published.files}
    write_zip(published.root / "COCO-CN.zip", files)                            # without a top folder, too
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == files and len(published.hub.asked) == asked
    assert data.split_names(published.folder) == ["train", "valid", "test"]


def test_names_that_are_not_utf8(published, called):
    published.publish({"COCO-CN/" + name: content for name, content in published.files.items()} | {"COCO-CN/xxxx": b"gb"},
                      lambda content: content.replace(b"COCO-CN/xxxx", b"COCO-CN/\xc4\xe3\xba\xc3"))
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert set(contents(published.folder)) > set(published.files)


def as_link(name="COCO-CN/link"):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


OUTSIDE = ["../evil", "COCO-CN/../../evil", "/evil", "C:/evil", "C:\\evil", "..\\evil", "\\evil"]


TOO_LONG, OTHER, TWICE_THERE = "has over 64 folders or 255 bytes in one", "leads out, or is a link or device", r"File exists|Not a directory"


@pytest.mark.parametrize("name, message", [*((name, OTHER) for name in OUTSIDE), (as_link(), OTHER), (as_link("/tmp/link"), OTHER), ("a/" * 64 + "x", TOO_LONG), ("长" * 100 + "/" + "a" * 200, TOO_LONG),
                                           *((name, TWICE_THERE) for name in ("COCO-CN/train_imgs.tsv", "COCO-CN/./train_imgs.tsv", "COCO-CN", "COCO-CN/test_imgs.tsv/x"))], ids=str)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_an_entry_that_is_not_safe_is_refused(name, message, published, stopped, tmp_path):
    files = [*((f"COCO-CN/{file}", content) for file, content in published.files.items()), (name, b"/etc/passwd")]
    published.publish(SimpleNamespace(items=lambda: files))                     # a name may come twice
    line = stopped(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert re.search(f"COCO-CN.zip: damaged, encrypted or not safe .*{message}.*. Delete .* and run this again", line) and left(published.root) == []


def test_names_that_look_odd_and_are_not(published, called):
    """As macOS, git and old programs make them; a letter and a colon; a backslash that leads nowhere."""
    more = {"__MACOSX/COCO-CN/._test_imgs.tsv": b"\0", "COCO-CN/T:恤.txt": b"a", "COCO-CN/a\\b.txt": b"b", "COCO-CN/..txt": b"c", "COCO-CN/...": b"d", "COCO-CN/empty/": b""}
    published.publish({**{f"COCO-CN/{file}": content for file, content in published.files.items()}, **more})
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == {**published.files, "T:恤.txt": b"a", "a\\b.txt": b"b", "..txt": b"c", "...": b"d"}


@pytest.mark.parametrize("name, kind, message", [*(("x", getattr(tarfile, kind), OTHER) for kind in ("SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE")), *((name, tarfile.REGTYPE, OTHER) for name in OUTSIDE),
                                                 ("a/" * 100, tarfile.DIRTYPE, TOO_LONG), ("a" * 300, tarfile.REGTYPE, TOO_LONG), ("x", tarfile.REGTYPE, TWICE_THERE), ("x/y", tarfile.REGTYPE, TWICE_THERE),
                                                 ("sparse", tarfile.GNUTYPE_SPARSE, "a header is of a sparse file")])
def test_a_tar_with_an_entry_that_is_not_safe_is_refused(name, kind, message, tmp_path, stopped):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
        tar.addfile(entry)
    line = stopped(prepare, "convert", tmp_path / "evil.tgz", tmp_path / "out", "--images", tmp_path)
    assert re.search(message, line) and not (tmp_path.parent / "evil").exists() and left(tmp_path) == ["evil.tgz"]


def packed_bytes(kind, files):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_before_anything_is_written_the_whole_archive_is_looked_at(kind, tmp_path, monkeypatch):
    """More bytes than the disk has room for; too many entries: nothing of the sound first entry is there."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed_bytes(kind, {"first": b"1", "bomb": bytes(2**20)}))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=f"a.{kind} unpacks to more than there is room for"):
        releases.unpack(path, tmp_path / "out", "Get it again")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20 + 1))
    monkeypatch.setattr(releases, "MOST_ENTRIES", 1)
    with pytest.raises(BadInput, match="it has more than 1 entries.. Get it again"):
        releases.unpack(path, tmp_path / "out", "Get it again")
    assert left(tmp_path / "out") == []
    monkeypatch.setattr(releases, "MOST_ENTRIES", 2)
    releases.unpack(path, tmp_path / "out", "Get it again")
    assert left(tmp_path / "out") == ["bomb", "first"]


def test_sizes_that_lie(tmp_path):
    """An entry of a zip yields no more than it declares; a .tgz that goes on after its end is not read to the end of memory."""
    (tmp_path / "out").mkdir()
    content = packed_bytes("zip", {"a": bytes(2**20)})
    at = content.index(b"PK\1\2") + 24
    (tmp_path / "a.zip").write_bytes(content[:at] + (100).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(BadInput, match="damaged, encrypted or not safe .*CRC"):
        releases.unpack(tmp_path / "a.zip", tmp_path / "out", "Get it again")
    zeros = gzip.compress(bytes(2**26))
    (tmp_path / "b.tgz").write_bytes(packed_bytes("tgz", {"a": b"1"}) + zeros * 5)
    tracemalloc.start()
    with pytest.raises(BadInput, match="after its end there is more"):
        releases.unpack(tmp_path / "b.tgz", tmp_path / "out", "Get it again")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def tar_header(kind, size, name="x"):
    """A header, whose size may be a number that none should have."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136], header[156:157], header[148:156] = tarfile.itn(size, 12, tarfile.GNU_FORMAT), kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


PAX = lambda record: tar_header(b"x", len(record)) + record.ljust(512, b"\0")
HEADERS = {**{f"{name} of {size:,}": tar_header(kind, size) for name, kind in (("long name", b"L"), ("long link", b"K"), ("pax", b"x"), ("Solaris", b"X"), ("global", b"g")) for size in (2**31, -512)},
           "file of -512": tar_header(b"0", -512), "file of 2^60": tar_header(b"0", 2**60), "pax size of -1536": PAX(b"14 size=-1536\n") + tar_header(b"0", 0), "pax size of 2^60": PAX(b"28 size=1152921504606846976\n") + tar_header(b"0", 0),
           "chain": (tar_header(b"L", 2) + b"a\0".ljust(512, b"\0")) * 2000, "pax of no length": PAX(b"0 a=b\n"), "sparse in pax": PAX(b"22 GNU.sparse.major=1\n") + tar_header(b"0", 0)}


@pytest.mark.parametrize("name", HEADERS)
def test_senseless_headers_of_a_tar(name, tmp_path):
    """They cost no memory and no time; a shard is read up to them."""
    (tmp_path / "out").mkdir()
    files = {"1.png": png(seed=1), "1.txt": "第一张".encode()}
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    sound = whole[: sum(512 + -(-len(content) // 512) * 512 for content in files.values())]
    for content, left_over in ((sound + HEADERS[name], 1), (HEADERS[name] + whole, 0)):
        (tmp_path / "a.tar").write_bytes(content + bytes(2**16))
        with pytest.raises(BadInput, match="a.tar: damaged, encrypted or not safe"):
            releases.unpack(tmp_path / "a.tar", tmp_path / "out", "Get it again")
        if left_over:
            with pytest.warns(UserWarning, match="damaged or cut short at byte"):
                assert open_split(tmp_path / "a.tar", "train").sample(0)[0] == files["1.png"]
        else:
            with pytest.raises(BadInput, match="not an uncompressed tar archive"):
                open_split(tmp_path / "a.tar", "train")
    assert left(tmp_path / "out") == []


def test_headers_that_are_odd_and_sound(tmp_path):
    """A global header (git), long names of both kinds, a pax header with much in it, one that tarfile would search for hours."""
    for kind, format in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=format, pax_headers={"comment": "0" * 40}) as tar:
            entry = tarfile.TarInfo("长" * 60 + "/" + "b" * 150)
            entry.size, entry.pax_headers = 3, {"SCHILY.xattr.a": "=" * 500_000, "mtime": "1.5", "LIBARCHIVE.xattr." + "x" * 200: "1" * 200_000}
            tar.addfile(entry, io.BytesIO(b"abc"))
        (tmp_path / kind).mkdir()
        releases.unpack(tmp_path / f"{kind}.tar", tmp_path / kind, "Get it again")
        assert contents(tmp_path / kind) == {"长" * 60 + "/" + "b" * 150: b"abc"}


def test_a_text_file_of_one_line_without_an_end(tmp_path):
    with open(tmp_path / "a.txt", "wb") as f:
        f.write(b"short\n")
        f.truncate(2**26 + 6)
    with pytest.raises(BadInput, match="a.txt, line 2: longer than 64 MiB"):
        list(system.utf8_lines(tmp_path / "a.txt"))


@pytest.fixture
def nested():
    """A function that makes a folder with 1,100 folders in one another. They are removed, because pytest cannot."""
    made = []

    def make(folder):
        made.append(folder)
        for depth in range(100, 1101, 100):
            os.makedirs(folder / ("a/" * depth), exist_ok=True)
    yield make
    for folder in made:
        if folder.exists():
            remove_folder(folder)


def test_folders_nested_by_the_thousand_are_one_line(nested, tmp_path, image_folder, called):
    nested(tmp_path / "release")
    try:
        called(prepare, "convert", tmp_path / "release", tmp_path / "out", "--images", image_folder)
    except BadInput as error:                                                   # from Python 3.13 on rglob does not recurse
        assert "neither the original COCO-CN" in str(error)
    except RecursionError as error:
        assert system.error_line(error).startswith("folders or brackets are nested too deeply")
    assert left(tmp_path) == ["images", "release"]


def test_what_was_left_is_removed_however_deep_it_is(nested, tmp_path, published, called):
    """1,100 folders in one another, as an archive could once make them; a folder without permission; a link, whose target stays."""
    part = published.root / "COCO-CN.ce-clip-part"
    nested(part)
    (part / "b/c").mkdir(parents=True)
    (part / "link").symlink_to(tmp_path / "made")
    os.chmod(part / "b", 0)
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == contents(tmp_path / "made") == published.files and left(published.root) == ["COCO-CN"]


def test_encrypted_entries_are_refused(published, stopped):
    def encrypt(content):
        content, at = bytearray(content), content.index(b"PK\x01\x02")
        content[at + 8] |= 1
        return bytes(content)
    published.publish({f"COCO-CN/{name}": content for name, content in published.files.items()}, encrypt)
    assert "is encrypted" in stopped(prepare, "fetch", "coco-cn", "--data-root", published.root) and left(published.root) == []


def flip(content):
    """One bit of the first file's content: its CRC does not fit."""
    content = bytearray(content)
    content[200] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: content[: len(content) // 2], flip, lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03", 1), lambda _: b"<html>"],
                         ids=["end cut", "half", "CRC", "directory", "no zip"])
def test_a_damaged_zip_says_what_to_do_and_leaves_nothing(damage, published, stopped, called):
    whole = published.hub.content
    published.publish({f"COCO-CN/{name}": content for name, content in published.files.items()}, damage)
    line = stopped(prepare, "fetch", "coco-cn", "--data-root", published.root)
    found = re.search("COCO-CN.zip: damaged, encrypted or not safe .*. Delete (.*) and run this again", line)
    assert found and left(published.root) == []
    os.unlink(found[1])
    published.hub.content = whole
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == published.files


def test_no_byte_that_is_changed_makes_it_crash(published, tmp_path):
    """At every fifth place of a small zip, and of the first header of a tar: unpacked, or refused with one line, and nothing left."""
    small = write_zip(tmp_path / "a.zip", {"a/x.txt": b"1" * 50, "a/y.txt": b"2"}).read_bytes()
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(tmp_path / "made", "made")
    outcomes = set()
    for name, content in (("a.zip", small), ("b.tar", (tmp_path / "b.tar").read_bytes())):
        for at in range(0, min(len(content), 700), 5):
            (tmp_path / name).write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
            try:
                with filled_beside(tmp_path / "out") as part:
                    releases.unpack(tmp_path / name, part, "Get it again")
                outcomes.add("unpacked")
            except BadInput as error:
                outcomes.add("refused")
                assert "\n" not in str(error)
            assert not (tmp_path / "out.ce-clip-part").exists()
    assert outcomes == {"unpacked", "refused"}


def test_a_full_disk_and_forbidden_folders_are_one_line(published, stopped, monkeypatch):
    fetch = prepare, "fetch", "coco-cn", "--data-root", published.root

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(releases.shutil, "copyfileobj", full)
        assert re.search("COCO-CN: cannot be made .*No space left.*is there room", stopped(*fetch))
    assert left(published.root) == []
    (published.root / "COCO-CN.ce-clip-part").write_bytes(b"")
    assert "COCO-CN: cannot be made" in stopped(*fetch)


KILLED = """import os, sys, pathlib
from tools import prepare
def rename(self, target, real=pathlib.Path.rename):
    print("ready", flush=True)
    sys.stdin.read()                # until it is killed, or told to go on
    return real(self, target)
pathlib.Path.rename = rename
prepare.fetch("coco-cn", sys.argv[1])"""


def fetching(root):
    """A process that fetches, and waits before the folder gets its name."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, root], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_before_it_is_renamed_it_starts_again(published, called):
    process = fetching(published.root)
    process.kill()
    process.wait()
    assert left(published.root) == ["COCO-CN.ce-clip-part"]
    (published.root / "COCO-CN.ce-clip-part/COCO-CN/old").write_text("of a killed run")
    called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert contents(published.folder) == published.files and left(published.root) == ["COCO-CN"]


def test_a_second_process_waits_and_does_not_unpack_again(published, called, monkeypatch):
    process = fetching(published.root)
    threading.Timer(0.3, process.stdin.close).start()                           # then it goes on
    monkeypatch.setattr(prepare, "unpack", lambda *_: pytest.fail("it unpacked again"))
    said = called(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert process.wait() == 0 and contents(published.folder) == published.files and "is there already" in said


def test_what_is_no_data_set(published, stopped):
    published.publish({"COCO-CN/readme.txt": b"x"})
    assert "0 of its folders have *_imgs.tsv" in stopped(prepare, "fetch", "coco-cn", "--data-root", published.root)
    published.publish({"COCO-CN/train_imgs.tsv": b"x"})
    shutil.rmtree(published.hub_cache)
    line = stopped(prepare, "fetch", "coco-cn", "--data-root", published.root)
    assert re.search("COCO-CN.zip: train_texts.jsonl is missing beside train_imgs.tsv. Delete .* and run this again", line) and left(published.root) == []


# ---------------------------------------------------------------------------------------------------------------- convert

COCO = {"coco-cn_train.txt": "COCO_train2014_000000000011\nCOCO_val2014_000000000012\n", "coco-cn_val.txt": "COCO_val2014_000000000021\n", "coco-cn_test.txt": "COCO_val2014_000000000031\n",
        "imageid.human-written-caption.txt": "COCO_train2014_000000000011#0\t一只猫\nCOCO_train2014_000000000011#1\t猫在睡觉。\nCOCO_val2014_000000000012#0\t两条狗\n"
                                             "COCO_val2014_000000000021#0\t海\nCOCO_val2014_000000000031#0\t山：高\n",
        "imageid.manually-translated-caption.txt": "COCO_val2014_000000000031#0\t不是这个\n"}
FLICKR = {"kn_train/seg.train.txt": "11#zhb#0 在:p 警车:n\n11#zhb#1 12:30:m 点\n12#zhb#0 ：:wm T:nx 恤:n\n", "kn_val/seg.caption.txt": "21#zhb#0 海:n\n",
          "kn_test/zhb_test.txt": "31#zhb#0 机器:n\n", "kn_test/zhm_test.txt": "31#zhm#0 人:n 写:v 的:ude\n", "readme.txt": "Flickr30K-CN"}
SAID = {"coco": {"train": [("一只猫", 11), ("猫在睡觉。", 11), ("两条狗", 12)], "valid": [("海", 21)], "test": [("山：高", 31)]},
        "flickr": {"train": [("在警车", 11), ("12:30点", 11), ("：T恤", 12)], "valid": [("海", 21)], "test": [("人写的", 31)]}}
LITTER = {"._coco-cn_train.txt": b"\0\5\x16\7", "__MACOSX/kn_train/._seg.train.txt": b"\0", ".DS_Store": b"\0"}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def image_folder(tmp_path):
    return write_files(tmp_path / "images", {**{f"train2014/COCO_train2014_{n:012}.jpg": jpeg(n) for n in (11,)}, **{f"val2014/COCO_val2014_{n:012}.jpg": jpeg(n) for n in (12, 21, 31)},
                                               **{f"flickr/{n}.jpg": jpeg(n) for n in (11, 12, 21, 31)}, "val2014/._COCO_val2014_000000000031.jpg": b"x"})


def packed(tmp_path, files, how):
    """The files of a release as a folder, or packed."""
    folder = write_files(tmp_path / "release/deep", {**files, **LITTER}).parent
    if how == "folder":
        return folder
    if how == "zip":
        return write_zip(tmp_path / "release.zip", {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    with tarfile.open(tmp_path / f"release.{how}", "w" if how == "tar" else "w:gz") as tar:
        tar.add(folder, "top")
    return tmp_path / f"release.{how}"


@pytest.mark.parametrize("how", ["folder", "zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("release, files", [("coco", COCO), ("flickr", FLICKR)])
def test_original_releases(release, files, how, tmp_path, image_folder, called):
    said = called(prepare, "convert", packed(tmp_path, files, how), tmp_path / "out", "--images", image_folder)
    assert "; the paper's table 1 has " in said and ("zhm_test.txt" in said) == (release == "flickr")
    for name, expected in SAID[release].items():
        split = open_split(tmp_path / "out", name)
        assert [(text, split.image_ids[i]) for text, images in zip(split.texts, split.positives) for i in images] == expected
        assert relation(split) == [(text, [jpeg(number)]) for text, number in expected]
    assert sorted(contents(tmp_path / "out")) == sorted(f"{split}_{kind}" for split in SAID[release] for kind in ("imgs.tsv", "texts.jsonl")) and not (tmp_path / "out.ce-clip-part").exists()


def test_releases_become_shards(tmp_path, image_folder, called):
    called(prepare, "convert", packed(tmp_path, COCO, "folder"), tmp_path / "out", "--images", image_folder, "--shards")
    assert not list((tmp_path / "out").glob("*.part"))
    for name, expected in SAID["coco"].items():
        assert sorted(relation(open_split(tmp_path / "out", name))) == sorted((text, [jpeg(number)]) for text, number in expected)


@pytest.mark.parametrize("options", [(), ("--shards",)], ids=["tsv", "shards"])
@pytest.mark.parametrize("layout", ["tsv", "folder", "shards", "pattern"])
def test_any_layout_is_converted_without_a_loss(layout, options, tsv_folder, tmp_path, called):
    (tsv_folder / "train_texts.jsonl").write_text(json.dumps({"text_id": 1, "text": "三" * 51, "image_ids": [3, 1, 7]}) + "\n" + (tsv_folder / "train_texts.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    source = tsv_folder
    if layout == "folder":
        source = write_files(tmp_path / "folder", {"captions.csv": "image,caption,split\na b/1.png,一,train\n2.png,一,train\n2.png,二,train\n3.png,三,test\n", **{name: png(seed=n) for n, name in enumerate(("a b/1.png", "2.png", "3.png"))}})
    elif layout in ("shards", "pattern"):
        for name in ("train", "valid", "test"):
            write_shards(open_split(tsv_folder, name), tmp_path / "shards", name, per_shard=5)
        source = tmp_path / "shards" if layout == "shards" else str(tmp_path / "shards/train-*.tar")
    if layout == "tsv":
        write_files(source, {"._train_imgs.tsv": b"\0", "._valid_imgs.tsv": b"\0"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*captions are longer")               # nothing is cut here
        called(prepare, "convert", source, tmp_path / "out", *options)
    names = ["train"] if layout == "pattern" else ["train", "test"] if layout == "folder" else ["train", "valid", "test"]
    assert data.split_names(tmp_path / "out") == names
    for name in names:
        before, after = (relation(open_split(place, name, context_length=99)) for place in (source, tmp_path / "out"))
        key = lambda row: (row[0], sorted(row[1]))
        assert sorted(map(key, before)) == sorted(map(key, after)) and (options or before == after)
    if layout == "tsv" and not options:
        assert open_split(tmp_path / "out", "test").image_ids == list(range(201, 213))


def edited(files, name, change):
    return {**files, name: change(files[name])}


@pytest.mark.parametrize("files, message", [
    (edited(COCO, "coco-cn_val.txt", lambda t: t + "两 个\n"), "release/deep/coco-cn_val.txt, line 2: expected a line like COCO_val2014_000000043734, found 两 个"),
    (edited(COCO, "coco-cn_test.txt", lambda t: t + "\nCOCO_val2014_000000000021\n"), "coco-cn_test.txt, line 3: COCO_val2014_000000000021 stands in the valid split already"),
    (edited(COCO, "imageid.human-written-caption.txt", lambda t: "COCO_x 无\n" + t), "caption.txt, line 1: expected a line like ID#0<TAB>caption"),
    (edited(COCO, "imageid.human-written-caption.txt", lambda t: t + "COCO_val2014_000000000031#1\t \n"), "caption.txt, line 6: expected a line like ID#0<TAB>caption"),
    (edited(COCO, "imageid.human-written-caption.txt", lambda t: t + "COCO_val2014_000000000031#0\t又\n"), "caption.txt, line 6: COCO_val2014_000000000031#0 stands above already"),
    (edited(COCO, "imageid.human-written-caption.txt", lambda t: t.encode() + b"COCO_val2014_000000000031#1\t\xff\n"), "caption.txt, line 6: not UTF-8"),
    ({name: text for name, text in COCO.items() if name != "coco-cn_val.txt"}, "0 files are called coco-cn_val.txt; the original COCO-CN has one of each"),
    ({**COCO, "copy/coco-cn_val.txt": ""}, "2 files are called coco-cn_val.txt"),
    (edited(FLICKR, "kn_train/seg.train.txt", lambda t: t + "13#zhb#0\n"), "seg.train.txt, line 4: expected a line like 1009692167#zhm#1"),
    (edited(FLICKR, "kn_train/seg.train.txt", lambda t: t + "11#zhb#0 又:d\n"), "seg.train.txt, line 4: 11#zhb#0 stands above already"),
    ({**FLICKR, "kn_val/zhm.txt": "21#zhm#0 海:n\n"}, "another text of the valid split"),
    ({**FLICKR, "kn_test/zhm2_test.txt": "31#zhm#0 海:n\n"}, "another text of the test split"),
    ({**FLICKR, "other/a.txt": "31#zhm#0 海:n\n"}, "is it the train, the val or the test split?"),
    ({"a.txt": "nothing"}, "neither the original COCO-CN")])
@pytest.mark.parametrize("how", ["folder", "zip"])
def test_what_is_wrong_with_a_release_is_named_with_its_line(files, message, how, tmp_path, image_folder, stopped):
    line = stopped(prepare, "convert", packed(tmp_path, files, how), tmp_path / "out", "--images", image_folder)
    assert message.removeprefix("release/deep/") in line and "-part" not in line
    assert str(tmp_path / ("release" if how == "folder" else "release.zip")) in line and not (tmp_path / "out").exists() and not (tmp_path / "out.ce-clip-part").exists()


def test_missing_images_are_counted_and_left_out_only_when_told_to(tmp_path, image_folder, called, stopped):
    (image_folder / "val2014/COCO_val2014_000000000012.jpg").unlink()
    command = prepare, "convert", packed(tmp_path, COCO, "tgz"), tmp_path / "out", "--images", image_folder
    assert re.search(r"1 of 4 images are not in .*: COCO_val2014_000000000012.jpg, … .*--skip-missing", stopped(*command))
    assert not (tmp_path / "out").exists()
    assert re.search("left out, with their captions: 1 of 4 images are not in ", called(*command, "--skip-missing"))
    assert open_split(tmp_path / "out", "train").image_ids == [11]


def test_captions_of_no_list_are_said(tmp_path, image_folder, called):
    files = edited(COCO, "imageid.human-written-caption.txt", lambda t: t.replace("COCO_val2014_000000000012#0", "COCO_val2014_000000000099#0"))
    with pytest.warns(UserWarning) as said:
        called(prepare, "convert", packed(tmp_path, files, "folder"), tmp_path / "out", "--images", image_folder)
    assert [re.sub("/.*/", "", str(w.message)) for w in said] == [
        "1 captions are left out, because their images are in no list; the first: imageid.human-written-caption.txt, line 3"]
    assert open_split(tmp_path / "out", "train").image_ids == [11, 12] and len(open_split(tmp_path / "out", "train")) == 2


def test_convert_refuses(tmp_path, tsv_folder, image_folder, stopped, called, monkeypatch):
    release = packed(tmp_path, COCO, "folder")
    assert "nor *_imgs.tsv" in stopped(prepare, "convert", release, tmp_path / "out")
    assert "release.tgz: without images; name their folder with --images" in stopped(prepare, "convert", packed(tmp_path, COCO, "tgz"), tmp_path / "out")
    assert "none: cannot be read (No such file" in stopped(prepare, "convert", release, tmp_path / "out", "--images", tmp_path / "none")
    assert "so leave out --images" in stopped(prepare, "convert", tsv_folder, tmp_path / "out", "--images", image_folder)
    assert "is there already" in stopped(prepare, "convert", tsv_folder, release)
    assert "neither a folder" in stopped(prepare, "convert", tmp_path / "none", tmp_path / "out")
    assert "no such file or folder" in stopped(prepare, "convert", tmp_path / "none.zip", tmp_path / "out", "--images", image_folder)
    write_files(image_folder, {"again/COCO_val2014_000000000031.jpg": b"x"})
    assert "has the same name; remove one of them" in stopped(prepare, "convert", release, tmp_path / "out", "--images", image_folder)
    content = packed(tmp_path, COCO, "tar").read_bytes()
    with tarfile.open(tmp_path / "release.tar") as tar:
        at = tar.getmembers()[4].offset                                         # a header in the middle, where tarfile would stop without a word
    damaged = content[:at] + b"\xff" * 512 + content[at + 512 :]
    (tmp_path / "header.tgz").write_bytes(gzip.compress(damaged))
    assert "after its end there is more" in stopped(prepare, "convert", tmp_path / "header.tgz", tmp_path / "out", "--images", image_folder)
    (tmp_path / "out").mkdir()                                                  # an empty folder may be there, unless another disk is
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "out")
        assert "is there already" in stopped(prepare, "convert", tsv_folder, tmp_path / "out")
    called(prepare, "convert", tsv_folder, tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 6


# ---------------------------------------------------------------------------------------------------------------- check


@pytest.fixture
def checked(called, tmp_path):
    """prepare check -> (exit status, what it says, {the kind's first words: findings})."""
    def run(*args):
        status, said = 0, None
        try:
            said = called(prepare, "check", *args, "--json", tmp_path / "found.json")
        except SystemExit as stop:
            status = stop.code
        found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
        assert found["sound"] == (status == 0)
        return status, said, {kind: lines for kind, lines in found["found"].items() if lines}, found["splits"]
    return run


def in_layout(layout, tmp_path, splits):
    """{split: [(image bytes, captions)]} as a data set in one of the layouts."""
    folder = tmp_path / "set"
    for split, samples in splits.items():
        if layout == "shards":
            write_tar(folder / f"{split}-000000.tar", {name: content for i, (encoded, texts) in enumerate(samples) for name, content in
                                                       ((f"{i}.jpg", encoded), (f"{i}.json", json.dumps({"texts": texts}).encode())) if (texts if name.endswith("json") else encoded is not None)})
        elif layout == "tsv":
            write_files(folder, {f"{split}_imgs.tsv": "".join(f"{i}\t{base64.b64encode(encoded).decode()}\n" for i, (encoded, _) in enumerate(samples) if encoded is not None)})
            texts = [{"text": text, "image_ids": [i] if encoded is not None else []} for i, (encoded, texts) in enumerate(samples) for text in texts]
            write_files(folder, {f"{split}_texts.jsonl": "".join(json.dumps({"text_id": t, **record}) + "\n" for t, record in enumerate(texts))})
        else:
            write_files(folder, {f"{split}/{i}.png": encoded for i, (encoded, _) in enumerate(samples)})
            with open(folder / "captions.jsonl", "a", encoding="utf-8") as f:
                f.writelines(json.dumps({"image": f"{split}/{i}.png", "caption": text, "split": split}) + "\n" for i, (_, texts) in enumerate(samples) for text in texts)
    return folder


def other_bytes(encoded, **options):
    """The same image, written again."""
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(out, **options)
    return out.getvalue()


def landscape(seed):
    """A image without sharp edges, as photographs are."""
    return Image.open(io.BytesIO(png(size=(7, 6), seed=seed))).resize((160, 120), Image.Resampling.BICUBIC)


def faint(corner):
    """A nearly flat image, from left to right a little brighter, as a wall is; and the brightness of one pixel."""
    grey = np.tile(np.linspace(100, 108, 64).astype(np.uint8), (48, 1))
    grey[0, 0] = corner
    return encoded(Image.fromarray(grey).convert("RGB"), format="PNG")


def encoded(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


@pytest.mark.parametrize("layout, processes", [("tsv", 1), ("folder", 1), ("shards", 1), ("shards", 2)])
def test_every_kind_of_finding_in_every_layout(layout, processes, tmp_path, checked, monkeypatch):
    splits = {"train": [(png(seed=n), [f"第{n}张"]) for n in range(40)] + [(encoded(landscape(1), format="PNG"), ["山"]), (faint(100), ["墙"]), (png(seed=0), ["又一次"]), (png(seed=7)[:-30], ["坏"])],
              "test": [(png(seed=3), ["同一张"]), (other_bytes(png(seed=4), format="PNG", compress_level=0), ["同样的像素"]), (encoded(landscape(1), format="JPEG", quality=60), ["像"]),
                       (faint(101), ["白墙"]), (png(seed=50), ["第1张", "长" * 61]), (png(seed=51), ["☃ ☃ ☃ 好"]), (b"<html>", ["坏了"]), (bomb(), ["炸弹"])]}
    readers, real = [], check.reader_loader
    monkeypatch.setattr(check, "reader_loader", lambda dataset, workers, **options: readers.append(workers) or real(dataset, workers, **options))
    status, _, found, rows = checked(in_layout(layout, tmp_path, splits), "--processes", processes)
    assert readers == [0 if processes == 1 else 2] * 2
    assert status == 1 and [(row["images"], row["captions"], row["pairs"]) for row in rows] == [(44, 44, 44), (8, 9, 9)]
    name = {"tsv": "{1}", "folder": "{0}/{1}.png", "shards": f"{{1}}.jpg of {tmp_path}/set/{{0}}-000000.tar"}[layout].format
    assert [line.partition(": it cannot be read")[0] for line in found.pop(BROKEN)] == [f"{split}: image {name(split, i)}" for split, i in (("train", 43), ("test", 6), ("test", 7))]
    assert found.pop(LEAKED) == [f"train {name('train', 3)}, test {name('test', 0)}: the same bytes", f"train {name('train', 4)}, test {name('test', 1)}: the same pixels in other bytes"]
    assert found.pop(TWICE) == [f"train {name('train', 0)}, train {name('train', 42)}: the same bytes"]
    assert found.pop(SIMILAR) == [f"test {name('test', 2)}, train {name('train', 40)}"]
    assert found.pop(SHARED) == ["第1张: " * (layout != "shards") + "train caption 2, test caption 5"]
    assert re.search(": 61 tokens: 长{40}…$", found.pop(LONG)[0]) and len(found.pop(UNKNOWN)) == 1 and not found


def test_leaks_are_told_in_full(tmp_path, checked, capsys):
    splits = {"train": [(png(seed=n), [f"第{n}张"]) for n in range(15)], "valid": [(png(seed=n), [f"第{n}张图"]) for n in range(3, 18)], "test": [(png(seed=99), ["九"]), (png(seed=5), ["五"])]}
    status, _, found, _ = checked(in_layout("tsv", tmp_path, splits))
    assert status == 1 and list(found) == [LEAKED] and "train 5, valid 2, test 1: the same bytes" in found[LEAKED]
    said = capsys.readouterr().out
    assert f"{LEAKED}: 12\n" in said and "    … and 2 more\n" in said and said.count("the same bytes") == 10
    assert said.endswith("set: not sound: 12 images that are in two splits\n")


@pytest.mark.parametrize("layout", ["tsv", "shards"])
def test_what_stands_alone_or_is_empty(layout, tmp_path, checked):
    splits = {"test": [(png(seed=1), ["一"]), (png(seed=2), []), (None, ["没有图片"]), (png(seed=3), [" "]), (png(seed=4), ["\u200b\u3000"])]}
    status, _, found, _ = checked(in_layout(layout, tmp_path, splits))
    assert status == 1 and len(found[EMPTY]) == 2 and len(found[SILENT]) == 1 and len(found[BLIND]) == 1 and len(found) == 3


def test_one_split_that_cannot_be_opened_does_not_hide_the_others(tsv_folder, checked):
    (tsv_folder / "valid_texts.jsonl").write_text("{\n")
    (tsv_folder / "._test_imgs.tsv").write_bytes(b"\0\5\x16\7")
    status, _, found, rows = checked(tsv_folder)
    assert status == 1 and [row["split"] for row in rows] == ["train", "test"] and list(found) == [CLOSED] and "valid_texts.jsonl, line 1: not JSON" in found[CLOSED][0]


def test_shards_that_are_cut_short(tmp_path, checked):
    path = write_tar(tmp_path / "a.tar", {name: content for i in range(4) for name, content in ((f"{i}.jpg", png(seed=i)), (f"{i}.txt", f"第{i}张".encode()))})
    assert checked(path)[0] == 0
    (tmp_path / "b.tar").write_bytes(path.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="damaged"):
        status, _, found, rows = checked(tmp_path / "b.tar")
    assert status == 1 and list(found) == [CLOSED] and rows[0]["split"] == "all"


def test_a_sound_set_by_name_beside_table_1(tmp_path, tsv_folder, checked, monkeypatch):
    tsv_folder.rename(tmp_path / "COCO-CN")
    monkeypatch.setitem(TABLE_1, "coco-cn", {"train": 12, "valid": 3_185, "test": 1_053})
    for name in (["coco-cn", "--data-root", tmp_path], [tmp_path / "COCO-CN"]):
        status, said, found, rows = checked(*name)
        assert status == 0 and not found and said.endswith("sound\n") and rows[1]["table_1"] == 3_185
        assert said.splitlines()[:2] == ["train          12 images       12 captions       12 pairs, as in the paper's table 1",
                                         "valid          12 images       12 captions       12 pairs; the paper's table 1 has 3,185"]


# ---------------------------------------------------------------------------------------------------------------- command line


def test_commands(called, stopped, tsv_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tsv_folder.rename("check")
    assert "train          12 images" in called(prepare, "counts", "check")
    for args, text in ((["--help"], "prepare fetch coco-cn"), (["check", "--help"], "usage: python -m tools.prepare check [-h]"),
                       (["fetch", "--help"], "{coco-cn,flickr30k-cn}"), (["convert", "--help"], "--skip-missing"),
                       (["shards", "--help"], "--processes"), (["paint", "--help"], "english-landscapes")):
        with pytest.raises(SystemExit) as stop:
            called(prepare, *args)
        said = capsys.readouterr().out
        assert stop.value.code == 0 and text in said
    for args in (["check/"], [], ["fetch", "muge"]):                            # without a command; what is not published
        with pytest.raises(SystemExit) as stop:
            called(prepare, *args)
        assert stop.value.code == 2 and re.search("fetch.*convert.*check.*counts.*shards.*sheet.*paint|choose from 'coco-cn'", capsys.readouterr().err)
    assert "--processes 0: out of range" in stopped(prepare, "check", "check", "--processes", 0)
    assert "--json" in stopped(prepare, "check", "check", "--json", tmp_path / "none/x.json")
    assert refused("-m", "tools.prepare", "counts", "nothing-here").startswith("error: nothing-here: neither a folder")


def test_a_sheet_of_images(called, stopped, tsv_folder, tmp_path):
    said = called(prepare, "sheet", tsv_folder, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (804, 268) and said.count(": image 2") == 12
    assert "sheet.txt: cannot be written" in stopped(prepare, "sheet", tsv_folder, tmp_path / "sheet.txt", "--split", "valid")


def test_shards_and_their_counts(called, tsv_folder, tmp_path):
    said = called(prepare, "shards", tsv_folder, tmp_path / "shards", "--split", "valid")
    assert said.endswith(f"No image was decoded; python -m tools.prepare check {tmp_path / 'shards'} looks at all. Train on them with --data {tmp_path / 'shards'}\n")
    expected = "       1 shards         12 pairs, 0 of them without image or caption\n"
    assert called(prepare, "counts", tmp_path / "shards") == "valid   " + " " + expected
    assert called(prepare, "counts", tmp_path / "shards/valid-*.tar") == "all     " + " " + expected


@pytest.mark.parametrize("name", ["demo", "poems"])
def test_a_painted_set_stays_as_it_is(name, called, tmp_path, monkeypatch):
    sizes = {"train": 12, "valid": 4, "test": 4}
    monkeypatch.setattr(painter, "DEMO", painter.DEMO._replace(sizes=sizes))
    monkeypatch.setitem(landscapes.SETS, "poems", landscapes.SETS["poems"]._replace(sizes=sizes))
    said = called(prepare, "paint", name, "--data-root", tmp_path)
    assert f"{tmp_path / name}:\ntrain          12 images" in said
    before = contents(tmp_path / name)
    again = called(prepare, "paint", name, tmp_path / name)
    assert contents(tmp_path / name) == before and again == said[said.index(f"{tmp_path / name}:\n") :]


def test_a_folder_of_the_users_is_never_removed(tmp_path, called, stopped):
    folder = in_layout("folder", tmp_path, {"train": [(png(), ["红"])]}).rename(tmp_path / "out.part")
    stopped(prepare, "convert", folder / "nowhere", tmp_path / "out")
    called(prepare, "convert", folder, tmp_path / "out")
    assert len(list(folder.rglob("*.png"))) == 1 and data.open_split(tmp_path / "out", "train").texts == ["红"]
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert "is there already" in stopped(prepare, "convert", folder, tmp_path / "link")


def test_shards_are_written_whole_or_not_at_all(tmp_path, tsv_folder):
    path = tsv_folder / "valid_imgs.tsv"
    path.write_text(path.read_text().replace("\tiVBOR", "\t!", 1))
    assert "image 101 cannot be read" in script("-m", "tools.prepare", "convert", tsv_folder, tmp_path / "out", "--shards", ok=False) and not (tmp_path / "out").exists()


def test_a_folder_with_the_name_of_a_split_is_none(tmp_path, tsv_folder):
    (tsv_folder / "extra_imgs.tsv").mkdir()
    assert data.split_names(tsv_folder) == ["train", "valid", "test"]


def test_when_nobody_reads_on_it_stops_without_a_word(tsv_folder):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m tools.prepare check {tsv_folder} | head -1; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 141) and not done.stderr and done.stdout.count("\n") == 1
