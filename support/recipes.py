"""Defaults of the stages, the recipes, and a learning rate that fits the batch."""
import math

from model import CONFIGS

# The paper gives no figures for the two pretraining stages. The learning rates are Chinese CLIP's
# (from memory); the batch is smaller.
STAGES = {
    "1":        {"lr": 1e-4, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "2":        {"lr": 2e-5, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 10.0, "warmup": 100},   # None: fitting_lr
}

# The tiny model learns from random weights within minutes, so its learning rates are large.
TINY = {
    "1":        {"lr": 1e-3, "batch_size": 256, "epochs": 3.0, "warmup": 20},
    "2":        {"lr": 2e-3, "batch_size": 256, "epochs": 12.0, "warmup": 50},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 20.0, "warmup": 50},
}

# --recipe: the source of its settings, and the settings. Flags override them. _TABLE_2 is common to
# all of the paper's fine-tuning, with the plain loss and without averages of weights.
_TABLE_2 = {"stage": "finetune", "weight_decay": 0.001, "positives": "pair", "average": False}
_BASE = _TABLE_2 | {"init": "cn-clip-vit-b-16"}
_LARGE = _TABLE_2 | {"init": "cn-clip-vit-l-14"}
_PRETRAINING = {"batch_size": 32768, "warmup": 5000, "weight_decay": 0.001}
_FROM_PAPER = "the paper's tables 2 and 3"
_FROM_CHINESE_CLIP = ("arXiv 2211.01335, the batch as published there, learning rate and warmup "
                      "from memory; the paper itself gives none")
RECIPES = {
    "coco-cn-base": (_FROM_PAPER, _BASE | {
        "data": "coco-cn", "batch_size": 12800, "lr": 5e-5, "epochs": 13.0, "warmup": 6}),
    "coco-cn-large": (_FROM_PAPER, _LARGE | {
        "data": "coco-cn", "batch_size": 4096, "lr": 6e-5, "epochs": 7.0, "warmup": 5}),
    "flickr30k-cn-base": (_FROM_PAPER, _BASE | {
        "data": "flickr30k-cn", "batch_size": 7680, "lr": 5e-5, "epochs": 5.0, "warmup": 20}),
    "flickr30k-cn-large": (_FROM_PAPER, _LARGE | {
        "data": "flickr30k-cn", "batch_size": 4096, "lr": 2e-5, "epochs": 6.0, "warmup": 20}),
    "ap-id": ("the paper's table 2, whose batch is that of one card", _BASE | {
        "data": "ap-id", "batch_size": 128, "lr": 5e-5, "epochs": 200.0, "warmup": 100,
        "valid_every": 150}),
    "stage1": (_FROM_CHINESE_CLIP, {"stage": "1", "lr": 1e-4} | _PRETRAINING),
    "stage2": (_FROM_CHINESE_CLIP, {"stage": "2", "lr": 2e-5} | _PRETRAINING),
    "small": ("our own measurements on a few thousand pairs, see the README", {
        "stage": "finetune", "init": "cn-clip-vit-b-16", "batch_size": 128, "epochs": 40.0,
        "warmup": 50, "augment": "photo", "patience": 10}),
}

# For fine-tuning, a batch and a learning rate that fit each other: of the tiny model by our own
# measurements, of the others by the paper's table 3 (Flickr30K-CN, base).
FITTING = {"tiny": (128, 2e-3), "other models": (7680, 5e-5)}


def fitting_lr(batch_size, config):
    """A learning rate for fine-tuning with batches of this size.

    With Adam the rate that fits grows with the square root of the batch (arXiv 2205.10287): from
    FITTING's batch N and rate r it is r sqrt(batch_size / N).
    """
    batch, lr = FITTING["tiny" if config == CONFIGS["tiny"] else "other models"]
    return lr * math.sqrt(batch_size / batch)
