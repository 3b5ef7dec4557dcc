"""Names, sizes and checks of tensors, ours and those of other projects.

Each tensor of a file is used, or it is on a short list of what is left out (SKIPPED), or the file
is refused with the tensor's name. Reading and exporting use the same tables, in layouts.json:

    names             for each layout: our name -> the name there; see class Layout
    transposed        a Linear's (D, C) in transformers; matrices (C, D) in ours, as in CLIP
    skipped           beginnings of keys that are left out; for one tower, also the other's
    sizes             the fields of Config that describe each tower
    config.json       Config's fields -> keys in config.json of transformers
    required          the values in config.json that our model needs
    files, cn_clip    what is exported for transformers; cn_clip's names of our sizes
    released          weights on the Hugging Face hub: name -> repository, file
"""
import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import mode

import torch

from model import CLIP, CONFIGS, Config
from support.system import BadInput
from support.weight_files import read_json
from tokenizer import VOCAB

TABLES = json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))
TRANSPOSED = TABLES["transposed"]
SKIPPED = {tower: tuple(prefixes) for tower, prefixes in TABLES["skipped"].items()}

# The beginnings of each tower's keys. The text projection belongs to neither: a BERT has none.
TOWER_KEYS = {"vision": ("vision.", "logit_scale"), "text": ("text.",)}


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
        if not x.isfinite().all():
            raise BadInput(f"{path}: {key} holds NaN or infinity: damaged, or training diverged")


def check_names_and_shapes(tensors, expected, message):
    """BadInput, with up to three names, unless names, shapes and types are those of `expected`."""
    wrong = []
    for key in expected.keys() | tensors.keys():
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif key not in expected:
            wrong.append(f"{str(key)[:100]} is unknown")
        elif describe(tensors[key]) != describe(expected[key]):
            wrong.append(f"{key} is {describe(tensors[key])}, not {describe(expected[key])}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(f"{message}: {'; '.join(sorted(wrong)[:3])}{more}")


def describe(x):
    """Shape and type of a tensor, in words; of anything else, what it is."""
    if torch.is_tensor(x):
        return f"{tuple(x.shape)} {x.dtype}".replace("torch.", "")
    return f"a {type(x).__name__}"


class Layout:
    """How another project names our tensors."""

    def __init__(self, name, text_prefix="bert.", resnet=None, flash=False):
        """`name`: "Chinese-CLIP", "OpenAI CLIP", "Hugging Face" or "BERT".

        `resnet`: blocks in each of the four groups, None for a ViT. `flash`: with FlashAttention.
        """
        hub, names = name == "Hugging Face", TABLES["names"]
        self.name, self.resnet = name, resnet
        self.text_prefix = "text_model." if hub else text_prefix
        self.text, self.vision = names["BERT"], names["Hugging Face ViT" if hub else "ViT"]
        if resnet:
            places = [f"visual.layer{group}.{i}." for group, blocks in enumerate(resnet, start=1)
                      for i in range(blocks)]
            blocks = {f"vision.blocks.{k}.": place for k, place in enumerate(places)}
            self.vision = blocks | names["ResNet"]
        self.flash = names["FlashAttention"] if flash else {}

    def names(self, key):
        """Our key -> its keys there: [one], or three for our one matrix of queries, keys, values.

        Each left side of a table is replaced by its right side, in order:
            vision.blocks.7.norm1.weight -> visual.transformer.resblocks.7.ln_1.weight
            a.qkv.b -> a.<q|k|v>.b -> [a.q.b, a.k.b, a.v.b]
        """
        text = key.startswith("text.")
        for ours, theirs in [*(self.text if text else self.vision).items(), *self.flash.items()]:
            key = key.replace(ours, theirs)
        if text:
            key = self.text_prefix + key
        if "<" not in key:
            return [key]
        before, choices, after = re.split("[<>]", key)
        return [before + choice + after for choice in choices.split("|")]

    def to_theirs(self, tensors):
        """Tensors under our names -> under theirs."""
        theirs = {}
        for key, x in tensors.items():
            names = self.names(key)
            if len(names) > 1:
                theirs |= zip(names, x.chunk(len(names)))
            else:
                theirs[names[0]] = x.T if names[0] in TRANSPOSED else x
        return theirs

    def to_ours(self, tensors, keys):
        """Tensors under their names -> our `keys`. They are taken out of `tensors`: less memory."""
        ours = {}
        for key in keys:
            names = self.names(key)
            pieces = [tensors.pop(name).detach() for name in names]
            x = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            ours[key] = (x.T if names[0] in TRANSPOSED else x).contiguous()
        return ours


def layout_of(keys):
    """The layout of a file with these keys. BadInput for an unknown one."""
    first_words = {key.partition(".")[0] for key in keys}
    if "vision_model" in first_words:
        return Layout("Hugging Face")
    if "visual" in first_words:
        name = "Chinese-CLIP" if "bert" in first_words else "OpenAI CLIP"
        groups = tuple(count_blocks(keys, f"visual.layer{group}.") for group in (1, 2, 3, 4))
        flash = any(".Wqkv." in key for key in keys)
        return Layout(name, resnet=groups if any(groups) else None, flash=flash)
    if "bert" in first_words or "embeddings" in first_words:
        return Layout("BERT", text_prefix="bert." if "bert" in first_words else "")
    raise BadInput("its tensors are not those of Chinese-CLIP, OpenAI CLIP or BERT")


def count_blocks(keys, prefix):
    """How many blocks stand under `prefix`: the count of most tensors, even if one is missing."""
    inner = [key.removeprefix(prefix).partition(".")[2] for key in keys if key.startswith(prefix)]
    return mode(Counter(inner).values()) if inner else 0


def read_foreign(content, path, tower):
    """Another project's tensors -> {"config", "model": under our names, "layout", "skipped"}.

    `tower`: "vision", "text", or None for both. It empties `content`, to save memory. BadInput
    unless each tensor is used or on the list SKIPPED.
    """
    tensors = named_tensors(content, path)
    try:
        layout = layout_of(tensors)
        if layout.name == "BERT" and tower != "text":
            raise BadInput("a BERT, without a vision tower; stage 1 takes it as --text-weights")
        if layout.name == "OpenAI CLIP" and tower != "vision":
            raise BadInput("an OpenAI CLIP; stage 1 takes its vision tower as --vision-weights")
        sizes = sizes_of(tensors, layout, path, (tower,) if tower else ("vision", "text"))
        # the known row adds the dropout, which tensors do not tell, and the other tower's sizes
        config = dataclasses.replace(closest_config(sizes), **sizes)
        model = empty_model(config)
    except (BadInput, ValueError) as error:             # ValueError: sizes that the model refuses
        raise BadInput(f"{path}: {str(error)[:500]}") from None
    prefixes = TOWER_KEYS.get(tower, "")                # every key begins with ""
    ours = {key: x for key, x in model.state_dict().items() if key.startswith(prefixes)}
    expected = layout.to_theirs(ours)

    skipped = Counter()
    for key in tensors.keys() - expected.keys():
        prefix = next(filter(key.startswith, SKIPPED[tower or "both"]), None)
        if prefix:
            skipped[prefix] += 1
            del tensors[key]
    check_tensors(tensors, expected, path, config)
    return {
        "config": dataclasses.asdict(config),
        "model": layout.to_ours(tensors, ours),
        "layout": layout.name,
        "skipped": ", ".join(f"{prefix}* ({n})" for prefix, n in sorted(skipped.items())),
    }


def named_tensors(content, path):
    """A file's tensors, half precision as float32, without "module." and the names of old BERTs."""
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise BadInput(f"{path}: not a checkpoint: it holds no table of named tensors")
    renamed = {}
    for key in list(tensors):
        name = key.removeprefix("module.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in renamed:
            raise BadInput(f"{path}: two of its tensors have the name {name[:100]}")
        x = tensors.pop(key)                            # so that to_ours can free it
        half = torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16)
        renamed[name] = x.float() if half else x
    return renamed


def sizes_of(tensors, layout, path, towers):
    """Config's fields for `towers`, read off the shapes; a config.json beside them must agree."""
    def shape(key, dims):
        """The shape of our tensor `key`, which has `dims` dimensions, as it is there."""
        name = layout.names(key)[0]
        if name not in tensors:
            raise BadInput(f"{name} is missing")
        x = tensors[name]
        if not torch.is_tensor(x) or x.ndim != dims:
            raise BadInput(f"{name} is {describe(x)}, not a tensor of {dims} dimensions")
        return x.T.shape if name in TRANSPOSED else x.shape

    told, sizes = config_json_sizes(path, layout.name, towers), {}
    if "vision" in towers:
        if layout.resnet:
            step = 32                                   # it halves its map five times
            sizes |= {"patch_size": None, "vision_layers": layout.resnet}
            rows = shape("vision.attention_pool.position_embed", 2)[0]
            sizes["embed_dim"] = shape("vision.attention_pool.out.weight", 2)[0]
            sizes["vision_width"] = common_length(tensors, "visual.bn3.")
        else:
            blocks = layout.names("vision.blocks.")[0]
            step = shape("vision.patch_embed.weight", 4)[3]
            sizes |= {"patch_size": step, "vision_layers": count_blocks(tensors, blocks)}
            rows = shape("vision.position_embed", 2)[0]
            sizes["embed_dim"] = shape("vision.projection", 2)[1]
            sizes["vision_width"] = common_length(tensors, blocks)
        sizes["image_size"] = step * math.isqrt(max(0, rows - 1))     # rows = 1 + side² positions
    if "text" in towers:
        blocks, words = layout.names("text.blocks.")[0], "text.word_embed.weight"
        sizes["vocab_size"] = shape(words, 2)[0]
        if sizes["vocab_size"] != Config.vocab_size:
            raise BadInput(f"{layout.names(words)[0]} has {sizes['vocab_size']:,} rows, "
                           f"but the tokenizer {Config.vocab_size:,} tokens")
        sizes["text_positions"] = shape("text.position_embed.weight", 2)[0]
        sizes["text_layers"] = count_blocks(tensors, blocks)
        sizes["text_width"] = common_length(tensors, blocks)

    for field, value in told.items():
        if sizes.setdefault(field, value) != value:
            raise BadInput(f"its config.json says {field} {value}, its tensors say {sizes[field]}")
    for tower in towers:                # config.json tells the heads, or CONFIGS by the width
        width = sizes[f"{tower}_width"]
        heads = sizes.setdefault(f"{tower}_heads", known_heads(tower, width, layout.resnet))
        if heads is None:
            raise BadInput(f"shapes do not tell the heads of a {tower} tower {width} wide; "
                           "add its sizes to CONFIGS in model.py")
    return sizes


def common_length(tensors, prefix):
    """The length of most vectors under `prefix`: the tower's width, even if one vector is wrong."""
    lengths = [len(x) for key, x in tensors.items()
               if key.startswith(prefix) and torch.is_tensor(x) and x.ndim == 1]
    if not lengths:
        raise BadInput(f"{prefix}* is missing")
    return mode(lengths)


def known_heads(tower, width, resnet):
    """The heads of a tower of that width in CONFIGS, or None. `resnet`: falsy for a ViT."""
    for config in CONFIGS.values():
        same_kind = tower == "text" or (config.patch_size is None) == bool(resnet)
        if getattr(config, f"{tower}_width") == width and same_kind:
            return getattr(config, f"{tower}_heads")
    return None


def config_json_sizes(path, layout, towers):
    """Fields of Config in the config.json beside Hugging Face weights; {} without that file.

    BadInput for another network than ours: other activations, epsilons, vocabularies.
    """
    if layout not in ("Hugging Face", "BERT"):
        return {}
    folder, sizes = path if path.is_dir() else path.parent, {}
    words = folder / "vocab.txt"
    if "text" in towers and words.is_file():
        with open(words, encoding="utf-8", errors="replace") as f:
            if f.read(2**20).split() != VOCAB.read_text(encoding="utf-8").split():
                raise BadInput("its vocab.txt holds other tokens than tokenizer/vocab.txt")
    if not (folder / "config.json").is_file():
        return sizes
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "chinese_clip")
    if len(towers) == 2 and kind != "chinese_clip":
        raise BadInput(f"its config.json says model_type {kind}, not chinese_clip; "
                       "stage 1 takes the vision tower of a clip as --vision-weights")
    if "vision" in towers and "projection_dim" in config:
        sizes["embed_dim"] = config["projection_dim"]
    for tower in towers:
        part = config if layout == "BERT" else config.get(f"{tower}_config")
        if not isinstance(part, dict):
            raise BadInput(f"its config.json has no {tower}_config")
        for key, value in TABLES["required"][tower].items():
            if part.get(key, value) != value:
                raise BadInput(f"its config.json says {key} {part[key]} for the {tower} tower; "
                               f"the model here has {value}")
        known = TABLES["config.json"][tower].items()
        sizes |= {field: part[key] for field, key in known if key in part}
    return sizes
