"""The only door for weights: every released format in, checked; two formats out; training snapshots, atomically.

    import checkpoint
    model, transform = checkpoint.load("clip_cn_vit-b-16.pt")    # any file or folder below: evaluation mode, float32; its picture transform
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
import json
import math
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from statistics import mode

import torch
import torch.nn.functional as F

import system
from data import CLIP_MEAN, CLIP_STD, Transform
from model import CLIP, CONFIGS, Config
from system import BadInput, write
from tokenizer import VOCAB

FORMAT = "ce-clip 1"

# Released weights (Hugging Face, OFA-Sys). They are downloaded into CE_CLIP_CACHE (default ~/.cache/ce-clip), from the mirror
# HF_ENDPOINT where that is set.
NAMES = {
    "cn-clip-rn50":         "chinese-clip-rn50/resolve/main/clip_cn_rn50.pt",
    "cn-clip-vit-b-16":     "chinese-clip-vit-base-patch16/resolve/main/clip_cn_vit-b-16.pt",
    "cn-clip-vit-l-14":     "chinese-clip-vit-large-patch14/resolve/main/clip_cn_vit-l-14.pt",
    "cn-clip-vit-l-14-336": "chinese-clip-vit-large-patch14-336px/resolve/main/clip_cn_vit-l-14-336.pt",
    "cn-clip-vit-h-14":     "chinese-clip-vit-huge-patch14/resolve/main/clip_cn_vit-h-14.pt",
}


# ---------------------------------------------------------------------------------------------------------------- write our own


def save(path, model, **extra):
    """Write a checkpoint, whole or not at all; `extra`: more entries, of plain values and tensors. BadInput when it cannot be written."""
    content = {"format": FORMAT, "config": dataclasses.asdict(model.cfg), "model": model.state_dict(), **extra}
    write(path, lambda f: torch.save(content, f))


# ---------------------------------------------------------------------------------------------------------------- read


def load(source, device="cpu", image_size=None):
    """A file, a folder or a name of NAMES -> (model in evaluation mode and float32, transform: PIL picture -> (3, R, R)).

    `image_size` asks for another picture side R, in pixels, than the weights were trained with. Raises BadInput when a tensor is
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


# The two towers: the beginnings of our keys, and the sizes in Config. (The text projection belongs to neither: BERT has none.)
TOWER_KEYS = {"vision": ("vision.", "logit_scale"), "text": ("text.",)}
TOWER_SIZES = {"vision": ("embed_dim", "image_size", "vision_layers", "vision_width", "vision_heads", "patch_size"),
               "text": ("text_layers", "text_width", "text_heads", "text_dropout", "vocab_size", "text_positions")}


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
        raise BadInput(f"{error}. Delete it, and it will be downloaded again" if path != Path(source) else str(error)) from None
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


def config_of(state):
    """The sizes that a checkpoint was made with."""
    return Config(**state["config"])


def row_like(sizes):
    """The row of CONFIGS with these sizes, the picture size apart; if there is none, vit-b-16, whose text tower most rows have."""
    agrees = lambda row: all(getattr(row, field) == value for field, value in sizes.items() if field != "image_size")
    return next(filter(agrees, CONFIGS.values()), CONFIGS["vit-b-16"])


def empty_model(config):
    """A model with shapes but no memory for its weights yet."""
    with torch.device("meta"):
        return CLIP(config)


def load_into(model, state, source, assign=False):
    """Copy a checkpoint's tensors into the model, or with `assign` make them the model's own.

    Of what `read_towers` gives, those of its towers. For a model that differs in the picture size, position embeddings are
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
    """The same weights for pictures of another size, in pixels: the grid of position embeddings is interpolated.

    Its first row (class token or mean position) stays. BadInput for a size that the model cannot have.
    """
    config = config_of(state)
    step = config.patch_size or 32                                              # a ResNet halves its map five times
    if image_size == config.image_size:
        return state
    if not isinstance(image_size, int) or not 0 < image_size <= 4096 or image_size % step:
        raise BadInput(f"a picture size of {image_size!r} does not fit: this model takes multiples of {step}, up to 4096")
    key = "vision.position_embed" if config.patch_size else "vision.attention_pool.position_embed"
    table, side, new = state["model"][key], config.image_size // step, image_size // step
    grid = table[1:].view(1, side, side, -1).permute(0, 3, 1, 2)                                    # (1, C, side, side)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)                 # as Chinese-CLIP does
    table = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])                 # (1 + new², C)
    return state | {"config": state["config"] | {"image_size": image_size}, "model": state["model"] | {key: table}}


def check(theirs, expected, path, config):
    """A file's tensors, one by one, against what its sizes ask for."""
    compare(theirs, expected, f"{path}: not a whole model ({name_of(config)})")
    for key, x in theirs.items():
        if x.is_meta:
            raise BadInput(f"{path}: {key} has a shape but no numbers (a meta tensor)")
        if not x.isfinite().all():
            raise BadInput(f"{path}: {key} holds NaN or infinity: the file is damaged, or the training that wrote it diverged")


