"""support.exports"""
import json
import os
import tempfile
from pathlib import Path

import torch

from model import Config
from support.formats import Layout, check, known_heads, name_of
from support.images import CLIP_MEAN, CLIP_STD
from support.system import BadInput, write
from support.weight_files import write_safetensors
from tokenizer import VOCAB

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
