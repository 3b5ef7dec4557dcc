"""Our weights -> files for cn_clip and transformers."""
import os
import tempfile
from pathlib import Path

import torch

from model import Config
from support.checks import check_tensors, name_of
from support.formats import CONFIG_JSON, REQUIRED, Layout, known_heads
from support.images import CLIP_MEAN, CLIP_STD
from support.system import BadInput, write, write_json
from support.weight_files import write_safetensors
from tokenizer import VOCAB

# cn_clip's names of the sizes that it knows: vision_model_name, text_model_name
PEER_NAMES = {
    "rn50": ("RN50", "RBT3-chinese"),
    "vit-b-32": ("ViT-B-32", "RoBERTa-wwm-ext-base-chinese"),
    "vit-b-16": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"),
    "vit-l-14": ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese"),
    "vit-l-14-336": ("ViT-L-14-336", "RoBERTa-wwm-ext-base-chinese"),
    "vit-h-14": ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese"),
}


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
        raise BadInput(f"a model with {cfg.vocab_size} tokens is not for other tools: "
                       f"their vocabulary has {Config.vocab_size:,}")
    if format not in writers:
        raise BadInput(f"format {format!r}: cn-clip or huggingface")
    ours = {}
    for key, x in model.state_dict().items():
        ours[key] = x.detach().cpu().float() if x.is_floating_point() else x.cpu()
    check_tensors(ours, ours, path, cfg)
    parent = path.absolute().parent
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=f"{path.name}.part-") as folder:
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
    if path.exists() or path.is_symlink():
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
        return (f"{path}: in the format of cn_clip, which has no name for these sizes "
                "(checkpoint.load opens it)")
    vision, text = PEER_NAMES[name]
    return (f'{path}: model, preprocess = cn_clip.clip.load_from_name("{path}", '
            f'vision_model_name="{vision}", text_model_name="{text}", '
            f'input_resolution={cfg.image_size}); model.eval()   # eval: it comes with dropout on; '
            "and rounded to half precision, which is cn_clip's way")


def export_huggingface(ours, part, path, cfg):
    """Write the folder `part`, which will be `path` -> a line that says how it is opened."""
    if not cfg.patch_size:
        raise BadInput("transformers has no ChineseCLIPModel with a ResNet; export it as cn-clip")
    side = cfg.image_size
    config = {
        "architectures": ["ChineseCLIPModel"], "model_type": "chinese_clip",
        "torch_dtype": "float32", "projection_dim": cfg.embed_dim,
        "logit_scale_init_value": ours["logit_scale"].item(),
    }
    for tower, width in (("vision", cfg.vision_width), ("text", cfg.text_width)):
        sizes = {key: getattr(cfg, field) for field, key in CONFIG_JSON[tower].items()}
        model_type = {"model_type": f"chinese_clip_{tower}_model", "intermediate_size": 4 * width}
        config[f"{tower}_config"] = model_type | sizes | REQUIRED[tower]
    config["vision_config"]["projection_dim"] = cfg.embed_dim
    config["text_config"] |= {
        "vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.text_positions,
        "type_vocab_size": 2, "attention_probs_dropout_prob": cfg.text_dropout, "pad_token_id": 0,
    }
    processor = {
        "processor_class": "ChineseCLIPProcessor",
        "image_processor_type": "ChineseCLIPImageProcessor",
        "feature_extractor_type": "ChineseCLIPFeatureExtractor",
        "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
        "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    tokenizer = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True,
        "model_max_length": cfg.context_length, "cls_token": "[CLS]", "sep_token": "[SEP]",
        "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]",
    }
    part.mkdir()
    write_json(part / "config.json", config, shown=path)
    write_json(part / "preprocessor_config.json", processor, shown=path)
    write_json(part / "tokenizer_config.json", tokenizer, shown=path)
    write(part / "vocab.txt", lambda f: f.write(VOCAB.read_bytes()), shown=path)
    tensors = Layout("Hugging Face").to_theirs(ours)
    write(part / "model.safetensors", lambda f: write_safetensors(f, tensors), shown=path)
    return (f'{path}: transformers.ChineseCLIPModel.from_pretrained("{path}"), '
            f'ChineseCLIPProcessor.from_pretrained("{path}")')