def compare(theirs, expected, message):
    """Every tensor is there, none besides, each of its shape and type; else BadInput, naming up to three."""
    wrong = [f"{key} is missing" for key in expected.keys() - theirs.keys()]
    wrong += [f"{key} is unknown" for key in theirs.keys() - expected.keys()]
    both = expected.keys() & theirs.keys()
    wrong += [f"{key} is {kind(theirs[key])}, not {kind(expected[key])}" for key in both if kind(theirs[key]) != kind(expected[key])]
    if wrong:
        raise BadInput(f"{message}: {'; '.join(sorted(wrong)[:3])}" + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def kind(x):
    """Shape and type of a plain tensor, in words; for anything else, what it is."""
    if is_plain(x):
        return f"{tuple(x.shape)} {x.dtype}".replace("torch.", "")
    return f"a {'nested' if x.is_nested else x.layout} tensor" if torch.is_tensor(x) else f"a {type(x).__name__}"


def is_plain(x):
    """Whether x is an ordinary tensor, not a sparse or nested one."""
    return torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested


def name_of(config):
    """The table's name of a config, or "custom"."""
    return next((name for name, known in CONFIGS.items() if known == config), "custom")


# ---------------------------------------------------------------------------------------------------------------- foreign names
#
# What our keys are called elsewhere, one table per tower and layout: replace each left side by its right side, in this order:
#     vision.blocks.7.norm1.weight -> visual.transformer.resblocks.7.ln_1.weight
# <a|b|c>: our one matrix of queries, keys and values is three there. Import and export read the same tables, so neither can drift
# from the other.

CLIP_VIT = {                                                                    # OpenAI CLIP, Chinese-CLIP
    "vision.blocks.": "visual.transformer.resblocks.",
    ".norm1.": ".ln_1.",
    ".attention.qkv.": ".attn.in_proj_",
    ".attention.out.": ".attn.out_proj.",
    ".norm2.": ".ln_2.",
    ".mlp.0.": ".mlp.c_fc.",
    ".mlp.2.": ".mlp.c_proj.",
    "vision.patch_embed.": "visual.conv1.",
    "vision.class_token": "visual.class_embedding",
    "vision.position_embed": "visual.positional_embedding",
    "vision.norm_pre.": "visual.ln_pre.",
    "vision.norm_post.": "visual.ln_post.",
    "vision.projection": "visual.proj",
}
# The same two. Before these rules class Layout puts vision.blocks.7. -> visual.layer3.0., and so on.
CLIP_RESNET = {
    **{f"vision.stem.{i}.{j}.": f"visual.{name}{i + 1}." for i in range(3) for j, name in enumerate(("conv", "bn"))},
    ".shortcut.1.": ".downsample.0.",
    ".shortcut.2.": ".downsample.1.",
    "vision.attention_pool.position_embed": "visual.attnpool.positional_embedding",
    "vision.attention_pool.query.": "visual.attnpool.q_proj.",
    "vision.attention_pool.key.": "visual.attnpool.k_proj.",
    "vision.attention_pool.value.": "visual.attnpool.v_proj.",
    "vision.attention_pool.out.": "visual.attnpool.c_proj.",
}
HUB_VIT = {                                                                     # transformers, Hugging Face
    "vision.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".attention.qkv.": ".self_attn.<q|k|v>_proj.",
    ".attention.out.": ".self_attn.out_proj.",
    ".norm2.": ".layer_norm2.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
    "vision.patch_embed.": "vision_model.embeddings.patch_embedding.",
    "vision.class_token": "vision_model.embeddings.class_embedding",
    "vision.position_embed": "vision_model.embeddings.position_embedding.weight",
    "vision.norm_pre.": "vision_model.pre_layrnorm.",                           # so spelt
    "vision.norm_post.": "vision_model.post_layernorm.",
    "vision.projection": "visual_projection.weight",
}
BERT = {                                                                        # everywhere, after a prefix
    "text.blocks.": "encoder.layer.",
    ".attention.qkv.": ".attention.self.<query|key|value>.",
    ".attention.out.": ".attention.output.dense.",
    ".norm1.": ".attention.output.LayerNorm.",
    ".mlp.0.": ".intermediate.dense.",
    ".mlp.2.": ".output.dense.",
    ".norm2.": ".output.LayerNorm.",
    "text.word_embed.": "embeddings.word_embeddings.",
    "text.position_embed.": "embeddings.position_embeddings.",
    "text.type_embed.": "embeddings.token_type_embeddings.",
    "text.norm.": "embeddings.LayerNorm.",
}
# What Chinese-CLIP's FlashAttention calls otherwise: right sides of the tables above.
FLASH = {
    ".attn.in_proj_": ".attn.Wqkv.",
    ".attention.self.<query|key|value>.": ".attention.self.Wqkv.",
    ".attention.output.dense.": ".attention.self.out_proj.",
}
# Weights of a Linear, (D, C), at transformers; matrices (C, D) in ours, as in CLIP.
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")

CONVERTED = (torch.float16, torch.bfloat16)                                     # become float32
# What is left out of a file, by the beginning of its key: BERT's pooler and its list of positions; the pretraining heads of BERT;
# of the other tower, everything.
UNUSED = ("bert.pooler.", "text_model.pooler.",
          "bert.embeddings.position_ids", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
SKIPPED = {
    None: UNUSED,
    "vision": (*UNUSED, "bert.", "text_model.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
               "input_resolution", "context_length", "vocab_size"),
    "text": (*UNUSED, "pooler.", "embeddings.position_ids", "cls.",
             "visual.", "vision_model.", "visual_projection.", "text_projection", "logit_scale"),
}


class Layout:
    """How someone else's file names our tensors."""

    def __init__(self, name, text_prefix="bert.", resnet=None, flash=False):
        """`name`: "Chinese-CLIP", "OpenAI CLIP", "Hugging Face" or "BERT".

        `resnet`: blocks in each of the four groups, None for a ViT. `flash`: trained with FlashAttention.
        """
        self.name, self.resnet, hub = name, resnet, name == "Hugging Face"
        self.vision = HUB_VIT if hub else CLIP_VIT
        if resnet:
            places = [f"visual.layer{group}.{i}." for group, blocks in enumerate(resnet, 1) for i in range(blocks)]
            self.vision = {f"vision.blocks.{k}.": place for k, place in enumerate(places)} | CLIP_RESNET
        prefix = "text_model." if hub else text_prefix
        self.text = {ours: theirs if ours.startswith(".") else prefix + theirs for ours, theirs in BERT.items()}
        if flash:
            renamed = lambda table: {ours: FLASH.get(theirs, theirs) for ours, theirs in table.items()}
            self.vision, self.text = renamed(self.vision), renamed(self.text)
        self.rest = {"text_projection": "text_projection.weight"} if hub else {}

    def names(self, key):
        """Our key -> its keys there: one; or three, as [a.q.b, a.k.b, a.v.b] for a.<q|k|v>.b."""
        for ours, theirs in {"vision": self.vision, "text": self.text}.get(key.split(".")[0], self.rest).items():
            key = key.replace(ours, theirs)
        if "<" not in key:
            return [key]
        before, choices, after = re.split("[<>]", key)
        return [before + choice + after for choice in choices.split("|")]

    def to_theirs(self, tensors):
        """Tensors under our names -> under theirs."""
        theirs = {}
        for key, x in tensors.items():
            names = self.names(key)
            theirs |= zip(names, x.chunk(3) if len(names) == 3 else [x.T if names[0] in TRANSPOSED else x])
        return theirs

    def to_ours(self, tensors, keys):
        """Tensors under their names, which are used up (memory!) -> those of our `keys`, in float32."""
        ours = {}
        for key in keys:
            names = self.names(key)
            pieces = [tensors.pop(name).detach() for name in names]
            x = torch.cat(pieces) if len(pieces) == 3 else (pieces[0].T if names[0] in TRANSPOSED else pieces[0]).contiguous()
            ours[key] = x.float() if x.is_floating_point() else x
        return ours


def layout_of(keys):
    """Tell the layout by the keys."""
    has = lambda pattern: any(re.search(pattern, key) for key in keys)
    if has(r"^vision_model\."):
        return Layout("Hugging Face")
    if has(r"^visual\."):
        groups = tuple(depth(keys, f"visual.layer{group}.") for group in (1, 2, 3, 4))
        return Layout("Chinese-CLIP" if has(r"^bert\.") else "OpenAI CLIP", resnet=groups if any(groups) else None, flash=has(r"\.Wqkv\."))
    if has(r"^(bert\.)?embeddings\."):
        return Layout("BERT", text_prefix="bert." if has(r"^bert\.") else "")
    raise BadInput("its tensors are not those of Chinese-CLIP, ChineseCLIPModel, OpenAI CLIP or BERT")


def depth(keys, prefix):
    """How many blocks stand under `prefix`: as often as most tensors of a block occur.

    If ln_1.weight occurs 11 times and the other 11 tensors 12 times, there are 12 blocks, and one tensor is missing or misnamed,
    which `check` will say.
    """
    leaves = Counter(key.removeprefix(prefix).partition(".")[2] for key in keys if key.startswith(prefix))
    return mode(leaves.values()) if leaves else 0


def read_foreign(content, path, tower):
    """Someone else's tensors, which are used up (memory!) -> config and tensors of ours, when each of them is where it must be."""
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise BadInput(f"{path}: not a checkpoint: it holds no table of named tensors")
    old_norm = lambda key: key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    count = len(tensors)
    # moved, not copied: `content` must not keep alive what to_ours has used up
    tensors = {old_norm(key.removeprefix("module.")): tensors.pop(key) for key in list(tensors)}
    if len(tensors) < count:
        raise BadInput(f"{path}: two of its tensors have the same name, once with and once without a prefix")
    try:
        layout = layout_of(tensors)
        if layout.name == "BERT" and tower != "text":
            raise BadInput("it is a BERT, without a vision tower; stage 1 takes it as --text-weights")
        if layout.name == "OpenAI CLIP" and tower != "vision":
            raise BadInput("it is an OpenAI CLIP, without a Chinese text tower; stage 1 takes it as --vision-weights")
        sizes = sizes_of(tensors, layout, hub_fields(path, layout, tower), tower)
        # the row gives what the tensors do not tell (dropout), and the sizes of a tower that is not read
        config = dataclasses.replace(row_like(sizes), **sizes)
        ours = {key: x for key, x in empty_model(config).state_dict().items() if key.startswith(TOWER_KEYS.get(tower, ""))}
    except (BadInput, ValueError) as error:                                     # ValueError: of the model, when sizes do not go together
        raise BadInput(f"{path}: {error}") from None
    expected = layout.to_theirs(ours)
    skipped = {key: prefix for key in tensors.keys() - expected.keys() for prefix in SKIPPED[tower] if key.startswith(prefix)}
    for key in skipped:
        del tensors[key]
    for key in expected.keys() & tensors.keys():
        if is_plain(tensors[key]) and tensors[key].dtype in CONVERTED and expected[key].is_floating_point():
            expected[key] = expected[key].to(tensors[key].dtype)
    check(tensors, expected, path, config)
    skipped = ", ".join(f"{prefix}* ({n})" for prefix, n in sorted(Counter(skipped.values()).items()))
    return {"config": dataclasses.asdict(config), "model": layout.to_ours(tensors, ours), "layout": layout.name, "skipped": skipped}


def sizes_of(tensors, layout, hub, tower):
    """Fields of Config (with `tower`, those of that tower), read off the shapes; heads from config.json (`hub`) or the table.

    Where several tensors tell a size, most of them decide; one that differs is then named by `check`.
    """
    def size(axis, *keys):
        """The length of this axis of our tensors `keys`, under their names here."""
        names = [layout.names(key)[0] for key in keys]
        shapes = [tensors[name].shape[:: -1 if name in TRANSPOSED else 1] for name in names if is_plain(tensors.get(name))]
        lengths = [shape[axis] for shape in shapes if len(shape) > abs(axis)]
        if lengths:
            return mode(lengths)
        raise BadInput(f"{names[0]} is missing" if names[0] not in tensors else f"{names[0]} is {kind(tensors[names[0]])}, which cannot be")

    def heads(tower, width):
        known = hub.get(f"{tower}_heads") or known_heads(tower, width, layout.resnet)
        if known is None:
            raise BadInput(f"shapes do not tell the heads of a {tower} tower {width} wide; add its sizes to CONFIGS in model.py")
        return known

    side = lambda key: math.isqrt(max(0, size(0, key) - 1))                     # of the grid, in a table of 1 + side² positions
    norms = lambda tower, layers: [f"{tower}.blocks.{i}.norm{n}.weight" for i in range(layers) for n in (1, 2)]
    sizes = {}
    if tower != "text" and layout.resnet:
        width = size(0, "vision.stem.2.0.weight", "vision.stem.2.1.weight", "vision.stem.2.1.bias")
        sizes |= {
            "vision_layers": layout.resnet, "vision_width": width, "vision_heads": heads("vision", width), "patch_size": None,
            "image_size": 32 * side("vision.attention_pool.position_embed"),
            "embed_dim": size(0, "vision.attention_pool.out.weight", "vision.attention_pool.out.bias"),
        }
    elif tower != "text":
        layers, patch = depth(tensors, layout.vision["vision.blocks."]), size(-1, "vision.patch_embed.weight")
        width = size(0, "vision.norm_pre.weight", "vision.norm_post.weight", *norms("vision", layers))
        sizes |= {
            "vision_layers": layers, "vision_width": width, "vision_heads": heads("vision", width), "patch_size": patch,
            "image_size": patch * side("vision.position_embed"),
            "embed_dim": size(1, "vision.projection", "text_projection"),
        }
    if tower != "vision":
        layers, tokens = depth(tensors, layout.text["text.blocks."]), size(0, "text.word_embed.weight")
        if tokens != Config.vocab_size:
            raise BadInput(f"{layout.names('text.word_embed.weight')[0]} has {tokens:,} rows, "
                           f"but the tokenizer {Config.vocab_size:,} tokens")
        width = size(0, "text.norm.weight", "text.norm.bias", *norms("text", layers))
        sizes |= {
            "text_layers": layers, "text_width": width, "text_heads": heads("text", width), "vocab_size": tokens,
            "text_positions": size(0, "text.position_embed.weight"),
        }
    for field, value in hub.items():
        if sizes.setdefault(field, value) != value:
            raise BadInput(f"its config.json says {field} {value}, its tensors say {sizes[field]}")
    return sizes


def known_heads(tower, width, resnet):
    """Heads of a tower of that width in CONFIGS, or None."""
    same_kind = lambda row: tower == "text" or (row.patch_size is None) == bool(resnet)
    rows = [row for row in CONFIGS.values() if getattr(row, f"{tower}_width") == width and same_kind(row)]
    return getattr(rows[0], f"{tower}_heads") if rows else None


def hub_fields(path, layout, tower):
    """Fields of Config in the config.json beside Hugging Face weights.

    BadInput for a network that ours is not: other activations, epsilons, vocabularies.
    """
    if layout.name not in ("Hugging Face", "BERT"):
        return {}
    folder = path if path.is_dir() else path.parent
    vocab, file, fields = folder / "vocab.txt", folder / "config.json", {}
    if tower != "vision" and vocab.is_file():
        if vocab.read_text(encoding="utf-8", errors="replace").split() != VOCAB.read_text(encoding="utf-8").split():
            raise BadInput("its vocab.txt is not the vocabulary of tokenizer/vocab.txt: these weights were trained with other tokens")
    if not file.is_file():
        return {}
    config = read_json(file)
    if layout.name == "Hugging Face" and tower != "text" and "projection_dim" in config:
        fields["embed_dim"] = config["projection_dim"]
    if tower is None and config.get("model_type", "chinese_clip") != "chinese_clip":
        raise BadInput(f"its config.json says model_type {config['model_type']}, not chinese_clip; "
                       "stage 1 takes the vision tower of a clip as --vision-weights")
    for name, activation, epsilon in (("vision", "quick_gelu", 1e-5), ("text", "gelu", 1e-12)):
        if tower not in (None, name):
            continue
        part = config if layout.name == "BERT" else config.get(f"{name}_config")
        if not isinstance(part, dict):
            raise BadInput(f"its config.json has no {name}_config")
        for key, value in (("hidden_act", activation), ("layer_norm_eps", epsilon)):
            if part.get(key, value) != value:
                raise BadInput(f"its config.json says {key} {part[key]} for the {name} tower; the model here has {value}")
        told = {f"{name}_heads": "num_attention_heads", f"{name}_layers": "num_hidden_layers", f"{name}_width": "hidden_size"}
        told |= {"patch_size": "patch_size", "image_size": "image_size"} if name == "vision" else {"text_dropout": "hidden_dropout_prob"}
        fields |= {field: part[key] for field, key in told.items() if key in part}
    return fields


# ---------------------------------------------------------------------------------------------------------------- files


def find(source):
    """A path, or a name of NAMES, whose file is downloaded once -> path."""
    path = Path(source)
    if str(source) and os.path.exists(path):
        return path
    if str(source) not in NAMES:
        raise BadInput(f"{source}: there is no such checkpoint. Name a file, a folder, or one of {', '.join(NAMES)}")
    place = NAMES[str(source)]
    cache = system.cache_folder()
    return system.download(system.hub_url(f"OFA-Sys/{place}"), cache / place.rpartition("/")[2])


def open_file(path, mapped=True):
    """The dictionary in a file, whatever wrote it. Executes nothing from it. BadInput when it is damaged or no dictionary."""
    if not path.is_file():
        raise BadInput(f"{path}: neither a file nor a folder")                  # a pipe would be waited for
    try:
        with open(path, "rb") as f:
            start = f.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():                                           # torch.load itself checks no checksums
                    raise zipfile.BadZipFile("a checksum is wrong")
                scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
                # what is compressed cannot be used in place
                mapped &= all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
                content = read_torchscript(archive) if scripted else torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        elif start[8:] == b"{":                                                 # after the length of its JSON, see read_safetensors
            content = read_safetensors(path)
        else:                                                                   # the format of torch before 1.6: BERTs of that time
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                                 # about odd pickles, which fail anyway
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # many kinds for a damaged file
        # "global": of torch's weights-only unpickler, and of ours
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise BadInput(f"{path}: it holds more than tensors and plain values, and reading that could run code: refused") from None
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else "
                       f"({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a table of named tensors")
    return content


def open_folder(path):
    """The tensors of a Hugging Face folder: one file, or shards listed in an index.

    They are read into memory: a quarter of them, queries, keys and values, is joined afterwards, and would be there twice if it
    stayed in the files' pages, too.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
        hint = f", perhaps {path / 'best.pt'}" if (path / "best.pt").exists() else ""
        raise BadInput(f"{path}: a folder without {' or '.join(names[::2])}; name the file{hint}")
    if file.suffix != ".json":
        return open_file(file, mapped=False)
    shard_of, tensors = read_json(file).get("weight_map"), {}
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) and name == os.path.basename(name) for name in shard_of.values()):
        raise BadInput(f"{file}: its weight_map does not map tensors to files of the folder")
    for name in sorted(set(shard_of.values())):
        if not (path / name).is_file():
            raise BadInput(f"{path / name}: missing, but listed in {file.name}")
        shard = open_file(path / name, mapped=False)
        wrong = sorted(map(str, shard.keys() ^ {key for key, where in shard_of.items() if where == name}))
        if wrong:
            how = "not listed for it in" if wrong[0] in shard else "missing, but listed in"
            raise BadInput(f"{path / name}: {wrong[0]} is {how} {file.name}")
        tensors |= shard
    return tensors


def read_json(path):
    """The object in a JSON file, as a dictionary; BadInput when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object")
    return content


# https://huggingface.co/docs/safetensors: 8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the numbers
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """-> {name: tensor}. Raises when the bytes are not exactly those that the header announces."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            x = torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]])
            if entry["data_offsets"] != [end, end + x.nbytes]:
                raise ValueError(f"{name} does not lie where the header says")
            end += f.readinto(x.view(-1).view(torch.uint8).numpy()) if x.nbytes else 0
            if end != entry["data_offsets"][1]:
                raise ValueError("the file ends too early")
            tensors[name] = x
        if f.read(1):
            raise ValueError("the file goes on after its last tensor")
    return tensors


def write_safetensors(f, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end := end + x.numel() * x.itemsize]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                             # so that the numbers begin at a multiple of 8
    f.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        f.write(x.contiguous().view(-1).view(torch.uint8).numpy())


def read_torchscript(archive):
    """The tensors of a TorchScript archive, without the code in it -> {name: tensor}.

    data.pkl describes nested modules; numbers lie in data/0, data/1, …
    """
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
    dtypes = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
              "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}

    class ScriptModule:
        """Stands for every module, whose class would come from the archive's own code."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return ScriptModule
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if module.startswith("torch.jit._pickle"):
                return lambda value, *_: value                                  # lists of numbers and the like, which are no weights
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, shape, stride, *_: torch.as_strided(storage, shape, stride, offset)
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            raise pickle.UnpicklingError(f"global {module}.{name}")

        def persistent_load(self, reference):
            _, dtype, name, _, count = reference                                # "storage", type, file, device, length
            if not count:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{name}")), dtype=dtype, count=count)

    tensors, waiting, seen = {}, [("", Unpickler(archive.open(f"{root}/data.pkl")).load())], set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            raise ValueError("a module contains itself")
        seen.add(id(module))
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                tensors[prefix + name] = value
            elif isinstance(value, ScriptModule):
                waiting.append((f"{prefix}{name}.", value))
    return tensors


# ---------------------------------------------------------------------------------------------------------------- write for others


# What cn_clip calls the sizes that it knows: vision_model_name, text_model_name
PEER_NAMES = {
    "rn50":         ("RN50",         "RBT3-chinese"),
    "vit-b-32":     ("ViT-B-32",     "RoBERTa-wwm-ext-base-chinese"),
    "vit-b-16":     ("ViT-B-16",     "RoBERTa-wwm-ext-base-chinese"),
    "vit-l-14":     ("ViT-L-14",     "RoBERTa-wwm-ext-base-chinese"),
    "vit-l-14-336": ("ViT-L-14-336", "RoBERTa-wwm-ext-base-chinese"),
    "vit-h-14":     ("ViT-H-14",     "RoBERTa-wwm-ext-large-chinese"),
}


def export(model, path, format="cn-clip"):
    """Write a model for other tools, whole or not at all, and never over something -> a line that says how it is opened there.

    "cn-clip": a .pt file for cn_clip (load_from_name). "huggingface": a folder for transformers (from_pretrained of
    ChineseCLIPModel and ChineseCLIPProcessor); ViT only, for transformers has no ResNet. BadInput when it cannot be.
    """
    path, cfg = free_place(path), model.cfg
    if cfg.vocab_size != Config.vocab_size:
        raise BadInput(f"a model with {cfg.vocab_size} tokens is not for other tools: their vocabulary has {Config.vocab_size:,}")
    if format not in ("cn-clip", "huggingface"):
        raise BadInput(f"format {format!r}: cn-clip or huggingface")
    ours = {key: x.detach().cpu().float() if x.is_floating_point() else x.cpu() for key, x in model.state_dict().items()}
    check(ours, ours, path, cfg)
    try:
        # it appears under its name when everything is written
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f"{path.name}.part-") as folder:
            whole = Path(folder) / "whole"
            said = (export_cn_clip if format == "cn-clip" else export_huggingface)(ours, whole, path, cfg)
            os.replace(whole, free_place(path))                                 # still free
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error})") from None
    return said


