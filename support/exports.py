"""Our weights -> files for cn_clip and transformers."""
import os
import tempfile
from pathlib import Path

import torch

from model import Config
from support.formats import TABLES, Layout, check_tensors, known_heads, name_of
from support.images import CLIP_MEAN, CLIP_STD
from support.system import BadInput, write, write_json
from support.weight_files import write_safetensors
from tokenizer import VOCAB

PEER_NAMES = TABLES["cn_clip"]          # name of a size -> vision_model_name, text_model_name


def export(model, path, format="cn-clip"):
    """Write a model for other tools, whole or not at all -> a line that says how it is opened.

    "cn-clip": a .pt file. "huggingface": a folder for ChineseCLIPModel and ChineseCLIPProcessor,
    of a ViT alone, because transformers has no ResNet. BadInput when it cannot be written, or when
    something is there already.
    """
    writers = {"cn-clip": export_cn_clip, "huggingface": export_huggingface}
    path, cfg = Path(path), model.cfg
    check_free(path)
    if cfg.vocab_size != Config.vocab_size:
        raise BadInput(f"other tools know {Config.vocab_size:,} tokens, not {cfg.vocab_size:,}")
    if format not in writers:
        raise BadInput(f"format {format!r}: cn-clip or huggingface")
    ours = {}
    for key, x in model.state_dict().items():
        ours[key] = x.detach().cpu().float() if x.is_floating_point() else x.cpu()
    check_tensors(ours, ours, path, cfg)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.part-") as folder:
            whole = Path(folder) / "whole"
            line = writers[format](ours, whole, path, cfg)
            check_free(path)                            # still
            os.replace(whole, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error})") from None
    return line


def check_free(path):
    """BadInput unless nothing is at the path and its folder exists."""
    path = Path(path)
    if os.path.lexists(path):
        raise BadInput(f"{path}: is there already; choose another place")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: its folder {path.absolute().parent} does not exist")


def export_cn_clip(ours, part, path, cfg):
    """Write the file `part`, which will be `path` -> a line that says how it is opened."""
    layout = Layout("Chinese-CLIP", resnet=None if cfg.patch_size else cfg.vision_layers)
    # Such a file does not say the number of heads. Readers take that of CONFIGS or, by cn_clip's
    # rule, one head for 64 channels. (The pool of a ResNet has 32 times its width.)
    for tower, pool in (("vision", 32 if layout.resnet else 1), ("text", 1)):
        width, heads = getattr(cfg, f"{tower}_width"), getattr(cfg, f"{tower}_heads")
        theirs = known_heads(tower, width, layout.resnet) or pool * width // 64
        if heads != theirs:
            raise BadInput(f"a cn-clip file says nothing of heads, and with this width its readers "
                           f"take {theirs} for the {tower} tower; this model has {heads}")
    tensors = {}
    for key, x in layout.to_theirs(ours).items():
        # clone: torch.save would write a view with the whole matrix that it is a part of
        tensors[f"module.{key}"] = x.clone(memory_format=torch.contiguous_format)
    name = name_of(cfg)
    content = {"epoch": 0, "step": 0, "name": name, "state_dict": tensors}
    write(part, lambda f: torch.save(content, f), shown=path)
    if name not in PEER_NAMES:
        return f"{path}: checkpoint.load opens it; cn_clip has no name for these sizes"
    vision, text = PEER_NAMES[name]
    return (f'{path}: model, preprocess = cn_clip.clip.load_from_name("{path}", '
            f'vision_model_name="{vision}", text_model_name="{text}", '
            f"input_resolution={cfg.image_size}); model.eval()   # in half precision")


def export_huggingface(ours, part, path, cfg):
    """Write the folder `part`, which will be `path` -> a line that says how it is opened."""
    if not cfg.patch_size:
        raise BadInput("transformers has no ChineseCLIPModel with a ResNet; export it as cn-clip")
    config = {"projection_dim": cfg.embed_dim,
              "logit_scale_init_value": ours["logit_scale"].item()}
    for tower, width in (("vision", cfg.vision_width), ("text", cfg.text_width)):
        sizes = {key: getattr(cfg, field) for field, key in TABLES["config.json"][tower].items()}
        model_type = {"model_type": f"chinese_clip_{tower}_model", "intermediate_size": 4 * width}
        config[f"{tower}_config"] = model_type | sizes | TABLES["required"][tower]
    config["vision_config"]["projection_dim"] = cfg.embed_dim
    config["text_config"] |= {"type_vocab_size": 2, "pad_token_id": 0,
                              "attention_probs_dropout_prob": cfg.text_dropout}
    size = {"height": cfg.image_size, "width": cfg.image_size}
    files = {
        "config.json": config,
        "preprocessor_config.json": {"size": size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
        "tokenizer_config.json": {"model_max_length": cfg.context_length},
    }
    part.mkdir()
    for name, content in files.items():
        write_json(part / name, TABLES["files"][name] | content, shown=path)
    write(part / "vocab.txt", lambda f: f.write(VOCAB.read_bytes()), shown=path)
    tensors = Layout("Hugging Face").to_theirs(ours)
    write(part / "model.safetensors", lambda f: write_safetensors(f, tensors), shown=path)
    return (f'{path}: transformers.ChineseCLIPModel.from_pretrained("{path}"), '
            f'ChineseCLIPProcessor.from_pretrained("{path}")')
