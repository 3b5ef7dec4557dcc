"""The published implementations, as oracles: models made by their own code with random weights, in files as they write them."""
import contextlib
import dataclasses
import importlib.util
import json
import os
import runpy
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from model import CONFIGS
from tokenizer import CLS, PAD, SEP

# Released sizes at full width, two blocks deep: what a test can afford
SHALLOW = {name: dataclasses.replace(CONFIGS[name], vision_layers=2, text_layers=2) for name in ("vit-b-32", "vit-l-14", "vit-l-14-336", "vit-h-14")}
# Small ones, with heads 64 wide as in the peers. Their widths are not in CONFIGS: the fixture `small_sizes` (conftest.py) adds them.
VIT = dataclasses.replace(CONFIGS["vit-b-16"], embed_dim=32, image_size=32, vision_layers=2, vision_width=192, vision_heads=3, patch_size=8, text_layers=2, text_width=64, text_heads=1,
                          text_positions=64)
RESNET = dataclasses.replace(VIT, image_size=64, vision_layers=(2, 1, 1, 1), vision_width=12, vision_heads=6, patch_size=None)


def wake(model, seed=1):
    """Fresh weights have gains of 1 (or 0) and biases of 0, which would hide mistakes: make all of them random."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.ndim == 1 and x.is_floating_point():
            x.data += 0.1 * torch.randn(x.shape, generator=generator)
            x.data = x.data.abs() + 0.1 if "running_var" in name else x.data
    return model


def batch(cfg, n=4, seed=0):
    """pixels (n, 3, R, R) and ids (n, 52): captions of several lengths, as the tokenizer pads them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(200, cfg.vocab_size, (n, 52), generator=g)
    ids[:, 0] = CLS
    for row, length in enumerate(torch.randint(4, 53, (n,), generator=g)):
        ids[row, length - 1], ids[row, length:] = SEP, PAD
    pixels = F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size=(cfg.image_size, cfg.image_size), mode="bicubic")     # blots: more like images than noise is
    return pixels, ids


# ---------------------------------------------------------------------------------------------------------------- models


def cn_clip_model(cfg, seed=0):
    """Chinese-CLIP's own model (cn_clip), in float32, without dropout.

    BERT's matrices are drawn with deviation 0.1, not 0.02: with 0.02 all captions have nearly the same embedding, so that gradients cancel down to their rounding.
    """
    peer = pytest.importorskip("cn_clip.clip.model")
    torch.manual_seed(seed)
    return wake(peer.CLIP(
        embed_dim=cfg.embed_dim, image_resolution=cfg.image_size, vision_layers=cfg.vision_layers, vision_width=cfg.vision_width, vision_patch_size=cfg.patch_size,
        vision_head_width=cfg.vision_width * (1 if cfg.patch_size else 32) // cfg.vision_heads, vocab_size=cfg.vocab_size, text_attention_probs_dropout_prob=0.0,
        text_hidden_act="gelu", text_hidden_dropout_prob=0.0, text_hidden_size=cfg.text_width, text_initializer_range=0.1, text_intermediate_size=4 * cfg.text_width,
        text_max_position_embeddings=cfg.text_positions, text_num_attention_heads=cfg.text_heads, text_num_hidden_layers=cfg.text_layers, text_type_vocab_size=2))


def hub_model(cfg, seed=0):
    """transformers' ChineseCLIPModel."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ChineseCLIPConfig(
        text_config=hub_sizes(cfg.text_width, cfg.text_layers, cfg.text_heads) | dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.text_positions),
        vision_config=hub_sizes(cfg.vision_width, cfg.vision_layers, cfg.vision_heads) | dict(patch_size=cfg.patch_size, image_size=cfg.image_size), projection_dim=cfg.embed_dim)
    torch.manual_seed(seed)
    return wake(transformers.ChineseCLIPModel(config)).eval()


def hub_sizes(width, layers, heads):
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)


def bert_model(cfg, seed=0):
    """transformers' BERT with its pooler and the heads of its pretraining."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**hub_sizes(cfg.text_width, cfg.text_layers, cfg.text_heads), vocab_size=cfg.vocab_size, max_position_embeddings=cfg.text_positions)
    torch.manual_seed(seed)
    return wake(transformers.BertForPreTraining(config)).eval()


def hub_clip_model(cfg, seed=0):
    """transformers' CLIPModel: OpenAI's CLIP in the form of the Hugging Face hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(text_config=hub_sizes(64, 1, 1), projection_dim=cfg.embed_dim, vision_config=hub_sizes(cfg.vision_width, cfg.vision_layers, cfg.vision_heads)
                                     | dict(patch_size=cfg.patch_size, image_size=cfg.image_size))
    torch.manual_seed(seed)
    return wake(transformers.CLIPModel(config)).eval()


def openai_clip_model(cfg, seed=0):
    """OpenAI's CLIP, in half precision, with its English text tower."""
    package = importlib.util.find_spec("clip")
    if package is None:
        pytest.skip("clip-anytorch is not installed")
    spec = importlib.util.spec_from_file_location("openai_clip_model", Path(package.origin).with_name("model.py"))     # the package itself asks for more
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    model = wake(module.CLIP(cfg.embed_dim, cfg.image_size, cfg.vision_layers, cfg.vision_width, cfg.patch_size, 77, 300, 64, 1, 1)).eval()
    module.convert_weights(model)
    return model


# ---------------------------------------------------------------------------------------------------------------- files
#
# A kind of file: (tensors under its names, how to write them into a folder -> path, the `tower` of checkpoint.read)


