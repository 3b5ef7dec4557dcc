"""Checkpoints: a round trip, atomic writing, every released format in and two out, and refusal of everything that is not exactly right."""
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile

import peers
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused
from PIL import Image
from test_model import RESNET, VIT, batch, build

import checkpoint
import train
from model import CLIP, CONFIGS
from support.formats import SKIPPED, layout_of
from support.images import Transform
from support.run import Run
from support.system import BadInput
from support.weight_files import open_file
from support.weights import FORMAT
from tokenizer import Tokenizer


@pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
def test_round_trip(cfg, tmp_path):
    model = build(cfg)
    checkpoint.save(tmp_path / "a.pt", model, step=3)
    loaded, transform = checkpoint.load(tmp_path / "a.pt")
    assert loaded.cfg == cfg and transform.size == cfg.image_size and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    pixels, ids = batch(cfg)
    assert torch.equal(loaded.encode_text(ids), model.eval().encode_text(ids))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(VIT), step=1)
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(Exception):
        checkpoint.save(tmp_path / "a.pt", build(VIT), step=lambda: "cannot be written")
    assert (tmp_path / "a.pt").read_bytes() == before


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    """A limit on the size of files stands in for the disk's end."""
    checkpoint.save(tmp_path / "a.pt", build(VIT), step=1)
    before = (tmp_path / "a.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(BadInput, match="a.pt: cannot be written .*; nothing there was changed"):
            checkpoint.save(tmp_path / "a.pt", build(VIT), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_truncated_files_give_one_line(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    whole = (tmp_path / "a.pt").read_bytes()
    for k in range(20):
        (tmp_path / "b.pt").write_bytes(whole[: len(whole) * k // 20])
        with pytest.raises(BadInput, match="b.pt: not a readable checkpoint") as caught:
            checkpoint.load(tmp_path / "b.pt")
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    whole[len(whole) // 2] ^= 4
    (tmp_path / "a.pt").write_bytes(whole)
    with pytest.raises(BadInput, match="a.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


class Code:
    def __reduce__(self):
        return (open, ("written-by-a-checkpoint", "w"))


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": FORMAT, "model": Code()}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Code()))
    (tmp_path / "d.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save(build(VIT), "e.pt")
    torch.save(build(VIT), "f.pt", _use_new_zipfile_serialization=False)
    for name, what in (("a", "[a-z]+.open"), ("b", "a pickle"), ("c", "a pickle"), ("d", "a pickle"), ("e", "model.CLIP"), ("f", "model.CLIP")):
        with pytest.raises(BadInput, match=rf"{name}.pt: not only tensors \({what}\); it could run code: refused$"):
            checkpoint.load(f"{name}.pt")
    assert not (tmp_path / "written-by-a-checkpoint").exists()


def change(state, how):
    tensors = state["model"]
    if how == "missing":
        del tensors["text.norm.weight"]
    elif how == "unknown":
        tensors["extra"] = torch.zeros(1)
    elif how == "renamed":
        tensors["text.norm.gain"] = tensors.pop("text.norm.weight")
    elif how == "reshaped":
        tensors["text.norm.weight"] = torch.zeros(7)
    elif how == "not finite":
        tensors["text.norm.weight"][3] = float("nan")
    else:
        tensors["text.norm.weight"] = torch.zeros(48).half() if how == "half precision" else "48"


@pytest.mark.parametrize("how, message", [("missing", "text.norm.weight is missing"), ("unknown", "extra is unknown"), ("renamed", "text.norm.gain is unknown"),
                                          ("reshaped", r"text.norm.weight is \(7,\) float32, not \(48,\) float32"),
                                          ("half precision", r"text.norm.weight is \(48,\) float16"), ("no tensor", "text.norm.weight is a str"), ("not finite", "text.norm.weight holds NaN")])
def test_one_wrong_tensor_is_named(tmp_path, how, message):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    change(state, how)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=message):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"vision_heads": 0}, {"embed_dim": -1}, {"text_width": "wide"}, {"colour": "red"}, {"text_heads": -2}, {"text_heads": True}, {"text_heads": 2.0},
                                    {"context_length": 52.0}, {"text_dropout": float("nan")}, {"text_layers": 10**6}, {"patch_size": None}])
def test_configs_that_describe_no_model(tmp_path, change):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    torch.save({**state, "config": state["config"] | change}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="a.pt: "):
        checkpoint.load(tmp_path / "a.pt")


def test_entries_that_only_reading_makes_are_not_taken_from_a_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(RESNET), skipped=5, towers=5, layout=5)
    state = torch.load(tmp_path / "a.pt")
    state["model"]["vision.stem.0.1.running_mean"] = torch.nn.Parameter(state["model"]["vision.stem.0.1.running_mean"])
    torch.save(state, tmp_path / "a.pt")
    model, _ = checkpoint.load(tmp_path / "a.pt")
    assert not isinstance(model.vision.stem[0][1].running_mean, torch.nn.Parameter)
    assert not {"skipped", "towers", "layout"} & checkpoint.read(tmp_path / "a.pt").keys()


def test_a_config_may_lack_a_size_that_has_a_default(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    del state["config"]["text_dropout"]
    torch.save(state, tmp_path / "a.pt")
    assert checkpoint.read(tmp_path / "a.pt", "text")["config"]["text_dropout"] == 0.1


def test_compressed_files_are_read(tmp_path):
    """torch itself would map their compressed bytes as numbers."""
    checkpoint.save(tmp_path / "a.pt", model := build(VIT))
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with contextlib.suppress(BadInput):                                         # torch may refuse them, but must not misread them
        loaded, _ = checkpoint.load(tmp_path / "b.pt")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def pickled(*code, name="a/data.pkl"):
    """A file of torch whose table of contents is this pickle."""
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/version", "3")
            archive.writestr(name, b"\x80\x02" + b"".join(code) + b".")
    return write


def deflated(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(2**26 + 2**20))


def named_twice(path):
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data.pkl", b"\x80\x02}.")


def torchscript(path):
    """A thousand names for one megabyte."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuJ\0\0\4\0tQK\0J\0\0\4\0\x85K\1\x85\x89Nt"
    names = b"".join(b"X\4\0\0\0%04d" % i + tensor + b"R" for i in range(1000))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"\x80\x02c__torch__\nM\n)\x81}(" + names + b"ub.")
        archive.writestr("a/data/0", bytes(2**20))


def announced(header, length=None):
    """A safetensors file that is a header alone."""
    text = json.dumps(header).encode()
    return lambda path: path.write_bytes((length or len(text)).to_bytes(8, "little") + text)


TERABYTE = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}


@pytest.mark.parametrize("write, message", [
    (lambda path: torch.save({"a": torch.zeros(()).expand(2**34)}, path), "a is sparse, .*expanded"),
    (lambda path: torch.save({"optimizer": [torch.zeros(1).expand(2**40)]}, path), "optimizer is sparse, "),
    (lambda path: torch.save(dict.fromkeys(range(100), torch.zeros(2**18)), path), "would take 104,857,600 bytes"),
    (deflated, "unpacks to far more"), (named_twice, "two entries of a name"), (torchscript, "would take 1,048,576,000 bytes"),
    (pickled(b"}K\1cbuiltins\nbytearray\n\x8a\6\0\0\0\0\0\1\x85Rs"), r"\(bytearray\); it could run code"),
    (pickled(b"}K\1cbuiltins\nbytearray\n\x8a\6\0\0\0\0\0\1\x85Rs", name="a/DATA.PKL"), r"\(bytearray\); it could run code"),
    (pickled(b"}K\1]q\0(" + b"h\0" * 10**5 + b"es"), "millions of values"),         # a list that holds itself 100,000 times
    (pickled(b"}r\xff\xff\xff\x7f"), "a pickle"), (pickled(b"}X\0\0\0\1" + bytes(2**24) + b"K\1s"), "not a readable checkpoint"),
    (announced({"a": TERABYTE}), "a does not lie where the header says"), (announced({"a": TERABYTE | {"shape": [0, 2**70]}}), "not a readable"),
    (announced({}, 2**60), "over 8,388,608 bytes"), (announced([1]), "no object"), (announced("a"), "no object"), (announced({"a": 3}), "not a readable"),
    (announced({"a": TERABYTE | {"dtype": ["F32"]}}), "not a readable"), (announced({"a" * 10**6: TERABYTE}), "a does not lie where"),
    (lambda path: path.write_bytes(b""), "no file of weights"), (lambda path: path.write_text("<html>404"), "no file of weights"), (lambda path: path.mkdir(), "a folder without"),
])
def test_a_small_file_cannot_ask_for_much_memory_or_time(write, message, tmp_path):
    path = tmp_path / ("a.safetensors" if "announced" in write.__qualname__ else "a.pt")
    write(path)
    with pytest.raises(BadInput, match=message) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_attribute_of_a_tensor_or_table_hides_nothing(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    state["model"]["text.norm.weight"] = torch.nn.Parameter(torch.full((48,), float("nan")))
    state["model"]["text.norm.weight"].isfinite = torch.Tensor              # torch.Tensor().all() is true
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="text.norm.weight holds NaN"):
        checkpoint.load(tmp_path / "a.pt")
    state["model"] = collections.OrderedDict(state["model"], extra=torch.ones(1))
    state["model"].keys = torch.Size
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="extra is unknown"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_checksum_beside_a_file_is_verified(tmp_path, recwarn):
    path = peers.old_bare_file({"a": torch.ones(1000)}, tmp_path)
    open_file(path)
    assert "pytorch_model.bin: this old format has no checksum; compare its SHA-256" in str(recwarn.pop(UserWarning).message)
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  pytorch_model.bin\n"
    for told in (line, "\\" + line):
        (tmp_path / "pytorch_model.bin.sha256").write_text(told)
        open_file(path)
    assert not [w for w in recwarn if "checksum" in str(w.message)]
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1
    for content, told in ((whole, line), (path.read_bytes(), "no checksum")):
        path.write_bytes(content)
        (tmp_path / "pytorch_model.bin.sha256").write_text(told)
        with pytest.raises(BadInput, match="its SHA-256 is not that in pytorch_model.bin.sha256"):
            open_file(path)


@pytest.mark.parametrize("harm, fits", [
    (lambda a, b: a.update(exp_avg=a["exp_avg"].double()), True), (lambda a, b: a.update(exp_avg=a["exp_avg"].T.contiguous().T), True),
    (lambda a, b: a.update(exp_avg=a["exp_avg_sq"]), True), (lambda a, b: a.update(step=b["step"]), True), (lambda a, b: a.update(step=2), True),
    (lambda a, b: a.update(exp_avg=torch.zeros(2)), False), (lambda a, b: a.update(exp_avg=a["exp_avg"] / 0), False), (lambda a, b: a.update(exp_avg_sq=-a["exp_avg_sq"]), False), (lambda a, b: a.update(step=torch.ones(3)), False),
    (lambda a, b: a.update(step=torch.tensor(float("nan"))), False), (lambda a, b: a.update(step=torch.tensor(9.0)), False), (lambda a, b: a.pop("step"), False), (lambda a, b: a.clear(), False),
])
def test_moments_of_a_stranger_get_memory_of_their_own(harm, fits, tmp_path):
    model = build(VIT)
    optimizer = train.make_optimizer(model, 0.1)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    harm(saved["state"][0], saved["state"][1])
    saved["param_groups"][0]["betas"] = "of the file"
    settings = dict(total_steps=5, micro_batch=2, processes=1, patch_dropout=0, average=False)
    run = Run(tmp_path, settings, 0, 10, model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    state = dict(settings=settings, optimizer=saved, scaler={}, best=-1.0, best_step=0, averaged=False, skipped_steps=0, losses=[], step=2)
    if not fits:
        with pytest.raises(BadInput, match="last.pt is damaged or no training snapshot"):
            run.resume(state)
        return
    assert run.resume(state) == 2 and optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    memory = [x.data_ptr() for moments in optimizer.state.values() for x in moments.values()]
    assert len(set(memory)) == len(memory)
    assert all(x.stride() == p.stride() and x.dtype == p.dtype for p, moments in optimizer.state.items() for x in (moments["exp_avg"], moments["exp_avg_sq"]))
    optimizer.step()
    assert {moments["step"].item() for moments in optimizer.state.values()} <= {2.0, 3.0}


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(BadInput, match="model.safetensors: missing, or not a file"):
            checkpoint.load(source)


def test_loaded_tensors_share_no_memory(tmp_path):
    """Neither with each other nor with the file."""
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    state["model"]["text.norm.bias"] = state["model"]["text.norm.weight"]
    state["model"]["vision.norm_pre.bias"] = torch.ones(48, 2)[:, 0]
    torch.save(state, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    model, _ = checkpoint.load(tmp_path / "a.pt")
    bias = model.text.norm.bias.clone()
    with torch.no_grad():
        model.text.norm.weight += 1
        model.vision.norm_pre.bias += 1
    assert torch.equal(model.text.norm.bias, bias) and (tmp_path / "a.pt").read_bytes() == before


def test_fingerprint_changes_with_any_change_of_the_weights_and_with_nothing_else(tmp_path):
    model = CLIP(CONFIGS["tiny"])
    first = checkpoint.fingerprint(model)
    checkpoint.save(tmp_path / "a.pt", model)
    assert checkpoint.fingerprint(checkpoint.load(tmp_path / "a.pt")[0]) == first
    model.text_projection.data = model.text_projection.data.flip(0)             # the same numbers in another order
    assert checkpoint.fingerprint(model) != first


def test_writing_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.pt.part").symlink_to(tmp_path / "precious")
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "a.pt").is_symlink()


def test_other_heads_are_another_architecture(tmp_path):
    """The same shapes, but another function."""
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    with pytest.raises(BadInput, match="do not fit .*vision_heads is 4, not 2"):
        checkpoint.load_into(build(dataclasses.replace(VIT, vision_heads=2)), checkpoint.read(tmp_path / "a.pt"), "a.pt")


def test_files_that_are_no_checkpoints(tmp_path):
    for content, message in (({"state_dict": {}}, "its tensors are not those of"), ({"a": 1}, "its tensors are not those of"), ([1, 2], "it holds a list"),
                             ({"format": FORMAT}, "not a checkpoint of this project"), ({"state_dict": 3}, "no table of named tensors"), ({3: torch.ones(1)}, "no table of named")):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(BadInput, match=f"a.pt: .*{message}"):
            checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(BadInput, match="there is no such checkpoint. Name a file, a folder, or one of cn-clip-rn50"):
        checkpoint.load(tmp_path / "b.pt")
    with pytest.raises(BadInput, match="a folder without model.safetensors or pytorch_model.bin"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(RESNET))
    model = build(VIT)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match="do not fit the architecture"):
        checkpoint.load_into(model, checkpoint.read(tmp_path / "a.pt"), "a.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------- other people's files

EVERY_FORMAT = pytest.mark.parametrize("make, write, tower", peers.FILES.values(), ids=peers.FILES)
WHOLE = pytest.mark.parametrize("make, write", [(make, write) for make, write, tower in peers.FILES.values() if not tower], ids=[k for k, v in peers.FILES.items() if not v[2]])


@WHOLE
def test_whole_models_of_others_load(make, write, tmp_path, small_sizes):
    """The format is told by the content, the sizes by the shapes; embeddings are checked in test_parity.py, here that nothing of the file is lost or changed."""
    tensors = make()
    model, transform = checkpoint.load(write(tensors, tmp_path))
    cfg = peers.VIT if model.cfg.patch_size else peers.RESNET
    assert model.cfg == cfg and transform.size == cfg.image_size and not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    theirs = {k: v for k, v in tensors.items() if not k.startswith(SKIPPED["both"])}
    back = layout_of(tensors).to_theirs(model.state_dict())
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in back)


@functools.cache
def tensors_of(name):
    return peers.FILES[name][0]()


PICKLES = (peers.cn_clip_file, peers.bare_file, peers.old_bare_file)            # the other kinds cannot hold anything but tensors


@pytest.mark.parametrize("name, how", [(name, how) for name in peers.FILES for how in ("missing", "renamed", "reshaped", "added", "not finite", "no tensor")
                                       if how != "no tensor" or peers.FILES[name][1] in PICKLES])
def test_one_wrong_tensor_in_any_format_is_named(name, how, tmp_path, small_sizes):
    _, write, tower = peers.FILES[name]
    tensors, rng = dict(tensors_of(name)), random.Random(how)
    used = sorted(k for k in tensors if not k.startswith(SKIPPED[tower or "both"]))
    for key in {used[0], used[-1], *rng.sample(used, 5)}:
        changed, named = dict(tensors), key
        if how == "missing":
            del changed[key]
        elif how == "renamed":
            changed[key + "s"] = changed.pop(key)
        elif how == "reshaped":
            changed[key] = changed[key].flatten()[1:] if changed[key].numel() > 1 else changed[key].reshape(1)
        elif how == "added":
            changed[named := key + "s"] = torch.zeros(1)
        elif how == "not finite" and changed[key].is_floating_point():
            changed[key] = torch.full_like(changed[key], float("nan"))
        elif how == "no tensor":
            changed[key] = "a string"
        if how != "not finite" or changed[key].is_floating_point():
            with pytest.raises(BadInput) as caught:
                checkpoint.read(write(changed, tmp_path), tower)
            assert named in str(caught.value) and "\n" not in str(caught.value)


@EVERY_FORMAT
def test_a_file_cut_anywhere_gives_one_line(make, write, tower, tmp_path, small_sizes):
    path, rng = write(make(), tmp_path), random.Random(0)
    path = path / "model-00002-of-00002.safetensors" if path.is_dir() else path
    whole = path.read_bytes()
    for place in [0, 1, 7, 8, 9, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))]:
        path.write_bytes(whole[:place])
        with pytest.raises(BadInput) as caught:
            checkpoint.read(tmp_path if write is peers.sharded_folder else path, tower)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_towers_file_is_no_whole_model(tmp_path, small_sizes):
    for name, message in (("openai", "an OpenAI CLIP; stage 1 takes its vision tower as --vision-weights"), ("bert-bin", "a BERT, without a vision tower; stage 1 takes it as --text-weights")):
        make, write, _ = peers.FILES[name]
        with pytest.raises(BadInput, match=message):
            checkpoint.load(write(make(), tmp_path))
    with pytest.raises(BadInput, match="a BERT, without a vision tower"):
        checkpoint.read(write(make(), tmp_path), "vision")


def test_openais_clip_from_the_hub(tmp_path, small_sizes):
    hub = peers.hub_clip_model(peers.VIT)
    hub.save_pretrained(tmp_path)
    model, (pixels, _) = CLIP(peers.VIT), peers.batch(peers.VIT)
    checkpoint.load_into(model, checkpoint.read_towers(tmp_path, None), tmp_path)
    with torch.no_grad():
        theirs = hub.visual_projection(hub.vision_model(pixels).pooler_output)
        torch.testing.assert_close(model.encode_image(pixels), F.normalize(theirs, dim=-1), rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match="model_type clip, not chinese_clip; stage 1 takes the vision tower"):
        checkpoint.load(tmp_path)


def test_half_precision_becomes_float32(tmp_path, small_sizes):
    tensors = peers.half(peers.cn_clip_model(peers.RESNET).state_dict())
    model, _ = checkpoint.load(peers.cn_clip_file(tensors, tmp_path))
    assert model.text_projection.dtype == torch.float32 and torch.equal(model.text_projection, tensors["text_projection"].float())


@pytest.mark.filterwarnings("ignore")                                           # torch's, that its rarer tensors are not finished
def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path, small_sizes):
    tensors = peers.cn_clip_model(peers.VIT).state_dict()
    for odd, what in ((torch.zeros(192, dtype=torch.int8), "int8"), (torch.zeros(1, 192).to_sparse_csr(), "sparse"),
                      (torch.zeros(192, dtype=torch.complex64), "complex64"), (torch.zeros(192).to(torch.float8_e4m3fn), "float8"), (torch.zeros(192, device="meta"), "meta"),
                      (torch.full((192,), 1e300, dtype=torch.float64), "float64"), (torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)]), "nested"),
                      (torch._neg_view(torch.ones(192)), "negated"), (torch.ones(192, dtype=torch.complex64).conj().imag, "negated"), (torch.ones(()).expand(192), "expanded")):
        with pytest.raises(BadInput, match=f"visual.ln_pre.weight is .*{what}"):
            checkpoint.load(peers.cn_clip_file(tensors | {"visual.ln_pre.weight": odd}, tmp_path))


def test_pooler_and_position_ids_are_left_out_and_said(tmp_path, small_sizes):
    extra = {"bert.pooler.dense.weight": torch.ones(64, 64), "bert.pooler.dense.bias": torch.ones(64), "bert.embeddings.position_ids": torch.arange(64)}
    path = peers.cn_clip_file(peers.cn_clip_model(peers.VIT).state_dict() | extra, tmp_path)
    assert checkpoint.read(path)["skipped"] == "bert.embeddings.position_ids* (1), bert.pooler.* (2)"


def test_heads_that_shapes_do_not_tell(tmp_path):
    path = peers.cn_clip_file(peers.cn_clip_model(peers.VIT).state_dict(), tmp_path)
    with pytest.raises(BadInput, match="shapes do not tell the heads of a vision tower 192 wide; add its sizes to CONFIGS"):
        checkpoint.load(path)


def test_another_vocabulary_is_refused(tmp_path, small_sizes):
    with pytest.raises(BadInput, match="bert.embeddings.word_embeddings.weight has 30,000 rows, but the tokenizer 21,128 tokens"):
        checkpoint.load(peers.cn_clip_file(peers.cn_clip_model(dataclasses.replace(peers.VIT, vocab_size=30000)).state_dict(), tmp_path))
    peers.hub_model(peers.VIT).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/vocab.txt").write_text("[PAD]\n一\n")
    with pytest.raises(BadInput, match="its vocab.txt holds other tokens than tokenizer/vocab.txt"):
        checkpoint.load(tmp_path / "hub")


@pytest.mark.parametrize("change, message", [({"hidden_act": "gelu"}, "says hidden_act gelu for the vision tower"), ({"layer_norm_eps": 1e-6}, "says layer_norm_eps 1e-06"), (None, "has no vision_config"),
                                             ({"num_hidden_layers": 3}, "says vision_layers 3, its tensors say 2"), ({"image_size": 64}, "says image_size 64, its tensors say 32"), ({}, "says embed_dim 31, its tensors say 32"),
                                             ({"num_attention_heads": True}, "vision_heads cannot be True"), ({"num_attention_heads": 5}, "does not divide into 5 heads")])
def test_a_folder_whose_config_asks_for_another_network_is_refused(change, message, tmp_path):
    peers.hub_model(peers.VIT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] = None if change is None else config["vision_config"] | change
    config["projection_dim"] = 31 if change == {} else 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        checkpoint.load(tmp_path)


def test_a_folder_tells_its_heads_itself(tmp_path):
    """No row of CONFIGS has these widths: config.json does it. Whole, and in shards as transformers writes them."""
    model = peers.hub_model(dataclasses.replace(peers.VIT, vision_heads=6))
    for folder, limit in ((tmp_path / "whole", "1GB"), (tmp_path / "shards", "500KB")):
        model.save_pretrained(folder, max_shard_size=limit)
        assert checkpoint.load(folder)[0].cfg.vision_heads == 6
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "model-00001-of-00002.safetensors: missing, or not a file"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "holds a list"),
    (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.bin"}}'), "does not map tensors to files of the folder"),
    (lambda f: (f / "model.safetensors.index.json").write_text((f / "model.safetensors.index.json").read_text().replace('"logit_scale": "model-00001', '"logit_scale": "model-00002')), "lists: logit_scale"),
])
def test_damaged_shards(harm, message, tmp_path, small_sizes):
    make, write, _ = peers.FILES["hub-shards"]
    write(make(), tmp_path)
    harm(tmp_path)
    with pytest.raises(BadInput, match=message):
        checkpoint.load(tmp_path)


def test_code_in_a_torchscript_archive_is_never_run(tmp_path, monkeypatch, small_sizes):
    """Neither a class that its pickle names, nor a method that torch.jit.load would run."""
    monkeypatch.chdir(tmp_path)
    make, write, _ = peers.FILES["openai-torchscript"]
    path = write(make(), tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(Code()) if name.endswith("/data.pkl") else content)
    with pytest.raises(BadInput, match="could run code: refused"):
        checkpoint.read(tmp_path / "evil.pt", "vision")
    assert not (tmp_path / "written-by-a-checkpoint").exists()
    monkeypatch.setattr(torch.jit, "load", None)                                # the reading of good ones does without it
    checkpoint.read(path, "vision")


def test_shapes_that_make_no_model(tmp_path, small_sizes):
    tensors = peers.cn_clip_model(peers.VIT).state_dict()
    for key, x, message in (("visual.positional_embedding", tensors["visual.positional_embedding"][:1], "image_size cannot be 0"), ("visual.positional_embedding", torch.zeros(0, 192), "image_size cannot be 0"),
                            ("visual.conv1.weight", torch.zeros(192, 3, 0, 0), "image_size cannot be 0|patch_size cannot be 0"), ("visual.proj", torch.zeros(192, 0), "embed_dim cannot be 0|visual.proj is"),
                            ("visual.positional_embedding", torch.zeros(16, 192), r"visual.positional_embedding is \(16, 192\)")):
        with pytest.raises(BadInput, match=message):
            checkpoint.load(peers.cn_clip_file(tensors | {key: x}, tmp_path))


def test_a_torchscript_archive_in_a_circle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"\x80\x02c__torch__\nM\n)\x81q\x00}q\x01X\x01\x00\x00\x00sh\x00sb.")      # M().s = that M
    with pytest.raises(BadInput, match="a.pt: its tensors are not those of"):
        checkpoint.read(tmp_path / "a.pt", "vision")


@pytest.mark.parametrize("cfg", [peers.VIT, peers.RESNET], ids=["vit", "resnet"])
def test_another_image_size_resizes_the_position_embeddings(cfg, tmp_path, small_sizes):
    peer = peers.cn_clip_model(cfg)
    path = peers.cn_clip_file(peer.state_dict(), tmp_path)
    size = cfg.image_size * 2
    model, transform = checkpoint.load(path, image_size=size)
    assert model.cfg == dataclasses.replace(cfg, image_size=size) and transform.size == size
    model.encode_image(torch.zeros(1, 3, size, size))
    if cfg.patch_size:                                                          # the peer resizes a ViT's alone
        from cn_clip.clip.model import resize_pos_embed
        tensors = dict(peer.state_dict())
        resize_pos_embed(tensors, peers.cn_clip_model(dataclasses.replace(cfg, image_size=size)))
        assert torch.equal(model.vision.position_embed, tensors["visual.positional_embedding"])
    else:
        old, new = peer.visual.attnpool.positional_embedding, model.vision.attention_pool.position_embed
        assert torch.equal(new[0], old[0]) and torch.equal(new[[1, 4, -4, -1]], old[[1, 2, 3, 4]])     # align_corners: the corners stay
    for wrong in (50, 0, "64", 10**6):
        with pytest.raises(BadInput, match=f"an image size of {wrong!r} does not fit: this model takes multiples of"):
            checkpoint.load(path, image_size=wrong)


def test_stage_1_takes_its_towers_from_two_files(tmp_path, small_sizes):
    files = {}
    for name in ("openai", "bert-old"):
        make, write, _ = peers.FILES[name]
        (tmp_path / name).mkdir()
        files[name] = write(make(), tmp_path / name)
    state = checkpoint.read_towers(files["openai"], files["bert-old"])
    assert checkpoint.config_of(state) == peers.VIT and all(x in state["skipped"] for x in (f"transformer.* (12) of {files['openai']}; bert.pooler.* (2), cls.* (", f" of {files['bert-old']}"))
    model = CLIP(peers.VIT)
    projection = model.text_projection.clone()
    checkpoint.load_into(model, state, "towers")
    clip, bert = peers.openai_clip_model(peers.VIT).float(), peers.bert_model(peers.VIT)
    pixels, ids = peers.batch(peers.VIT)
    ids = ids[:, :40]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), F.normalize(clip.encode_image(pixels), dim=-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.eval().text(ids), bert.bert(ids, ids.ne(0)).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(model.text_projection, projection) and torch.equal(model.logit_scale, clip.logit_scale)
    checkpoint.save(tmp_path / "short.pt", CLIP(dataclasses.replace(peers.VIT, text_positions=40, context_length=30)))
    with pytest.raises(BadInput, match="short.pt: its sizes do not fit the rest of the model"):
        checkpoint.read_towers(files["openai"], tmp_path / "short.pt")
    with pytest.raises(BadInput, match="pass --vision-weights or --model"):
        checkpoint.read_towers(None, files["bert-old"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cn-clip", "huggingface"])
def test_loading_vit_h_takes_little_more_memory_than_its_file(kind, tmp_path):
    """958 M parameters, 3.8 GB of zeros: peak memory of the whole process, Python and torch included, at most 1.3 times the file."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("under 6 GB of disk are free: no room for vit-h-14")
    with torch.device("meta"):
        layout = checkpoint.Layout("Chinese-CLIP") if kind == "cn-clip" else checkpoint.Layout("Hugging Face")
        shapes = {k: x.shape for k, x in layout.to_theirs(CLIP(CONFIGS["vit-h-14"]).state_dict()).items()}
    if kind == "cn-clip":
        file = source = tmp_path / "vit-h-14.pt"
        torch.save({"state_dict": {f"module.{k}": torch.zeros(shape) for k, shape in shapes.items()}}, file)
    else:
        file, source, ends = tmp_path / "model.safetensors", tmp_path, list(itertools.accumulate((4 * shape.numel() for shape in shapes.values()), initial=0))
        header = json.dumps({k: {"dtype": "F32", "shape": list(shapes[k]), "data_offsets": [a, b]} for k, a, b in zip(shapes, ends, ends[1:])}).encode()
        with open(file, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            f.truncate(8 + len(header) + ends[-1])                              # a hole in the file reads as zeros
    code = f"import checkpoint, resource; model, _ = checkpoint.load({str(source)!r}); print(checkpoint.name_of(model.cfg), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    name, peak = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ratio = int(peak) * (1 if sys.platform == "darwin" else 1024) / file.stat().st_size
    print(f"{kind}: peak memory {ratio:.2f} times the file of {file.stat().st_size / 2**30:.2f} GiB")
    file.unlink()
    assert name == "vit-h-14" and ratio < 1.3


# ---------------------------------------------------------------------------------------------------------------- for other tools


def test_round_trip_through_both_formats_is_bit_identical(tmp_path, small_sizes):
    first = peers.cn_clip_file(peers.cn_clip_model(peers.VIT).state_dict(), tmp_path)
    checkpoint.export(checkpoint.load(first)[0], tmp_path / "hub", "huggingface")
    checkpoint.export(checkpoint.load(tmp_path / "hub")[0], tmp_path / "last.pt", "cn-clip")
    before, after = (torch.load(path)["state_dict"] for path in (first, tmp_path / "last.pt"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) and after[k].is_contiguous() for k in before)
    assert checkpoint.load(tmp_path / "hub")[0].cfg == peers.VIT
    assert (tmp_path / "last.pt").stat().st_size < 1.01 * sum(4 * x.numel() for x in after.values()) + 50_000      # no tensor drags a bigger one along


@pytest.mark.slow
def test_cn_clip_opens_its_export(tmp_path):
    import cn_clip.clip

    for name in ("rn50", "vit-b-16"):
        torch.manual_seed(0)
        model = CLIP(CONFIGS[name]).eval()
        said = checkpoint.export(model, tmp_path / f"{name}.pt", "cn-clip")
        names = {"cn_clip": cn_clip}
        exec(said.removeprefix(f"{tmp_path / name}.pt: "), names)               # what the line says
        peer = names["model"]
        assert not peer.training
        for key, x in checkpoint.Layout("Chinese-CLIP", resnet=None if name == "vit-b-16" else (3, 4, 6, 3)).to_theirs(model.state_dict()).items():
            torch.testing.assert_close(peer.state_dict()[key], x, rtol=1e-3, atol=1e-6)             # it casts to half precision in between


def test_transformers_opens_its_export_with_processor(tmp_path, small_sizes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = CLIP(peers.VIT).eval()
    checkpoint.export(model, tmp_path / "hub", "huggingface")
    hub, processor = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "hub"), transformers.ChineseCLIPProcessor.from_pretrained(tmp_path / "hub")
    image = Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 60).convert("RGB")
    texts = ["一只猫", "明月松间照，清泉石上流", "A Cat"]
    inputs = processor(text=texts, images=image, return_tensors="pt", padding=True)
    ids = Tokenizer()(texts)
    assert torch.equal(F.pad(inputs["input_ids"], (0, 52 - inputs["input_ids"].shape[1])), ids)
    torch.testing.assert_close(inputs["pixel_values"][0], Transform(32)(image), rtol=0, atol=0.02)      # torchvision resizes there, Pillow here: a grey level
    with torch.no_grad():
        out = hub(**inputs)
        torch.testing.assert_close(out.image_embeds, model.encode_image(inputs["pixel_values"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.text_embeds, model.encode_text(ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.logits_per_text, model.logit_scale.exp() * out.text_embeds @ out.image_embeds.T, rtol=1e-4, atol=1e-4)


def test_export_refuses_what_others_could_not_read(tmp_path, small_sizes):
    (tmp_path / "there.pt").write_text("precious")
    for model, path, format, message in (
        (CLIP(peers.VIT), "there.pt", "cn-clip", "is there already"),
        (CLIP(peers.VIT), "", "huggingface", "is there already"),
        (CLIP(peers.VIT), "no/where.pt", "cn-clip", "does not exist"),
        (CLIP(peers.VIT), "x" * 300, "cn-clip", "x: cannot be written .*too long"),
        (CLIP(peers.VIT), "there.pt/a.pt", "cn-clip", "does not exist"),
        (CLIP(peers.RESNET), "a", "huggingface", "transformers has no ChineseCLIPModel with a ResNet"),
        (CLIP(dataclasses.replace(peers.VIT, vision_heads=6)), "a.pt", "cn-clip", "its readers take 3 for the vision tower; this model has 6"),
        (CLIP(VIT), "a.pt", "cn-clip", "other tools know 21,128 tokens, not 200"),
        (CLIP(peers.VIT), "a.pt", "onnx", "cn-clip or huggingface"),
    ):
        with pytest.raises(BadInput, match=message):
            checkpoint.export(model, tmp_path / path, format)
    broken = CLIP(peers.VIT)
    broken.text.norm.weight.data[0] = float("nan")
    with pytest.raises(BadInput, match="text.norm.weight holds NaN"):
        checkpoint.export(broken, tmp_path / "a.pt", "cn-clip")
    assert (tmp_path / "there.pt").read_text() == "precious" and [p.name for p in tmp_path.iterdir()] == ["there.pt"]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path, small_sizes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        for format in ("cn-clip", "huggingface"):
            with pytest.raises(BadInput, match="/out: cannot be written"):
                checkpoint.export(CLIP(peers.VIT), tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_command_line(called, stopped, tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "own.pt", CLIP(CONFIGS["tiny"]))
    assert "own.pt: CE-CLIP, tiny, 4,918,361 parameters, images of 64 x 64, temperature 0.0700" in called(checkpoint, tmp_path / "own.pt")
    assert "has no name for these sizes" in called(checkpoint, tmp_path / "own.pt", "--export", tmp_path / "peer.pt")
    assert "peer.pt: Chinese-CLIP, tiny, 4,918,361 parameters" in called(checkpoint, tmp_path / "peer.pt")
    assert "images of 96 x 96" in called(checkpoint, tmp_path / "peer.pt", "--image-size", 96)
    assert "is there already" in stopped(checkpoint, tmp_path / "own.pt", "--export", tmp_path / "peer.pt")
    assert "there is no such checkpoint" in refused("checkpoint.py", tmp_path / "other.pt")
    before, after = checkpoint.load(tmp_path / "own.pt")[0], checkpoint.load(tmp_path / "peer.pt")[0]
    assert before.cfg == after.cfg and all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))


# ---------------------------------------------------------------------------------------------------------------- by name


def test_a_name_downloads_once(hub, tmp_path, small_sizes):
    path = peers.cn_clip_file(peers.cn_clip_model(peers.RESNET).state_dict(), tmp_path)
    hub.content = path.read_bytes()
    hub.tag = hashlib.sha256(hub.content).hexdigest()
    for _ in range(2):
        model, _ = checkpoint.load("cn-clip-rn50")
    assert model.cfg == peers.RESNET and [what for what, _, _ in hub.asked] == ["HEAD", "GET"]


def test_a_damaged_file_in_the_cache_says_what_to_do(hub, tmp_path):
    hub.content = b"not a checkpoint"
    hub.tag = hashlib.sha256(hub.content).hexdigest()
    with pytest.raises(BadInput, match="clip_cn_rn50.pt: not a readable checkpoint.*Delete .*/blobs/.* to download it again"):
        checkpoint.load("cn-clip-rn50")
