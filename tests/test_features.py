"""Features kept in stage 1: the same training without the vision tower; each image embedded once; kills, damage, refusals."""
import contextlib
import json
import pickle
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png, ready, write_tar, write_tsv_split
from test_model import VIT, batch, build
from test_train import QUICK, SMALL_VIT, equal_runs, metrics

import checkpoint
import train
from data import open_split
from evaluate import encode_images
from support import features, system
from support.features import Features
from support.images import decoded, normalize, to_uint8
from support.settings import parse_args, resolve
from support.system import BadInput


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of four images, two at a time; one thread, so that results round alike."""
    monkeypatch.setattr(features, "ROWS", 4)
    monkeypatch.setattr(features, "BATCH", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start_pt(tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "start.pt", train.CLIP(SMALL_VIT))
    return tmp_path / "start.pt"


@pytest.fixture
def passes(monkeypatch):
    """How many images went through a vision tower at a time."""
    seen, forward = [], train.CLIP.encode_image
    monkeypatch.setattr(train.CLIP, "encode_image", lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    return seen


def stage_1(start_pt, folder, out, *more):
    return ["train.py", "--stage", 1, "--data", folder, "--init", start_pt, "--max-steps", 6, "--lr", 1e-3, "--valid-every", 3, *QUICK, "--out", out, *more]


def losses(out):
    return [m["loss"] for m in metrics(out) if "loss" in m]


def shards(path, damaged=()):
    """12 images, of which image i has 1 + i % 3 captions."""
    files = {}
    for i in range(12):
        files |= {f"{i:02}.png": b"damaged" if i in damaged else png(seed=i), f"{i:02}.json": json.dumps({"texts": [f"第{i}张图片，说法{c}" for c in range(1 + i % 3)]}).encode()}
    return write_tar(path, files)


def kept(model, split, folder, precision="fp32"):
    """The store of train.py for these, as it stands in the folder."""
    made_of = checkpoint.vision_facts(model) | {"data": split.fingerprint(), "precision": precision}
    return Features(folder, made_of, split.image_count(), model.cfg.embed_dim)


def complete(made, model, split):
    encode = lambda batches: encode_images(model.eval(), split.image, batches, torch.device("cpu"), contextlib.nullcontext)
    made.complete(encode, lambda line: None, lambda: None)
    return made


def all_features(model, split, folder, precision="fp32"):
    return complete(kept(model, split, folder, precision), model, split)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.npy")}


# ---------------------------------------------------------------------------------------------------------------- the same training, at the price of the text tower


def test_training_with_features_is_training_without_and_its_steps_run_no_vision_tower(tsv_folder, start_pt, tmp_path, trained, passes, capsys):  # noqa: F811
    """Five captions a image, two passes over the pairs, micro-batches: losses to 1e-3, recall the same; each of 12 + 12 images embedded once, for all steps and validations."""
    write_tsv_split(tsv_folder, "train", captions_per_image=5)
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "without", "--features", "none"))
    passes.clear()
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "with", "--micro-batch", 4))
    output = capsys.readouterr().out
    assert f"features of 12 images in {tmp_path / 'with/features'}, 0.0 MiB: 3 of 3 parts computed" in output and sum(passes) == 24 and passes.count(2) == 6
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-3) and losses(tmp_path / "with") != losses(tmp_path / "without")
    assert len(losses(tmp_path / "with")) == 6 and not (tmp_path / "without/features").exists()
    assert [m["score"] for m in metrics(tmp_path / "with") if "valid" in m] == [m["score"] for m in metrics(tmp_path / "without") if "valid" in m] and len(metrics(tmp_path / "with")) == 9


def test_a_step_on_embeddings_is_the_step_on_their_images():
    """In fp32: loss and gradient to 1e-6."""
    results = []
    for given in ("pixels", "embeddings"):
        model, (pixels, ids) = build(VIT).train(), batch(VIT)
        model.freeze_vision()
        gradients = train.GradientSum([p for p in model.parameters() if p.requires_grad])
        inputs = pixels if given == "pixels" else model.encode_image(pixels)
        results.append(train.train_step(model, [ready(inputs, ids)], None, gradients, train.make_optimizer(model, 0.1), torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)
    halves = torch.randn(4, 8).half()
    assert torch.equal(train.MicroBatch(halves, None).images("cpu"), halves.float())


def test_each_row_is_its_images_embedding_on_shards_as_on_tsv(tmp_path):
    """Shards: image numbers from the indexes alone, one row however many captions; rows are copies, and travel to readers."""
    model = build(VIT).eval()
    write_tsv_split(tmp_path / "tsv", "train", captions_per_image=2)
    shards(tmp_path / "a.tar"), write_tar(tmp_path / "b.tar", {"x.txt": b"no image", "y.png": png(seed=99), "y.txt": "一".encode(), "z.txt": b"none either"})
    for split, count in ((open_split(tmp_path / "tsv", "train"), 12), (open_split(f"{tmp_path}/*.tar", "train"), 15)):
        made, seen = pickle.loads(pickle.dumps(all_features(model, split, tmp_path / f"features{count}"))), Counter()
        assert "described" not in vars(split) and split.image_count() == count
        for k in range(len(split)):
            seen[i := split.image_of(k)] += 1
            if k >= 24 and split.where(k)["member"] != "y.png":
                with pytest.raises(BadInput, match="the image cannot be read .it is missing."):
                    made.sample(split, k)
                continue
            image, ids, *keys = split.sample(k)
            row, words, *own_keys = made.sample(split, k)
            embed = model.encode_image(normalize(to_uint8(decoded(lambda: image, "it"), VIT.image_size)[None].float() / 255))[0]
            assert torch.equal(row, embed.detach().half()) and row.shape == (VIT.embed_dim,) and np.array_equal(words, ids) and own_keys == keys
            assert split.image_bytes(i) == image
        assert list(seen) == list(range(count)) and seen[1] == 2


def test_killed_and_continued_on_other_processes_the_files_are_the_same(tsv_folder, tmp_path, monkeypatch):
    """Two threads stand for them; two real ones: test_train, stage 1 from OpenAI's CLIP and BERT."""
    split, model = open_split(tsv_folder, "train"), build(VIT)
    all_features(model, split, tmp_path / "whole")

    def killed(path, fill, part="", write=system.write):
        if Path(path).name == "000001.npy":
            Path(f"{path}{part}").write_bytes(b"half")
            raise InterruptedError
        write(path, fill, part=part)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(system, "write", killed)
        all_features(model, split, tmp_path / "killed")
    first = (tmp_path / "killed/000000.npy").stat().st_mtime_ns
    assert list(contents(tmp_path / "killed")) == ["000000.npy"]
    things, own, meet, wrote = [None, None], threading.local(), threading.Barrier(2, timeout=60), []

    def all_gather_objects(thing):
        things[own.rank] = thing
        meet.wait()
        got = list(things)
        meet.wait()
        return got

    def process(rank):
        own.rank, made = rank, kept(model, split, tmp_path / "killed")
        made.rank, made.world_size = rank, 2
        complete(made, model, split)

    monkeypatch.setattr(features, "all_gather_objects", all_gather_objects)
    monkeypatch.setattr(features, "all_reduce_max", lambda number: max(all_gather_objects(number)))
    monkeypatch.setattr(features, "barrier", lambda: all_gather_objects(None))
    monkeypatch.setattr(system, "write", lambda path, *rest, write=system.write, **more: wrote.append((own.rank, Path(path).name)) or write(path, *rest, **more))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert sorted(wrote) == [(0, "000001.npy"), (0, "features.json"), (1, "000002.npy")]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and len(contents(tmp_path / "whole")) == 3 and (tmp_path / "killed/000000.npy").stat().st_mtime_ns == first