def cn_clip_file(tensors, folder):
    """As cn_clip's training writes it: wrapped for several processes, an optimizer beside it."""
    torch.save({"epoch": 3, "step": 70, "name": "run", "state_dict": {f"module.{k}": v for k, v in tensors.items()}, "optimizer": {"state": {0: torch.ones(3)}}}, folder / "epoch3.pt")
    return folder / "epoch3.pt"


def bare_file(tensors, folder):
    torch.save(tensors, folder / "weights.bin")
    return folder / "weights.bin"


def old_bare_file(tensors, folder):
    """The file format of torch before 1.6, and the names of BERT's first conversions."""
    tensors = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in tensors.items()}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder / "pytorch_model.bin"


def safetensors_file(tensors, folder):
    from safetensors.torch import save_file

    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def sharded_folder(tensors, folder):
    """As transformers writes models over its limit."""
    names, half = list(tensors), len(tensors) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, keys in shards.items():
        safetensors_file({k: tensors[k] for k in keys}, folder).rename(folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torchscript_file(tensors, folder):
    """An archive with code in it, as OpenAI released its models."""
    root = torch.nn.Module()
    for key, x in tensors.items():
        module, *path = root, *key.split(".")
        for name in path[:-1]:
            if not hasattr(module, name):
                module.add_module(name, torch.nn.Module())
            module = getattr(module, name)
        module.register_buffer(path[-1], x)
    root.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # that TorchScript is no longer recommended
        torch.jit.trace(root, torch.ones(1), check_trace=False).save(folder / "archive.pt")
    return folder / "archive.pt"


def flash(tensors):
    """Names of Chinese-CLIP trained with FlashAttention, by its own conversion."""
    return pytest.importorskip("cn_clip.clip.model").convert_state_dict(dict(tensors))


def half(tensors):
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


FILES = {
    "cn-clip": (lambda: cn_clip_model(VIT).state_dict(), cn_clip_file, None),
    "cn-clip-resnet": (lambda: cn_clip_model(RESNET).state_dict(), cn_clip_file, None),
    "cn-clip-flash": (lambda: flash(cn_clip_model(VIT).state_dict()), cn_clip_file, None),
    "cn-clip-bare": (lambda: cn_clip_model(VIT).state_dict(), bare_file, None),
    "hub-safetensors": (lambda: hub_model(VIT).state_dict(), safetensors_file, None),
    "hub-bin": (lambda: hub_model(VIT).state_dict(), bare_file, None),
    "hub-shards": (lambda: hub_model(VIT).state_dict(), sharded_folder, None),
    "openai": (lambda: openai_clip_model(VIT).state_dict(), bare_file, "vision"),
    "openai-torchscript": (lambda: half(openai_clip_model(RESNET).state_dict()), torchscript_file, "vision"),
    "openai-hub": (lambda: hub_clip_model(VIT).state_dict(), safetensors_file, "vision"),
    "bert-safetensors": (lambda: bert_model(VIT).state_dict(), safetensors_file, "text"),
    "bert-bin": (lambda: bert_model(VIT).state_dict(), bare_file, "text"),
    "bert-old": (lambda: bert_model(VIT).state_dict(), old_bare_file, "text"),
}


# ---------------------------------------------------------------------------------------------------------------- evaluation


def run_cn_clip(script, *arguments):
    """One of cn_clip's evaluation scripts, as a person would run it, but for its .cuda()."""
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]), mock.patch.object(torch.Tensor, "cuda", lambda x: x), mock.patch("tqdm.tqdm", lambda x: x), open(os.devnull, "w") as nowhere, \
            contextlib.redirect_stdout(nowhere):
        runpy.run_module(f"cn_clip.eval.{script}", run_name="__main__")


def cn_clip_recall(folder, image_embed, text_embed, positives):
    """Recall by cn_clip's chain of five scripts -> {"text_to_image": {"R@1", "R@5", "R@10", "MR"}, "image_to_text": the same}, and the seconds that the scripts took."""
    jsonl = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    jsonl("images.jsonl", ({"image_id": i, "feature": x.tolist()} for i, x in enumerate(image_embed)))
    jsonl("texts.jsonl", ({"text_id": t, "feature": x.tolist()} for t, x in enumerate(text_embed)))
    jsonl("answers.jsonl", ({"text_id": t, "text": "", "image_ids": images} for t, images in enumerate(positives)))
    start = time.perf_counter()
    features = "--image-feats", folder / "images.jsonl", "--text-feats", folder / "texts.jsonl"
    run_cn_clip("make_topk_predictions", *features, "--output", folder / "found.jsonl")
    run_cn_clip("evaluation", folder / "answers.jsonl", folder / "found.jsonl", folder / "text_to_image.json")
    run_cn_clip("transform_ir_annotation_to_tr", "--input", folder / "answers.jsonl")
    run_cn_clip("make_topk_predictions_tr", *features, "--output", folder / "found.tr.jsonl")
    run_cn_clip("evaluation_tr", folder / "answers.tr.jsonl", folder / "found.tr.jsonl", folder / "image_to_text.json")
    seconds = time.perf_counter() - start
    scores = {way: json.loads((folder / f"{way}.json").read_text())["scoreJson"] for way in ("text_to_image", "image_to_text")}
    return {way: {"R@1": s["r1"], "R@5": s["r5"], "R@10": s["r10"], "MR": s["mean_recall"]} for way, s in scores.items()}, seconds
