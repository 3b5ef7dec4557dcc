"""Checkpoints: a round trip, atomic writing, and refusal of everything that is not exactly right."""
import pickle
import resource

import pytest
import torch
from test_model import RESNET, VIT, batch, build

import checkpoint
from data import BadInput


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
        with pytest.raises(BadInput, match="a.pt: cannot be written .*; what stood there before is unchanged"):
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
    torch.save({"format": checkpoint.FORMAT, "model": Code()}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Code()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(BadInput, match="not a readable checkpoint"):
            checkpoint.load(name)
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


@pytest.mark.parametrize("change", [{"vision_heads": 0}, {"embed_dim": -1}, {"text_width": "wide"}, {"colour": "red"}])
def test_configs_that_describe_no_model(tmp_path, change):
    checkpoint.save(tmp_path / "a.pt", build(VIT))
    state = torch.load(tmp_path / "a.pt")
    torch.save({**state, "config": state["config"] | change}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="a.pt: "):
        checkpoint.load(tmp_path / "a.pt")


def test_foreign_and_missing_files(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint of this project"):
        checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(BadInput, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "b.pt")


def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(tmp_path):
    checkpoint.save(tmp_path / "a.pt", build(RESNET))
    model = build(VIT)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match="do not fit the architecture"):
        checkpoint.load_into(model, checkpoint.read(tmp_path / "a.pt"), "a.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
