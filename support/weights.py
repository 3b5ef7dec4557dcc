"""Checkpoints: our own format, written and read, and every released format, read.

    ours                {"format", "config", "model"}; a snapshot adds what the run resumes from
    Chinese-CLIP        {"state_dict": {"module.visual…", "module.bert…"}}, or the inner table
    Hugging Face        a folder of ChineseCLIPModel: config.json with .safetensors or .bin files
    OpenAI CLIP, BERT   for stage 1, a vision or a text tower alone

The content tells the format, and the tensors' shapes the sizes.
"""
import argparse
import dataclasses
import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from model import Config
from support import system
from support.exports import check_free, export
from support.formats import (TABLES, TOWER_KEYS, check_names_and_shapes, check_tensors,
                             closest_config, config_of, empty_model, name_of, read_foreign)
from support.images import Transform
from support.system import BadInput
from support.weight_files import open_file, open_folder

FORMAT = "ce-clip 1"
NAMES = TABLES["released"]              # name -> repository and file on the Hugging Face hub
TOWER_SIZES = TABLES["sizes"]           # the fields of Config that describe each tower

# ---- a file and a model


def save(path, model, **extra):
    """Write a checkpoint, whole or not at all. `extra`: more entries, plain values and tensors."""
    content = {"format": FORMAT, "config": dataclasses.asdict(model.cfg),
               "model": model.state_dict(), **extra}
    system.write(path, lambda f: torch.save(content, f))


def load(source, device="cpu", image_size=None):
    """A file, a folder or a name of NAMES -> (model, transform).

    The model is in evaluation mode and float32; transform: PIL image -> (3, R, R). `image_size`:
    R in pixels, if not that of the training. BadInput when a tensor is missing, unknown, of another
    shape or not finite. Tensors of a .pt file stay in its pages (mmap) until they change: replace
    the file by renaming, never by overwriting.
    """
    model = model_of(resized(read(source), image_size))
    return model.to(device), Transform(model.cfg.image_size)


def model_of(state):
    """What `read` gives -> the model, in evaluation mode and float32."""
    model, tensors, seen = empty_model(config_of(state)), {}, set()
    for key, x in state["model"].items():
        memory = x.untyped_storage().data_ptr()
        view = memory in seen or not x.is_contiguous()  # training one must not change another
        tensors[key] = x.clone(memory_format=torch.contiguous_format) if view else x
        seen.add(memory)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_into(model, state, source):
    """Copy a checkpoint's tensors into the model.

    A state of `read_towers` fills its towers alone. Position embeddings are resized to the model's
    image size. BadInput, and nothing changes, when the architecture is another one.
    """
    config, towers = config_of(state), state.get("towers", ("vision", "text"))
    if "vision" in towers and config.patch_size == model.cfg.patch_size:
        state = resized(state, model.cfg.image_size)
    expected = model.state_dict()
    if "towers" in state:
        prefixes = tuple(prefix for tower in towers for prefix in TOWER_KEYS[tower])
        expected = {key: x for key, x in expected.items() if key.startswith(prefixes)}
    message = (f"{source}: the tensors do not fit the architecture {name_of(model.cfg)} "
               f"(the file says {name_of(config)})")
    check_names_and_shapes(state["model"], expected, message)
    for field in [f"{tower}_heads" for tower in towers]:        # shapes do not tell the heads
        if getattr(config, field) != getattr(model.cfg, field):
            raise BadInput(f"{message}: {field} is {getattr(config, field)}, "
                           f"not {getattr(model.cfg, field)}")
    model.load_state_dict(state["model"], strict=False)         # the other tower stays