def test_a_run_that_is_stopped_meanwhile_keeps_its_parts_and_continues_from_them(tsv_folder, start_pt, tmp_path, trained, capsys, monkeypatch):  # noqa: F811
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "one"))
    write = system.write
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(system, "write", lambda path, *rest, **more: write(path, *rest, **more) or (Path(path).name == "000000.npy" and signal.raise_signal(signal.SIGTERM)))
        trained(*stage_1(start_pt, tsv_folder, tmp_path / "stopped"))
    assert stopped.value.code == 128 + signal.SIGTERM and len(contents(tmp_path / "stopped/features")) == 1
    capsys.readouterr()
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "stopped"))
    assert "2 of 3 parts computed" in capsys.readouterr().out
    equal_runs(tmp_path / "stopped", tmp_path / "one")


# ---------------------------------------------------------------------------------------------------------------- images that cannot be read, damage, refusals


def test_an_unreadable_image_is_replaced_and_reported_alike_with_and_without_features(tmp_path, start_pt, trained, stops):  # noqa: F811
    shards(tmp_path / "a.tar", damaged=[4])
    reports = []
    for kept in ("none", "auto"):
        command = stage_1(start_pt, tmp_path / "a.tar", tmp_path / kept, "--features", kept, "--max-steps", 8, "--max-bad")
        trained(*command, 0.5)
        reports.append((tmp_path / kept / "bad_samples.jsonl").read_text())
    assert reports[0] == reports[1] and reports[0].count("not an image in a format that") == 2        # of its two captions
    assert np.isnan(np.load(tmp_path / "auto/features/000001.npy")).all(axis=1).tolist() == [True, False, False, False]
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "none"), rel=1e-3)
    assert "cannot be read, and of 24 only 0 may be (--max-bad 0.01)" in stops(*stage_1(start_pt, tmp_path / "a.tar", tmp_path / "few"))


def test_an_image_that_was_mended_since_is_not_taken_for_a_damaged_one_in_silence(tmp_path):
    shards(tmp_path / "a.tar", damaged=[0])
    made = all_features(build(VIT), open_split(tmp_path / "a.tar", "train"), tmp_path / "f")
    shards(tmp_path / "b.tar")
    with pytest.raises(BadInput, match="now it can"):
        made.sample(open_split(tmp_path / "b.tar", "train"), 0)


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-20]), lambda p: p.unlink(), lambda p: np.save(p, np.zeros((4, VIT.embed_dim), np.float16)),
                                    lambda p: np.save(p, np.ones((3, VIT.embed_dim), np.float16)), lambda p: np.save(p, np.load(p).astype(np.float32))], ids=["cut", "gone", "zeros", "shape", "type"])
def test_a_damaged_part_is_computed_again_and_never_used(damage, tsv_folder, tmp_path, passes):
    split = open_split(tsv_folder, "train")
    made = all_features(build(VIT), split, tmp_path / "f")
    before = contents(tmp_path / "f")
    damage(tmp_path / "f/000001.npy")
    if not (tmp_path / "f/000001.npy").exists():
        with pytest.raises(OSError, match="000001.npy: not the features that were there"):          # OSError: it ends the run, where BadInput would count as a bad image
            made.sample(split, 5)
    passes.clear()
    all_features(build(VIT), split, tmp_path / "f")
    assert contents(tmp_path / "f") == before and passes == [2, 2]


def test_features_of_something_else_are_refused_by_name(tsv_folder, tmp_path):
    split, model = open_split(tsv_folder, "train"), build(VIT)
    all_features(model, split, tmp_path / "f")
    model.text_projection.data += 1                                             # of the text tower: it does not matter
    all_features(model, split, tmp_path / "f")
    for other, more, message in ((build(VIT, seed=1), {}, "made of vision tower "), (model, {"precision": "bf16"}, "made of precision fp32, now it is bf16; delete it or name another folder"),
                                 (model, {"split": open_split(tsv_folder, "valid")}, "made of data 12 pairs")):
        with pytest.raises(BadInput, match=message):
            all_features(other, **{"split": split, "folder": tmp_path / "f", **more})
    (tmp_path / "f/features.json").unlink()
    with pytest.raises(BadInput, match="it has no features.json"):
        all_features(model, split, tmp_path / "f")


