"""The only door for weights: every released format in, checked; two formats out; training snapshots, atomically.

    import checkpoint
    model, transform = checkpoint.load("clip_cn_vit-b-16.pt")    # any file or folder below: evaluation mode, float32; its image transform
    model, transform = checkpoint.load("cn-clip-vit-b-16")       # by name: downloads once (see NAMES)
    checkpoint.export(model, "own.pt", format="cn-clip")         # or "huggingface": a folder for transformers' ChineseCLIPModel

    python checkpoint.py cn-clip-vit-b-16                        # download it, check it, say what it is
    python checkpoint.py runs/own/best.pt --export own-hf --format huggingface

What is read. The content tells the format, the tensors' shapes the sizes; what shapes do not tell, the number of heads, comes
from config.json or the table CONFIGS.

    ours                    {"format", "config", "model"}; a training snapshot adds what the run needs to continue
    Chinese-CLIP            .pt {"state_dict": {"module.visual…", "module.bert…"}}, also after FlashAttention, or the bare state dict
    Hugging Face            ChineseCLIPModel: a folder with config.json and .safetensors or .bin, whole or in shards
    OpenAI CLIP             only its vision tower, for stage 1: TorchScript archive, state dict, or Hugging Face CLIPModel
    BERT, RoBERTa, RBT3     only a text tower, for stage 1: Hugging Face .safetensors or .bin

A tensor of the file is either used, or on a short list of what is left out (SKIPPED), or the file is refused with the tensor's
name. No code of a file ever runs.
"""
import argparse
import dataclasses
import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from support import system
from support.exports import export, free_place
from support.formats import TOWER_KEYS, TOWER_SIZES, check, compare, config_of, empty_model, name_of, read_foreign, row_like
from support.images import Transform
from support.system import BadInput, write
from support.weight_files import open_file, open_folder

FORMAT = "ce-clip 1"

# Released weights: name -> repository and file on the Hugging Face hub.
NAMES = {
    "cn-clip-rn50": ("OFA-Sys/chinese-clip-rn50", "clip_cn_rn50.pt"),
    "cn-clip-vit-b-16": ("OFA-Sys/chinese-clip-vit-base-patch16", "clip_cn_vit-b-16.pt"),
    "cn-clip-vit-l-14": ("OFA-Sys/chinese-clip-vit-large-patch14", "clip_cn_vit-l-14.pt"),
    "cn-clip-vit-l-14-336": ("OFA-Sys/chinese-clip-vit-large-patch14-336px", "clip_cn_vit-l-14-336.pt"),
    "cn-clip-vit-h-14": ("OFA-Sys/chinese-clip-vit-huge-patch14", "clip_cn_vit-h-14.pt"),
}


# ---------------------------------------------------------------------------------------------------------------- write our own


def save(path, model, **extra):
    """Write a checkpoint, whole or not at all; `extra`: more entries, of plain values and tensors. BadInput when it cannot be written."""
    content = {"format": FORMAT, "config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **extra}
    write(path, lambda f: torch.save(content, f))


# ---------------------------------------------------------------------------------------------------------------- read


def load(source, device="cpu", image_size=None):
    """A file, a folder or a name of NAMES -> (model in evaluation mode and float32, transform: PIL image -> (3, R, R)).

    `image_size` asks for another image side R, in pixels, than the weights were trained with. Raises BadInput when a tensor is
    missing, unknown, of another shape or not finite. Tensors of a .pt file stay in its pages (mmap) until they are changed: while
    the model lives, replace such a file by renaming, never by overwriting it.
    """
    state = read(source)
    model = model_of(state if image_size is None else resized(state, image_size), source)
    return model.to(device), Transform(model.cfg.image_size)


def model_of(state, source):
    """What `read` gives -> the model, in evaluation mode and float32."""
    model = empty_model(config_of(state))
    load_into(model, state, source, assign=True)
    return model.eval()


def seen_by(state):
    """What `read` gives -> [(a value of --data, its stage), …] that these weights were trained on, in order, as far as the file tells."""
    settings = state.get("settings")
    if not isinstance(settings, dict):                                          # released weights
        return []
    earlier = [tuple(map(str, one)) for one in settings.get("seen") or []]      # by the runs that this one started from
    return earlier + ([(str(settings.get("data")), settings.get("stage"))] if state.get("step") else [])


def fingerprint(model):
    """16 letters that are the same for the same weights, whatever file they come from, and others for others (about 1 s a GB)."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read(source, tower=None, mapped=True):
    """Any checkpoint -> {"config": sizes, "model": tensors under our names, …}, checked; BadInput when it is not whole.

    Our own files keep their other entries; foreign ones get "layout" and "skipped". `tower` "vision" or "text": the tensors and
    sizes of that tower alone. `mapped`: the tensors of a .pt file stay in its pages, which several processes share; otherwise they
    are read into memory.
    """
    path = find(source)
    try:
        content = open_folder(path) if path.is_dir() else open_file(path, mapped)
    except BadInput as error:
        if path == Path(source):
            raise
        # in the hub's cache the path is a link
        raise BadInput(f"{error}. Delete {path.resolve()}, and it will be downloaded again") from None
    state = read_own(content, path) if content.get("format") == FORMAT else read_foreign(content, path, tower)
    if tower is None:
        return state
    config = {field: value for field, value in state["config"].items() if field in TOWER_SIZES[tower]}
    model = {key: x for key, x in state["model"].items() if key.startswith(TOWER_KEYS[tower])}
    return state | {"config": config, "model": model}


def read_own(state, path):
    """What a file of ours holds, checked: every tensor has the shape that its config asks for, and is finite."""
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this project (it needs the entries format = {FORMAT!r}, config, model)")
    try:
        expected = empty_model(config_of(state)).state_dict()
    except Exception as error:                                                  # a config can be wrong in many ways
        raise BadInput(f"{path}: its config does not describe a model of this version ({type(error).__name__}: {error})") from None
    check(state["model"], expected, path, config_of(state))
    # what read_foreign and read_towers say of a file, the file must not say of itself
    entries = {key: value for key, value in state.items() if key not in ("layout", "towers", "skipped")}
    return entries | {"model": {key: x.detach() for key, x in state["model"].items()}}


def read_towers(vision, text, config=None):
    """The start of stage 1: the vision tower (and the temperature) of one checkpoint, the text tower of another.

    Either may be None; load_into then leaves that tower as it is. Sizes that the files do not tell are those of `config`; without
    it, those of the row of CONFIGS with that vision tower. BadInput when the towers do not go together.
    """
    if vision is None and config is None:
        raise BadInput(f"--text-weights {text}: which vision tower goes with it? Pass --vision-weights or --model")
    sources = {tower: source for tower, source in (("vision", vision), ("text", text)) if source is not None}
    states = {tower: read(source, tower) for tower, source in sources.items()}
    merged = {"config": dataclasses.asdict(config or row_like(states["vision"]["config"])), "model": {}, "towers": tuple(states)}
    for state in states.values():
        merged["config"] |= state["config"]
        merged["model"] |= state["model"]
    try:
        empty_model(config_of(merged))
    except ValueError as error:
        raise BadInput(f"{text}: its sizes do not go together with the rest of the model ({error})") from None
    skipped = [f"{state['skipped']} of {sources[tower]}" for tower, state in states.items() if state.get("skipped")]
    return merged | {"skipped": "; ".join(skipped)}


def load_into(model, state, source, assign=False):
    """Copy a checkpoint's tensors into the model, or with `assign` make them the model's own.

    Of what `read_towers` gives, those of its towers. For a model that differs in the image size, position embeddings are
    resized. BadInput, and nothing changes, when the tensors are those of another architecture.
    """
    config, towers = config_of(state), state.get("towers", ("vision", "text"))
    if "vision" in towers and config.patch_size == model.cfg.patch_size:
        state = resized(state, model.cfg.image_size)
    # every key begins with ""
    keys = tuple(key for tower in state["towers"] for key in TOWER_KEYS[tower]) if "towers" in state else ""
    message = f"{source}: the tensors do not fit the architecture {name_of(model.cfg)} (the file says {name_of(config)})"
    compare(state["model"], {key: x for key, x in model.state_dict().items() if key.startswith(keys)}, message)
    for field in (f"{tower}_heads" for tower in towers):                        # shapes cannot tell heads
        if getattr(config, field) != getattr(model.cfg, field):
            raise BadInput(f"{message}: {field} is {getattr(config, field)}, not {getattr(model.cfg, field)}")
    model.load_state_dict(model.state_dict() | (apart(state["model"]) if assign else state["model"]), assign=assign)


def apart(tensors):
    """The same tensors, none sharing memory with another or with itself, as views in a file may: changing one must not change the other."""
    seen, result = set(), {}
    for key, x in tensors.items():
        memory = x.untyped_storage().data_ptr()
        result[key] = x.clone(memory_format=torch.contiguous_format) if memory in seen or not x.is_contiguous() else x
        seen.add(memory)
    return result


def resized(state, image_size):
    """The same weights for images of another size, in pixels: the grid of position embeddings is interpolated.

    Its first row (class token or mean position) stays. BadInput for a size that the model cannot have.
    """
    config = config_of(state)
    step = config.patch_size or 32                                              # a ResNet halves its map five times
    if image_size == config.image_size:
        return state
    if not isinstance(image_size, int) or not 0 < image_size <= 4096 or image_size % step:
        raise BadInput(f"a image size of {image_size!r} does not fit: this model takes multiples of {step}, up to 4096")
    key = "vision.position_embed" if config.patch_size else "vision.attention_pool.position_embed"
    table, side, new = state["model"][key], config.image_size // step, image_size // step
    grid = table[1:].view(1, side, side, -1).permute(0, 3, 1, 2)                                    # (1, C, side, side)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)                 # as Chinese-CLIP does
    table = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])                 # (1 + new², C)
    return state | {"config": state["config"] | {"image_size": image_size}, "model": state["model"] | {key: table}}


# ---------------------------------------------------------------------------------------------------------------- files


def find(source):
    """A path, or a name of NAMES, whose file is downloaded once -> path. Raises BadInput."""
    path = Path(source)
    if str(source) and os.path.exists(path):
        return path
    if str(source) not in NAMES:
        raise BadInput(f"{source}: there is no such checkpoint. Name a file, a folder, or one of {', '.join(NAMES)}")
    repo, name = NAMES[str(source)]
    kept = system.cache_folder() / name                 # an older version downloaded it to here
    return kept if kept.is_file() else system.download(repo, name, "pass its path")


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description="Check a checkpoint and say what it is; or write it for other tools.")
    parser.add_argument("source", help=f"a file, a folder, or one of {', '.join(NAMES)}")
    parser.add_argument("--image-size", type=int, help="images of another size: position embeddings are resized")
    parser.add_argument("--export", metavar="PATH", help="write the model there")
    parser.add_argument("--format", choices=("cn-clip", "huggingface"), default="cn-clip",
                        help="of --export: a .pt file for cn_clip, or a folder for transformers (default: cn-clip)")
    args = parser.parse_args()
    if args.export is not None:
        free_place(args.export)                                                 # before the reading, which takes longer
    state = read(args.source)
    if args.image_size is not None:
        state = resized(state, args.image_size)
    model = empty_model(config_of(state))
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.source}: {state.get('layout', 'CE-CLIP')}, {name_of(model.cfg)}, {count:,} parameters, "
          f"images of {model.cfg.image_size} x {model.cfg.image_size}, temperature {1 / state['model']['logit_scale'].exp():.4f}")
    if state.get("skipped"):
        print(f"left out: {state['skipped']}")
    if args.export is not None:
        load_into(model, state, args.source, assign=True)
        print(export(model, args.export, args.format))