def fingerprint(model):
    """16 letters that tell these weights from others, whatever file they come from (1 s a GB)."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def vision_facts(model):
    """What image embeddings depend on: {"vision tower": its fingerprint, and its sizes}."""
    sizes = {field: getattr(model.cfg, field) for field in TOWER_SIZES["vision"]}
    return {"vision tower": fingerprint(model.vision), **sizes}


# ---- reading


def read(source, tower=None, mapped=True):
    """Any checkpoint -> {"config": sizes, "model": tensors under our names, …}, checked.

    Our own files keep their other entries; those of others get "layout" and "skipped". `tower`
    "vision" or "text": that tower alone. `mapped`: the tensors of a .pt file stay in its pages,
    which processes share; otherwise they are read into memory. BadInput.
    """
    path = find(source)
    try:
        content = open_folder(path) if path.is_dir() else open_file(path, mapped)
    except BadInput as error:
        if path == Path(source):
            raise
        # resolve: in the hub's cache the path is a link
        raise BadInput(f"{error}. Delete {path.resolve()} to download it again") from None
    own = content.get("format") == FORMAT
    state = read_own(content, path) if own else read_foreign(content, path, tower)
    if tower is not None:
        sizes = vars(config_of(state))
        state["config"] = {field: sizes[field] for field in TOWER_SIZES[tower]}
        state["model"] = {key: x for key, x in state["model"].items()
                          if key.startswith(TOWER_KEYS[tower])}
    return state


def find(source):
    """A path, or a name of NAMES, whose file is downloaded once -> path. Raises BadInput."""
    if os.path.exists(source):
        return Path(source)
    if str(source) not in NAMES:
        raise BadInput(f"{source}: there is no such checkpoint. Name a file, a folder, "
                       f"or one of {', '.join(NAMES)}")
    return system.download(*NAMES[str(source)], "pass its path")


def read_own(state, path):
    """What a file of ours holds, checked: the tensors are those of its config, and finite."""
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this project (it lacks config or model)")
    try:
        config = config_of(state)
        blocks = config.vision_layers if config.patch_size else sum(config.vision_layers)
        if blocks + config.text_layers > len(state["model"]):       # a large model takes long
            raise ValueError("it has more layers than tensors")
        expected = empty_model(config).state_dict()
    except Exception as error:                          # a config can be wrong in many ways
        raise BadInput(f"{path}: its config describes no model of this version "
                       f"({str(error)[:200]})") from None
    check_tensors(state["model"], expected, path, config)
    # read_foreign and read_towers add these entries; a file must not bring them
    entries = {k: v for k, v in state.items() if k not in ("layout", "towers", "skipped")}
    return entries | {"model": {key: x.detach() for key, x in state["model"].items()}}


def read_towers(vision, text, config=None):
    """The start of stage 1: vision tower and temperature of one checkpoint, text tower of another.

    Either may be None; load_into then leaves that tower as it is. Sizes that the files do not tell
    are those of `config`, or of the row of CONFIGS with that vision tower. BadInput when the towers
    do not go together.
    """
    if vision is None and config is None:
        raise BadInput(f"--text-weights {text}: pass --vision-weights or --model, too")
    sources = {"vision": vision, "text": text}
    states = {tower: read(source, tower) for tower, source in sources.items() if source is not None}
    config = config or closest_config(states["vision"]["config"])
    sizes, tensors, skipped = dataclasses.asdict(config), {}, []
    for tower, state in states.items():
        sizes |= state["config"]
        tensors |= state["model"]
        if state.get("skipped"):
            skipped.append(f"{state['skipped']} of {sources[tower]}")
    try:
        empty_model(Config(**sizes))
    except ValueError as error:
        raise BadInput(f"{text}: its sizes do not fit the rest of the model ({error})") from None
    return {"config": sizes, "model": tensors, "towers": tuple(states),
            "skipped": "; ".join(skipped)}


def resized(state, image_size):
    """The same weights for images of another size, in pixels: position embeddings are interpolated.

    None: their own size. BadInput for a size that the model cannot have.
    """
    config = config_of(state)
    step = config.patch_size or 32                      # a ResNet halves its map five times
    if image_size in (None, config.image_size):
        return state
    if not isinstance(image_size, int) or not 0 < image_size <= 4096 or image_size % step:
        raise BadInput(f"an image size of {image_size!r} does not fit: "
                       f"this model takes multiples of {step}, up to 4096")
    key = "vision.position_embed" if config.patch_size else "vision.attention_pool.position_embed"
    table, side, new = state["model"][key], config.image_size // step, image_size // step
    # The first row (class token or mean position) stays.
    grid = table[1:].view(1, side, side, -1).permute(0, 3, 1, 2)                # (1, C, side, side)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=True)  # as Chinese-CLIP
    rows = grid.permute(0, 2, 3, 1).reshape(new * new, -1)                      # (new², C)
    table = torch.cat([table[:1], rows])                                        # (1 + new², C)
    return state | {"config": state["config"] | {"image_size": image_size},
                    "model": state["model"] | {key: table}}


def trained_on(state):
    """What `read` gives -> [(value of --data, stage), …]: the training of these weights so far."""
    settings = state.get("settings")
    try:
        runs = [(str(data), str(stage)) for data, stage in settings.get("seen") or []]  # earlier
        if state.get("step"):
            runs.append((str(settings.get("data")), settings.get("stage")))
    except (AttributeError, RuntimeError, TypeError, ValueError):       # no settings of ours
        return []
    return runs


def main():
    parser = argparse.ArgumentParser(description="Check a checkpoint; write it for other tools.")
    parser.add_argument("source", help=f"a file, a folder, or one of {', '.join(NAMES)}")
    parser.add_argument("--image-size", type=int,
                        help="images of another size: position embeddings are resized")
    parser.add_argument("--export", metavar="PATH", help="write the model there")
    parser.add_argument("--format", choices=("cn-clip", "huggingface"), default="cn-clip",
                        help="of --export: a .pt file (default) or a folder for transformers")
    args = parser.parse_args()
    if args.export is not None:
        check_free(args.export)                         # before the reading, which takes longer
    state = resized(read(args.source), args.image_size)
    model = model_of(state)
    count, side = sum(p.numel() for p in model.parameters()), model.cfg.image_size
    print(f"{args.source}: {state.get('layout', 'CE-CLIP')}, {name_of(model.cfg)}, "
          f"{count:,} parameters, images of {side} x {side}, "
          f"temperature {(-model.logit_scale).exp().item():.4f}")
    if state.get("skipped"):
        print(f"left out: {state['skipped']}")
    if args.export is not None:
        print(export(model, args.export, args.format))