def test_a_folder_of_an_older_version_is_used_again(tsv_folder, tmp_path, passes):
    """Its features.json also counts the pictures."""
    split, model = open_split(tsv_folder, "train"), build(VIT)
    all_features(model, split, tmp_path / "f")
    about = json.loads((tmp_path / "f/features.json").read_text())
    about["made_of"]["pictures"] = 12
    (tmp_path / "f/features.json").write_text(json.dumps(about))
    passes.clear()
    all_features(model, split, tmp_path / "f")
    assert not passes


def test_weights_that_are_no_numbers_are_refused_and_leave_no_part(tsv_folder, tmp_path):
    model = build(VIT)
    next(model.vision.parameters()).data.fill_(float("nan"))
    with pytest.raises(BadInput, match="the embeddings of images 0 to 1 are not finite"):
        all_features(model, open_split(tsv_folder, "train"), tmp_path / "f")
    assert not contents(tmp_path / "f")


def test_runs_share_a_folder_and_one_waits_for_the_other(tsv_folder, start_pt, tmp_path, trained, stops, passes, capsys, monkeypatch):  # noqa: F811
    shared = ["--features", tmp_path / "shared"]
    held = iter([False, False, True])
    real = features.system.lock
    monkeypatch.setattr(features.system, "lock", lambda path: None if path.parent.name == "shared" and not next(held) else real(path))
    monkeypatch.setattr(features.time, "sleep", lambda seconds: None)
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "a", *shared))
    assert capsys.readouterr().out.count("another run computes features there; this one waits") == 1
    assert list(held) == []                                                     # of here on it fails: no lock needed: the folder may be one that cannot be written
    passes.clear()
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "b", *shared, "--lr", 2e-3))
    assert f"{tmp_path / 'shared'}, 0.0 MiB: used again" in capsys.readouterr().out and passes == [12]              # of the valid split
    assert "features_kept True, now it is None" in stops(*stage_1(start_pt, tsv_folder, tmp_path / "b", "--lr", 2e-3, "--features", "none"))
    (tmp_path / "shared").rename(tmp_path / "moved")
    trained(*stage_1(start_pt, tsv_folder, tmp_path / "b", "--lr", 2e-3, "--features", tmp_path / "moved"))         # another place is no other run


@pytest.mark.parametrize("more, message", [
    (["--stage", 2], "stage 2 trains the vision tower, so there are no features to keep; leave it out"),
    (["--augment", "photo"], "--augment photo changes its images, so"),
    (["--features", ""], "--features '': name a folder, auto or none"),
])
def test_where_embeddings_change_a_folder_for_them_is_refused(more, message, tsv_folder, tmp_path, stops):  # noqa: F811
    assert message in stops("train.py", "--stage", 1, "--data", tsv_folder, "--features", tmp_path / "f", "--out", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, expected", [([], "OUT/features"), (["--epochs", 1], None), (["--features", "none"], None), (["--augment", "photo"], None), (["--stage", 2], None), (["--features", "x"], "x")])
def test_by_default_features_are_kept_where_images_come_more_than_once(more, expected, tsv_folder):
    args = parse_args([str(a) for a in ["--stage", 1, "--out", "OUT", "--batch-size", 5, "--epochs", 2, *more]])
    settings = resolve(args, SMALL_VIT, open_split(tsv_folder, "train"), None, "fp32", 1)
    assert (settings.features, settings.features_kept) == (expected, bool(expected) or None)


def test_a_full_disk_is_one_line_and_leaves_what_is_done(tsv_folder, tmp_path, monkeypatch):
    def full(f, rows, save=np.save):
        save(f, rows)
        if len(contents(tmp_path / "f")) == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(BadInput, match="000002.npy: cannot be written .*No space left") as caught:
        all_features(build(VIT), open_split(tsv_folder, "train"), tmp_path / "f")
    assert "\n" not in str(caught.value) and sorted(p.name for p in (tmp_path / "f").iterdir()) == ["000000.npy", "000001.npy", "features.json", "lock"]