def free_place(path):
    """The path, where nothing is yet and something can be."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise BadInput(f"{path}: is there already; choose another place")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: its folder {path.absolute().parent} does not exist")
    return path


def export_cn_clip(ours, part, path, cfg):
    """Write the file `part`, which will be `path` -> the line that says how it is opened."""
    layout = Layout("Chinese-CLIP", resnet=None if cfg.patch_size else cfg.vision_layers)
    # such a file cannot say how many heads there are, and with other heads the same weights mean something else
    for tower, width in (("vision", cfg.vision_width), ("text", cfg.text_width)):
        # CLIP's rule, which cn_clip follows: width // 64 heads; a ResNet's pool is 32 widths wide
        heads = known_heads(tower, width, layout.resnet) or width * (32 if tower == "vision" and layout.resnet else 1) // 64
        if heads != getattr(cfg, f"{tower}_heads"):
            raise BadInput(f"a cn-clip file says nothing of heads, and with this width its readers take {heads} for the {tower} tower; "
                           f"this model has {getattr(cfg, f'{tower}_heads')}")
    # clone: a view would be written with the whole matrix that it is a part of
    tensors = {f"module.{key}": x.clone(memory_format=torch.contiguous_format) for key, x in layout.to_theirs(ours).items()}
    name = name_of(cfg)
    write(part, lambda f: torch.save({"epoch": 0, "step": 0, "name": name, "state_dict": tensors}, f), shown=path)
    if name not in PEER_NAMES:
        return f"{path}: in the format of cn_clip, which has no name for these sizes (checkpoint.load opens it)"
    vision, text = PEER_NAMES[name]
    return (f'{path}: model, preprocess = cn_clip.clip.load_from_name("{path}", vision_model_name="{vision}", '
            f'text_model_name="{text}", input_resolution={cfg.image_size}); model.eval()'
            "   # eval: it comes with dropout on; and rounded to half precision, which is cn_clip's way")


def export_huggingface(ours, part, path, cfg):
    """Write the folder `part`, which will be `path` -> the line that says how it is opened."""
    if not cfg.patch_size:
        raise BadInput("transformers has no ChineseCLIPModel with a ResNet; export it as cn-clip")
    tower = lambda width, layers, heads: {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config = {
        "architectures": ["ChineseCLIPModel"], "model_type": "chinese_clip", "torch_dtype": "float32", "projection_dim": cfg.embed_dim,
        "logit_scale_init_value": ours["logit_scale"].item(),
        "vision_config": tower(cfg.vision_width, cfg.vision_layers, cfg.vision_heads) | {
            "model_type": "chinese_clip_vision_model", "image_size": cfg.image_size, "patch_size": cfg.patch_size,
            "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": cfg.embed_dim,
        },
        "text_config": tower(cfg.text_width, cfg.text_layers, cfg.text_heads) | {
            "model_type": "chinese_clip_text_model", "vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.text_positions,
            "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": cfg.text_dropout, "attention_probs_dropout_prob": cfg.text_dropout, "pad_token_id": 0,
        },
    }
    processor = {
        "processor_class": "ChineseCLIPProcessor", "image_processor_type": "ChineseCLIPImageProcessor",
        "feature_extractor_type": "ChineseCLIPFeatureExtractor",
        "do_resize": True, "size": {"height": cfg.image_size, "width": cfg.image_size}, "resample": 3, "do_center_crop": False,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
    }
    tokenizer = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": cfg.context_length,
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]",
    }
    part.mkdir()
    for name, content in (("config.json", config), ("preprocessor_config.json", processor), ("tokenizer_config.json", tokenizer)):
        write(part / name, lambda f, content=content: f.write((json.dumps(content, indent=2) + "\n").encode()), shown=path)
    write(part / "vocab.txt", lambda f: f.write(VOCAB.read_bytes()), shown=path)
    write(part / "model.safetensors", lambda f: write_safetensors(f, Layout("Hugging Face").to_theirs(ours)), shown=path)
    return f'{path}: transformers.ChineseCLIPModel.from_pretrained("{path}"), ChineseCLIPProcessor.from_pretrained("{path}")'


# ---------------------------------------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description="Check a checkpoint and say what it is; or write it for other tools.")
    parser.add_argument("source", help=f"a file, a folder, or one of {', '.join(NAMES)}")
    parser.add_argument("--image-size", type=int, help="pictures of another size: position embeddings are resized")
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
          f"pictures of {model.cfg.image_size} x {model.cfg.image_size}, temperature {1 / state['model']['logit_scale'].exp():.4f}")
    if state.get("skipped"):
        print(f"left out: {state['skipped']}")
    if args.export is not None:
        load_into(model, state, args.source, assign=True)
        print(export(model, args.export, args.format))


if __name__ == "__main__":
    system.run(main)
