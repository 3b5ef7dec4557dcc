"""Search: what is indexed, what is done again, what is found; and what a person types wrong."""
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import bomb, jpeg, png
from PIL import Image

import checkpoint
from model import CLIP, CONFIGS
from support import system
from support.images import decoded, image_files
from tools import search


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "tiny.pt"
    torch.manual_seed(0)
    checkpoint.save(path, CLIP(CONFIGS["tiny"]))
    return path


@pytest.fixture
def album(tmp_path, monkeypatch):
    """What lies in folders of images: every common kind, sub-folders, names with spaces and Chinese characters, and much that is no image."""
    monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "我的 相册"
    (folder / "去 海边/2024").mkdir(parents=True)
    (folder / ".trash").mkdir()
    image = Image.open(io.BytesIO(png(size=(40, 30), seed=1)))
    for kind in ("jpg", "png", "webp", "gif", "bmp", "tif"):
        image.save(folder / f"kind.{kind}")
    image.convert("P").save(folder / "palette.PNG")
    image.convert("CMYK").save(folder / "cmyk.jpeg")
    image.convert("L").save(folder / "去 海边/grey.png")
    (folder / "去 海边/2024/日落 1.jpg").write_bytes(jpeg(seed=7))
    (folder / os.fsdecode(b"not utf-8 \xff.jpg")).write_bytes(jpeg(seed=8))
    (folder / "notes.txt").write_text("no image")
    (folder / ".trash/gone.jpg").write_bytes(jpeg())
    (folder / "._kind.jpg").write_bytes(b"of a Mac")
    (folder / "broken.jpg").write_bytes(jpeg()[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo(folder / "pipe.png")                                              # reading it would wait for ever
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "circle").symlink_to(folder)
    return folder


READABLE, BROKEN = 11, 4


@pytest.fixture
def searched(monkeypatch, capsys, album, tiny_checkpoint):
    """search.py on the album -> (lines on stdout, all of stderr)."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["search.py", "--ckpt", str(tiny_checkpoint), "--images", str(album), "--workers", "0", *map(str, args)])
        sys.stdout.reconfigure(errors="backslashreplace")                       # as system.run does
        search.main()
        out, err = capsys.readouterr()
        return out.splitlines(), err
    return run


def test_indexes_once_then_only_what_has_changed(searched, album, monkeypatch, tmp_path):
    lines, said = searched("一只猫", "--top", 3)
    assert len(lines) == 3 and f"{BROKEN} images left out; the first: bomb.png cannot be read" in said and f"{READABLE} images, {READABLE} new or changed, 0 gone" in said
    place, = (tmp_path / "cache/search").glob("*.npz")
    written, encoded = place.stat().st_ino, []
    real = search.encode_images
    monkeypatch.setattr(search, "encode_images", lambda model, read, batches, *rest: encoded.extend(sum(map(list, batches), [])) or real(model, read, batches, *rest))
    again, said = searched("一只猫", "--top", 3)
    assert place.stat().st_ino == written                                       # nothing to write
    assert again == lines and len(encoded) == BROKEN and ", 0 new or changed, 0 gone" in said       # what cannot be read is tried again
    (album / "kind.bmp").unlink()
    (album / "broken.jpg").write_bytes(jpeg(seed=3))                            # mended
    (album / "new.png").write_bytes(png(seed=9))
    lines, said = searched("一只猫", "--top", 100)
    assert len(encoded) == 2 * BROKEN + 1 and f"{BROKEN - 1} images left out" in said and f"{READABLE + 1} images, 2 new or changed, 1 gone" in said and len(lines) == READABLE + 1
    assert not any("kind.bmp" in line for line in lines) and any("new.png" in line for line in lines)
    assert not list(album.rglob("*.npz"))                                       # nothing is written among the images


def test_finds_what_a_plain_comparison_finds(searched, album, tiny_checkpoint):
    model, transform = checkpoint.load(tiny_checkpoint)
    files = [album / path for path in image_files(album)[0]]
    with torch.no_grad():
        asked = model.encode_image(transform(Image.open(album / "kind.png"))[None])
        expected = {}
        for path in files:
            try:
                expected[str(path).encode(errors="backslashreplace").decode()] = float(asked @ model.encode_image(transform(decoded(path.read_bytes, "it"))[None])[0])
            except system.BadInput:
                pass
    lines, _ = searched("--image", album / "kind.png", "--top", 100)
    found = {line.split(None, 2)[2]: float(line.split()[1]) for line in lines}
    assert found == pytest.approx(expected, abs=0.02)                           # bf16 towers, fp16 index
    assert [float(line.split()[1]) for line in lines] == sorted(found.values(), reverse=True)
    assert {line.rsplit("/", 1)[1] for line in lines[:3]} <= {"kind.png", "kind.bmp", "kind.tif", "palette.PNG", "kind.webp", "kind.gif", "kind.jpg"}


def test_equal_similarities_keep_the_order_of_the_index(capsys):
    embed = torch.tensor([[0.0, 1]] + [[1.0, 0]] * 40)
    index = SimpleNamespace(embed=embed, images={f"{row}.png": None for row in range(41)}, folder=Path("album"))
    search.show(torch.tensor([1.0, 0]), "", index, SimpleNamespace(top=3, html=None))
    assert capsys.readouterr().out.splitlines() == [f"  {row}  1.000  album/{row}.png" for row in (1, 2, 3)]


def test_contact_sheet(searched, album, tmp_path):
    searched("<script>alert(1)</script>", "--html", tmp_path / "found.html", "--top", 20)
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64") == READABLE and "<script" not in page and "&lt;script&gt;" in page
    assert "%E6%97%A5%E8%90%BD%201.jpg" in page and "%FF.jpg" in page           # links that a browser can follow


def test_an_interrupted_index_goes_on(searched, album, monkeypatch, tmp_path):
    real, count = search.encode_images, [0]
    monkeypatch.setattr(search, "BATCH", 4)

    def interrupted(*args):
        for batch in real(*args):
            yield batch
            count[0] += 1
            if count[0] == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(search, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searched("猫")
    monkeypatch.setattr(search, "encode_images", real)
    place, = (tmp_path / "cache/search").glob("*.npz")
    with np.load(place) as content:
        kept = len(content["embed"])
    _, said = searched("猫")
    assert 0 < kept < READABLE and f"{READABLE} images, {READABLE - kept} new or changed" in said


def test_an_empty_folder_does_not_cost_the_index(searched, album, tmp_path):
    """A disk that is not there for once."""
    first, _ = searched("猫")
    album.rename(tmp_path / "away")
    album.mkdir()
    with pytest.raises(system.BadInput, match="no image to search in"):
        searched("猫")
    album.rmdir()
    (tmp_path / "away").rename(album)
    again, said = searched("猫")
    assert again == first and ", 0 new or changed" in said


def test_a_part_that_cannot_be_read_is_named(searched, album, monkeypatch):
    real = image_files
    monkeypatch.setattr(search, "image_files", lambda folder: ([path for path in real(folder)[0] if not path.startswith("去 海边")], {"去 海边": "Permission denied"}))
    _, said = searched("猫")
    assert "去 海边: cannot be read (Permission denied)" in said and f"{READABLE - 2} images" in said


def test_the_image_of_the_query_is_a_file(album, tmp_path, stopped):
    os.mkfifo(tmp_path / "pipe")                                                # reading it would wait
    for name in ("pipe", "nowhere.jpg"):
        assert stopped(search, "--ckpt", "x", "--images", album, "--image", tmp_path / name) == f"--image {tmp_path / name}: there is no such file"


def test_a_damaged_index_is_made_anew(searched, tmp_path):
    first, _ = searched("猫")
    place, = (tmp_path / "cache/search").glob("*.npz")
    whole = place.read_bytes()
    with np.load(place) as content:
        content = dict(content)
    np.savez(odd := io.BytesIO(), **content | {"embed": content["embed"][1:]})
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"palette", b"\0alette"), odd.getvalue()):
        place.write_bytes(damaged)
        lines, said = searched("猫")
        assert lines == first and "is damaged; it is made anew" in said
    np.savez(narrow := io.BytesIO(), **content | {"embed": content["embed"][:, :3]})    # of another width
    place.write_bytes(narrow.getvalue())
    for _ in range(2):
        assert searched("猫")[0] == first


def test_asks_again_and_again(searched, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("猫\n\n  \n狗\n".encode()), encoding="utf-8"))
    lines, _ = searched("--top", 2)
    assert len(lines) == 4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("一只狗\n".encode("gbk")), encoding="utf-8"))
    with pytest.raises(system.BadInput, match="the query is not UTF-8"):
        searched("--top", 2)


def test_names_of_files_cannot_write_to_the_terminal(searched, album):
    (album / "a\nb\x1b[31m.png").write_bytes(png())
    lines, _ = searched("猫", "--top", 100)
    assert len(lines) == READABLE + 1 and any(line.endswith("a\\nb\\x1b[31m.png") for line in lines)


@pytest.mark.parametrize("arguments, message", [
    (["--images", "nowhere", "猫"], "--images nowhere: there is no such folder"),
    (["--ckpt", "nowhere.pt", "猫"], "nowhere.pt: there is no such checkpoint"),
    (["猫", "--image", "ALBUM/kind.png"], "name either a sentence"),
    (["--image", "ALBUM/broken.jpg"], "broken.jpg cannot be read"),
    (["--image", "nowhere.jpg"], "--image nowhere.jpg: there is no such file"),
    ([" "], "a sentence that is not empty"),
    (["\udcff"], "the query is not UTF-8"),
    (["猫", "--top", "0"], "--top 0"),
    (["猫", "--html", "nowhere/a.html"], "name a file in a folder that is there"),
    (["猫", "--images", "EMPTY"], "no image to search in"),
])
def test_wrong_arguments_give_one_line(searched, album, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(system.BadInput) as caught:
        searched(*[a.replace("ALBUM", str(album)).replace("EMPTY", str(tmp_path / "empty")) for a in arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
