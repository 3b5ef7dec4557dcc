"""Whether tensors are those of a model: all there, none besides, of its shapes and types, finite.

    model = empty_model(config_of(state))
    check_tensors(state["model"], model.state_dict(), path, model.cfg)
"""
import torch

from model import CLIP, CONFIGS, Config
from support.system import BadInput


def config_of(state):
    """The Config of a checkpoint, as `read` gives it."""
    return Config(**state["config"])


def name_of(config):
    """The name of a config in CONFIGS, or "custom"."""
    return next((name for name, known in CONFIGS.items() if known == config), "custom")


def closest_config(sizes):
    """The row of CONFIGS with these sizes, at any image size; without one, that of vit-b-16."""
    for config in CONFIGS.values():
        known = vars(config) | {"image_size": sizes.get("image_size")}
        if all(known[field] == value for field, value in sizes.items()):
            return config
    return CONFIGS["vit-b-16"]


def empty_model(config):
    """A model with shapes but without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        return CLIP(config)


def check_tensors(tensors, expected, path, config):
    """BadInput unless names, shapes and types are those of `expected` and all numbers finite."""
    check_names_and_shapes(tensors, expected, f"{path}: not a whole model ({name_of(config)})")
    for key, x in tensors.items():
        if x.is_meta:
            raise BadInput(f"{path}: {key} has a shape but no numbers (a meta tensor)")
        if not x.isfinite().all():
            raise BadInput(f"{path}: {key} holds NaN or infinity: the file is damaged, "
                           "or the training that wrote it diverged")


def check_names_and_shapes(tensors, expected, message):
    """BadInput, with up to three names, unless names, shapes and types are those of `expected`."""
    wrong = []
    for key in expected.keys() | tensors.keys():
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif key not in expected:
            wrong.append(f"{key} is unknown")
        elif describe(tensors[key]) != describe(expected[key]):
            wrong.append(f"{key} is {describe(tensors[key])}, not {describe(expected[key])}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(f"{message}: {'; '.join(sorted(wrong)[:3])}{more}")


def describe(x):
    """Shape and type of a dense tensor, in words; of anything else, what it is."""
    if is_dense(x):
        return f"{tuple(x.shape)} {x.dtype}".replace("torch.", "")
    if torch.is_tensor(x):
        return f"a {'nested' if x.is_nested else x.layout} tensor"
    return f"a {type(x).__name__}"


def is_dense(x):
    """Whether x is an ordinary tensor: not sparse, not nested."""
    return torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested
