"""How other projects name our tensors and sizes.

    state = read_foreign(tensors, path, tower)          # {"config", "model", "layout", "skipped"}
    theirs = Layout("Hugging Face").to_theirs(model.state_dict())

Each tensor of a file is used, or it is on a short list of what is left out (SKIPPED), or the file
is refused with the tensor's name. Reading and exporting use the same tables.
"""
import dataclasses
import math
import re
from collections import Counter
from statistics import mode

import torch

from model import CONFIGS, Config
from support.checks import check_tensors, closest_config, describe, empty_model, is_dense
from support.system import BadInput
from support.weight_files import read_json
from tokenizer import VOCAB

# The beginnings of each tower's keys. The text projection belongs to neither: a BERT has none.
TOWER_KEYS = {"vision": ("vision.", "logit_scale"), "text": ("text.",)}

# ---- names
#
# The names of our tensors elsewhere, a table for each tower and layout. Replace each left side by
# its right side, in this order:
#     vision.blocks.7.norm1.weight -> visual.transformer.resblocks.7.ln_1.weight
# <a|b|c>: our one matrix of queries, keys and values is three tensors there.
CLIP_VIT = {                                            # OpenAI CLIP, Chinese-CLIP
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
CLIP_RESNET = {                                         # the same two; blocks: see class Layout
    "vision.stem.0.0.": "visual.conv1.",
    "vision.stem.0.1.": "visual.bn1.",
    "vision.stem.1.0.": "visual.conv2.",
    "vision.stem.1.1.": "visual.bn2.",
    "vision.stem.2.0.": "visual.conv3.",
    "vision.stem.2.1.": "visual.bn3.",
    ".shortcut.1.": ".downsample.0.",
    ".shortcut.2.": ".downsample.1.",
    "vision.attention_pool.position_embed": "visual.attnpool.positional_embedding",
    "vision.attention_pool.query.": "visual.attnpool.q_proj.",
    "vision.attention_pool.key.": "visual.attnpool.k_proj.",
    "vision.attention_pool.value.": "visual.attnpool.v_proj.",
    "vision.attention_pool.out.": "visual.attnpool.c_proj.",
}
HUB_VIT = {                                             # Hugging Face transformers
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
    "vision.norm_pre.": "vision_model.pre_layrnorm.",   # so spelt there
    "vision.norm_post.": "vision_model.post_layernorm.",
    "vision.projection": "visual_projection.weight",
}
BERT = {                                                # everywhere, after a prefix
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
# Chinese-CLIP with FlashAttention: other right sides in the tables above.
FLASH = {
    ".attn.in_proj_": ".attn.Wqkv.",
    ".attention.self.<query|key|value>.": ".attention.self.Wqkv.",
    ".attention.output.dense.": ".attention.self.out_proj.",
}
# Weights of a Linear, (D, C), in transformers; matrices (C, D) in ours, as in CLIP.
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")

# The names of Config's fields in config.json of transformers, and the values that our model needs.
CONFIG_JSON = {
    "vision": {
        "vision_heads": "num_attention_heads", "vision_layers": "num_hidden_layers",
        "vision_width": "hidden_size", "patch_size": "patch_size", "image_size": "image_size",
    },
    "text": {
        "text_heads": "num_attention_heads", "text_layers": "num_hidden_layers",
        "text_width": "hidden_size", "text_dropout": "hidden_dropout_prob",
    },
}
REQUIRED = {
    "vision": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "text": {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
}

# What is left out of a file, by the beginnings of its keys: BERT's pooler and its list of
# positions; the pretraining heads of a BERT; everything of the other tower.
UNUSED = ("bert.pooler.", "text_model.pooler.", "bert.embeddings.position_ids",
          "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
SKIPPED = {
    None: UNUSED,
    "vision": (*UNUSED, "bert.", "text_model.", "transformer.", "token_embedding.", "ln_final.",
               "positional_embedding", "text_projection", "input_resolution", "context_length",
               "vocab_size"),
    "text": (*UNUSED, "pooler.", "embeddings.position_ids", "cls.", "visual.", "vision_model.",
             "visual_projection.", "text_projection", "logit_scale"),
}


class Layout:
    """How another project names our tensors."""

    def __init__(self, name, text_prefix="bert.", resnet=None, flash=False):
        """`name`: "Chinese-CLIP", "OpenAI CLIP", "Hugging Face" or "BERT".

        `resnet`: blocks in each of the four groups, None for a ViT. `flash`: with FlashAttention.
        """
        self.name, self.resnet = name, resnet
        self.vision, self.other = CLIP_VIT, {}
        if name == "Hugging Face":
            self.vision, text_prefix = HUB_VIT, "text_model."
            self.other = {"text_projection": "text_projection.weight"}
        if resnet:
            places = [f"visual.layer{group}.{i}." for group, blocks in enumerate(resnet, start=1)
                      for i in range(blocks)]
            blocks = {f"vision.blocks.{k}.": place for k, place in enumerate(places)}
            self.vision = blocks | CLIP_RESNET
        self.text = {}
        for ours, theirs in BERT.items():
            self.text[ours] = theirs if ours.startswith(".") else text_prefix + theirs
        if flash:
            self.vision = {ours: FLASH.get(theirs, theirs) for ours, theirs in self.vision.items()}
            self.text = {ours: FLASH.get(theirs, theirs) for ours, theirs in self.text.items()}

    def names(self, key):
        """Our key -> its keys there: [one]; or for a.<q|k|v>.b the three [a.q.b, a.k.b, a.v.b]."""
        tower = key.partition(".")[0]
        table = {"vision": self.vision, "text": self.text}.get(tower, self.other)
        for ours, theirs in table.items():
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
    raise BadInput("its tensors are not those of Chinese-CLIP, ChineseCLIPModel, OpenAI CLIP "
                   "or BERT")


def count_blocks(keys, prefix):
    """How many blocks stand under `prefix`: the count of most tensors of a block.

    If ln_1.weight occurs 11 times and the other 11 tensors 12 times, there are 12 blocks, and
    `check_tensors` names the one that is missing.
    """
    inner = [key.removeprefix(prefix).partition(".")[2] for key in keys if key.startswith(prefix)]
    return mode(Counter(inner).values()) if inner else 0


# ---- reading


def read_foreign(content, path, tower):
    """Another project's tensors -> {"config", "model": under our names, "layout", "skipped"}.

    `tower`: "vision", "text", or None for both. It empties `content`, to save memory. BadInput
    unless each tensor is used or on the list SKIPPED.
    """
    tensors = named_tensors(content, path)
    try:
        layout = layout_of(tensors)
        if layout.name == "BERT" and tower != "text":
            raise BadInput("it is a BERT, without a vision tower; "
                           "stage 1 takes it as --text-weights")
        if layout.name == "OpenAI CLIP" and tower != "vision":
            raise BadInput("it is an OpenAI CLIP, without a Chinese text tower; "
                           "stage 1 takes it as --vision-weights")
        sizes = sizes_of(tensors, layout, config_json_sizes(path, layout, tower), tower)
        # the known row adds the dropout, which tensors do not tell, and the other tower's sizes
        config = dataclasses.replace(closest_config(sizes), **sizes)
        model = empty_model(config)
    except (BadInput, ValueError) as error:             # ValueError: sizes that the model refuses
        raise BadInput(f"{path}: {error}") from None
    prefixes = TOWER_KEYS.get(tower, "")                # every key begins with ""
    ours = {key: x for key, x in model.state_dict().items() if key.startswith(prefixes)}
    expected = layout.to_theirs(ours)

    skipped = Counter()
    for key in tensors.keys() - expected.keys():
        prefix = next(filter(key.startswith, SKIPPED[tower]), None)
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
    """A file's tensors, half precision as float32, without "module." and the names of old BERTs.

    They are moved, so that `content` does not keep alive what to_ours has used.
    """
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise BadInput(f"{path}: not a checkpoint: it holds no table of named tensors")
    renamed = {}
    for key in list(tensors):
        name = key.removeprefix("module.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in renamed:
            raise BadInput(f"{path}: two of its tensors have the name {name}, "
                           "with and without a prefix")
        x = tensors.pop(key)
        half = is_dense(x) and x.dtype in (torch.float16, torch.bfloat16)
        renamed[name] = x.float() if half else x
    return renamed


def sizes_of(tensors, layout, told, tower):
    """Fields of Config, those of `tower` alone when it is given, read off the shapes.

    `told`: fields in config.json, which must agree. Shapes do not tell the heads: they come from
    `told`, or from the row of CONFIGS with that width.
    """
    def shape(key, dims):
        """The shape of our tensor `key`, which has `dims` dimensions, under its name there."""
        name = layout.names(key)[0]
        if name not in tensors:
            raise BadInput(f"{name} is missing")
        x = tensors[name]
        if not is_dense(x) or x.ndim != dims:
            raise BadInput(f"{name} is {describe(x)}, not a tensor of {dims} dimensions")
        return x.T.shape if name in TRANSPOSED else x.shape

    sizes = {}
    if tower != "text":
        if layout.resnet:
            step = 32                                   # it halves its map five times
            sizes |= {"patch_size": None, "vision_layers": layout.resnet}
            rows = shape("vision.attention_pool.position_embed", 2)[0]
            sizes["embed_dim"] = shape("vision.attention_pool.out.weight", 2)[0]
            sizes["vision_width"] = common_length(tensors, "visual.bn3.")
        else:
            blocks = layout.vision["vision.blocks."]
            step = shape("vision.patch_embed.weight", 4)[3]
            sizes |= {"patch_size": step, "vision_layers": count_blocks(tensors, blocks)}
            rows = shape("vision.position_embed", 2)[0]
            sizes["embed_dim"] = shape("vision.projection", 2)[1]
            sizes["vision_width"] = common_length(tensors, blocks)
        sizes["image_size"] = step * math.isqrt(max(0, rows - 1))     # rows = 1 + side² positions
    if tower != "vision":
        blocks, words = layout.text["text.blocks."], "text.word_embed.weight"
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
    for name in TOWER_KEYS if tower is None else (tower,):
        if f"{name}_heads" not in sizes:
            width = sizes[f"{name}_width"]
            sizes[f"{name}_heads"] = known_heads(name, width, layout.resnet)
            if sizes[f"{name}_heads"] is None:
                raise BadInput(f"shapes do not tell the heads of a {name} tower {width} wide; "
                               "add its sizes to CONFIGS in model.py")
    return sizes


def common_length(tensors, prefix):
    """The length of most vectors under `prefix`: the tower's width, even if one vector is wrong."""
    lengths = [len(x) for key, x in tensors.items()
               if key.startswith(prefix) and is_dense(x) and x.ndim == 1]
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


def config_json_sizes(path, layout, tower):
    """Fields of Config in the config.json beside Hugging Face weights; {} without that file.

    BadInput for another network than ours: other activations, epsilons, vocabularies.
    """
    if layout.name not in ("Hugging Face", "BERT"):
        return {}
    folder, sizes = path if path.is_dir() else path.parent, {}
    if tower != "vision" and (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").split()
        if words != VOCAB.read_text(encoding="utf-8").split():
            raise BadInput("its vocab.txt is not the vocabulary of tokenizer/vocab.txt: "
                           "these weights were trained with other tokens")
    if not (folder / "config.json").is_file():
        return sizes
    config = read_json(folder / "config.json")
    if tower is None and config.get("model_type", "chinese_clip") != "chinese_clip":
        raise BadInput(f"its config.json says model_type {config['model_type']}, not chinese_clip; "
                       "stage 1 takes the vision tower of a clip as --vision-weights")
    if layout.name == "Hugging Face" and tower != "text" and "projection_dim" in config:
        sizes["embed_dim"] = config["projection_dim"]
    for name in TOWER_KEYS if tower is None else (tower,):
        part = config if layout.name == "BERT" else config.get(f"{name}_config")
        if not isinstance(part, dict):
            raise BadInput(f"its config.json has no {name}_config")
        for key, value in REQUIRED[name].items():
            if part.get(key, value) != value:
                raise BadInput(f"its config.json says {key} {part[key]} for the {name} tower; "
                               f"the model here has {value}")
        for field, key in CONFIG_JSON[name].items():
            if key in part:
                sizes[field] = part[key]
    return sizes
