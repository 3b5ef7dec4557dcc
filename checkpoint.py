"""The only door for weights: snapshots out, atomically; checkpoints in, checked.

    import checkpoint
    model, transform = checkpoint.load("runs/own/best.pt")       # evaluation mode, float32, and the picture transform that fits it

A checkpoint is a dictionary: format, config (the sizes of model.Config), model (its tensors); a training snapshot adds what the run needs to continue.
"""
import contextlib
import dataclasses
import os
import zipfile
from pathlib import Path

import torch

from data import BadInput, Transform
from model import CLIP, CONFIGS, Config

FORMAT = "ce-clip 1"


def save(path, model, **extra):
    """Write a checkpoint, whole or not at all."""
    write(path, lambda f: torch.save({"format": FORMAT, "config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **extra}, f))


def write(path, fill):
    """At every moment `path` is the old file or the whole new one: `fill` writes it beside its place, it is flushed to the disk, then renamed."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                                    # torch.save turns "disk full" into a RuntimeError about its archive
        with contextlib.suppress(OSError):
            part.unlink()                                                       # a full disk needs the room
        raise BadInput(f"{path}: cannot be written ({error.__context__ or error}); what stood there before is unchanged") from None


def read(path):
    """The dictionary in a checkpoint file. Never executes code from the file (weights_only); raises BadInput when it is missing, damaged or not ours."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:                                  # torch.load itself checks no checksums
            if archive.testzip():
                raise zipfile.BadZipFile("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # torch raises many kinds for a damaged file
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("config"), dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this project (it needs the entries format = {FORMAT!r}, config, model)")
    try:
        empty_model(state)
    except Exception as error:                                                  # a config can be wrong in as many ways
        raise BadInput(f"{path}: its config does not describe a model of this version ({type(error).__name__}: {error})") from None
    return state


def load(path, device="cpu"):
    """-> (model in evaluation mode and float32, transform: PIL picture -> (3, R, R))."""
    state = read(path)
    model = empty_model(state)
    load_into(model, state, path, assign=True)
    return model.eval().to(device), Transform(model.cfg.image_size)


def config_of(state):
    """The sizes that a checkpoint was made with."""
    return Config(**state["config"])


def empty_model(state):
    """The model of a checkpoint, with shapes but no memory for its weights yet."""
    with torch.device("meta"):
        return CLIP(config_of(state))


def load_into(model, state, path, parts=("",), assign=False):
    """Copy a checkpoint's tensors into the model, or with `assign` make them the model's own: all whose names begin with one of `parts`, each of the same shape and type,
    or BadInput and nothing changes.
    """
    mine, theirs = ({k: v for k, v in tensors.items() if str(k).startswith(parts)} for tensors in (model.state_dict(), state["model"]))
    kind = lambda x: f"{tuple(x.shape)} {x.dtype}".replace("torch.", "") if torch.is_tensor(x) else f"a {type(x).__name__}"
    wrong = [f"{k} is missing" for k in mine.keys() - theirs.keys()] + [f"{k} is unknown" for k in theirs.keys() - mine.keys()]
    wrong += [f"{k} is {kind(theirs[k])}, not {kind(mine[k])}" for k in mine.keys() & theirs.keys() if kind(theirs[k]) != kind(mine[k])]
    if wrong:
        raise BadInput(f"{path}: the tensors do not fit the architecture {name_of(model.cfg)} (the file says {name_of(config_of(state))}): {sorted(wrong, key=str)[0]}")
    broken = [k for k, x in theirs.items() if not x.isfinite().all()]
    if broken:
        raise BadInput(f"{path}: {broken[0]} holds NaN or infinity: the file is damaged, or the training that wrote it diverged")
    model.load_state_dict(model.state_dict() | theirs, assign=assign)


def name_of(config):
    """The table's name of a config, or "custom"."""
    return next((name for name, known in CONFIGS.items() if known == config), "custom")
