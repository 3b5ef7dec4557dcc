"""The only door for weights: snapshots out, atomically; checkpoints in, checked.

    import checkpoint
    model, transform = checkpoint.load("runs/own/best.pt")       # evaluation mode, float32, and the picture transform that fits it

A checkpoint is a dictionary: format, config (the sizes of model.Config), model (its tensors); a training snapshot adds what the run needs to continue.
"""
import dataclasses
import os
from pathlib import Path

import torch

from data import BadInput, Transform
from model import CLIP, CONFIGS, Config

FORMAT = "ce-clip 1"


def save(path, model, **extra):
    """Write a checkpoint. At every moment `path` is the old file or the whole new one: written beside it, flushed to the disk, then renamed."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        torch.save({"format": FORMAT, "config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **extra}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def write_text(path, text):
    """A small text file, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read(path):
    """The dictionary in a checkpoint file. Never executes code from the file (weights_only); raises BadInput when it is missing, damaged or not ours."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: there is no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # torch raises many kinds for a damaged file
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("config"), dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this project (it needs the entries format = {FORMAT!r}, config, model)")
    return state


def load(path, device="cpu"):
    """-> (model in evaluation mode and float32, transform: PIL picture -> (3, R, R))."""
    state = read(path)
    model = CLIP(config_of(state))
    load_into(model, state, path)
    return model.eval().to(device), Transform(model.cfg.image_size)


def config_of(state):
    """The sizes that a checkpoint was made with."""
    return Config(**state["config"])


def load_into(model, state, path):
    """Copy a checkpoint's tensors into the model: all of them, each of the same shape, or BadInput and nothing is copied."""
    mine, theirs = model.state_dict(), state["model"]
    wrong = [f"{k} is missing" for k in mine.keys() - theirs.keys()] + [f"{k} is unknown" for k in theirs.keys() - mine.keys()]
    wrong += [f"{k} is {tuple(theirs[k].shape)}, not {tuple(mine[k].shape)}" for k in mine.keys() & theirs.keys() if mine[k].shape != theirs[k].shape]
    if wrong:
        raise BadInput(f"{path}: a checkpoint of another architecture ({name_of(config_of(state))}, not {name_of(model.cfg)}): {sorted(wrong)[0]}")
    model.load_state_dict(theirs)


def name_of(config):
    """The table's name of a config, or "custom"."""
    return next((name for name, known in CONFIGS.items() if known == config), "custom")
