"""support.formats"""
import dataclasses
import math
import re
from collections import Counter
from statistics import mode

import torch

from model import CLIP, CONFIGS, Config
from support.system import BadInput
from support.weight_files import read_json
from tokenizer import VOCAB

# The two towers: the beginnings of our keys, and the sizes in Config. (The text projection belongs to neither: BERT has none.)
TOWER_KEYS = {"vision": ("vision.", "logit_scale"), "text": ("text.",)}
TOWER_SIZES = {"vision": ("embed_dim", "image_size", "vision_layers", "vision_width", "vision_heads", "patch_size"),
               "text": ("text_layers", "text_width", "text_heads", "text_dropout", "vocab_size", "text_positions")}


def config_of(state):
    """The sizes that a checkpoint was made with."""
    return Config(**state["config"])


def row_like(sizes):
    """The row of CONFIGS with these sizes, the image size apart; if there is none, vit-b-16, whose text tower most rows have."""
    agrees = lambda row: all(getattr(row, field) == value for field, value in sizes.items() if field != "image_size")
    return next(filter(agrees, CONFIGS.values()), CONFIGS["vit-b-16"])


def empty_model(config):
    """A model with shapes but no memory for its weights yet."""
    with torch.device("meta"):
        return CLIP(config)


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
