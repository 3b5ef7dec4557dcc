"""The published implementations, as oracles: models made by their own code, and files as they write them."""
import dataclasses

import pytest
import torch

from model import CONFIGS

# full width, two blocks deep (or as deep as said): what a test can afford
SHALLOW = {name: dataclasses.replace(CONFIGS[name], vision_layers=2, text_layers=2) for name in ("vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336", "vit-h-14")}
# small ones; their heads are those of the peers' rule, 64 wide
VIT = dataclasses.replace(CONFIGS["vit-b-16"], embed_dim=32, image_size=32, vision_layers=2, vision_width=192, vision_heads=3, patch_size=8, text_layers=2, text_width=192, text_heads=3, text_positions=64)
RESNET = dataclasses.replace(VIT, image_size=64, vision_layers=(2, 1, 1, 1), vision_width=12, vision_heads=6, patch_size=None)


def wake(model, seed=1):
    """Fresh weights have gains of 1 (or 0) and biases of 0, which would hide mistakes: make all of them random."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.ndim == 1 and x.is_floating_point():
            x.data += 0.1 * torch.randn(x.shape, generator=generator)
            x.data = x.data.abs() + 0.1 if "running_var" in name else x.data
    return model


def cn_clip_model(cfg, seed=0, dropout=0.0):
    """cn_clip's own model in float32."""
    peer = pytest.importorskip("cn_clip.clip.model")
    torch.manual_seed(seed)
    return wake(peer.CLIP(
        embed_dim=cfg.embed_dim, image_resolution=cfg.image_size, vision_layers=cfg.vision_layers, vision_width=cfg.vision_width, vision_patch_size=cfg.patch_size,
        vision_head_width=cfg.vision_width * (1 if cfg.patch_size else 32) // cfg.vision_heads, vocab_size=cfg.vocab_size, text_attention_probs_dropout_prob=dropout,
        text_hidden_act="gelu", text_hidden_dropout_prob=dropout, text_hidden_size=cfg.text_width, text_initializer_range=0.02, text_intermediate_size=4 * cfg.text_width,
        text_max_position_embeddings=cfg.text_positions, text_num_attention_heads=cfg.text_heads, text_num_hidden_layers=cfg.text_layers, text_type_vocab_size=2))


def cn_clip_file(path, model):
    """As cn_clip's training writes it: wrapped by DistributedDataParallel, with an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"epoch": 3, "step": 70, "name": "run", "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict()}, path)
    return path


def hub_model(cfg, seed=0):
    """transformers' ChineseCLIPModel."""
    transformers = pytest.importorskip("transformers")
    tower = lambda width, layers, heads: dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
    config = transformers.ChineseCLIPConfig(
        text_config=tower(cfg.text_width, cfg.text_layers, cfg.text_heads) | dict(vocab_size=cfg.vocab_size, max_position_embeddings=cfg.text_positions),
        vision_config=tower(cfg.vision_width, cfg.vision_layers, cfg.vision_heads) | dict(patch_size=cfg.patch_size, image_size=cfg.image_size), projection_dim=cfg.embed_dim)
    torch.manual_seed(seed)
    return wake(transformers.ChineseCLIPModel(config)).eval()


def batch(cfg, n=4, seed=0):
    """pixels (n, 3, R, R), ids (n, 52): captions of several lengths, as the tokenizer pads them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(200, cfg.vocab_size, (n, 52), generator=g)
    ids[:, 0] = 101
    for row, length in enumerate(torch.randint(4, 53, (n,), generator=g)):
        ids[row, length - 1], ids[row, length:] = 102, 0
    return torch.randn(n, 3, cfg.image_size, cfg.image_size, generator=g), ids
