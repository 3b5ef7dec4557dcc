"""support.settings"""
import argparse
import math
from pathlib import Path

from model import CONFIGS
from support.formats import name_of
from support.system import BadInput

# What each stage sets when no flag does. The paper gives no figures for the two pretraining stages; the learning rates are those of Chinese
# CLIP (from memory), the batch is a smaller one.
STAGES = {
    "1":        {"lr": 1e-4, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "2":        {"lr": 2e-5, "batch_size": 1024, "epochs": 1.0, "warmup": 5000},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 10.0, "warmup": 100},              # None: fitting_lr
}

# The tiny model learns from nothing, in minutes: steps as large as it bears.
TINY = {
    "1":        {"lr": 1e-3, "batch_size": 256, "epochs": 3.0, "warmup": 20},
    "2":        {"lr": 2e-3, "batch_size": 256, "epochs": 12.0, "warmup": 50},
    "finetune": {"lr": None, "batch_size": 128, "epochs": 20.0, "warmup": 50},
}

# --recipe: where its settings come from, and the settings. Flags override them.
_TABLE_2 = {"stage": "finetune", "weight_decay": 0.001,                         # in all of the paper's fine-tuning;
            "positives": "pair", "average": False}                              # its loss is the plain one, and it averages no weights
_BASE, _LARGE = _TABLE_2 | {"init": "cn-clip-vit-b-16"}, _TABLE_2 | {"init": "cn-clip-vit-l-14"}
_PAPER = "the paper's tables 2 and 3"
_PRETRAINING = "arXiv 2211.01335, the batch as published there, learning rate and warmup from memory; the paper itself gives none"
RECIPES = {
    "coco-cn-base":       (_PAPER, _BASE | {"data": "coco-cn", "batch_size": 12800, "lr": 5e-5, "epochs": 13.0, "warmup": 6}),
    "coco-cn-large":      (_PAPER, _LARGE | {"data": "coco-cn", "batch_size": 4096, "lr": 6e-5, "epochs": 7.0, "warmup": 5}),
    "flickr30k-cn-base":  (_PAPER, _BASE | {"data": "flickr30k-cn", "batch_size": 7680, "lr": 5e-5, "epochs": 5.0, "warmup": 20}),
    "flickr30k-cn-large": (_PAPER, _LARGE | {"data": "flickr30k-cn", "batch_size": 4096, "lr": 2e-5, "epochs": 6.0, "warmup": 20}),
    "ap-id": ("the paper's table 2, whose batch is that of one card",
              _BASE | {"data": "ap-id", "batch_size": 128, "lr": 5e-5, "epochs": 200.0, "warmup": 100, "valid_every": 150}),
    "stage1": (_PRETRAINING, {"stage": "1", "batch_size": 32768, "lr": 1e-4, "warmup": 5000, "weight_decay": 0.001}),
    "stage2": (_PRETRAINING, {"stage": "2", "batch_size": 32768, "lr": 2e-5, "warmup": 5000, "weight_decay": 0.001}),
    "small": ("our own measurements on a few thousand pairs, see the README",
              {"stage": "finetune", "init": "cn-clip-vit-b-16", "batch_size": 128, "epochs": 40.0, "warmup": 50, "augment": "photo",
               "patience": 10}),
}

# A batch and a learning rate that fit each other when fine-tuning: for the tiny model by our own measurements, for the others by the
# paper's table 3 (Flickr30K-CN, base).
FITTING = {"tiny": (128, 2e-3), "other models": (7680, 5e-5)}
RANGES = {"batch_size": (2, 1e7), "micro_batch": (1, 1e7), "epochs": (1e-6, 1e6), "max_steps": (0, 1e9), "lr": (0, 1e30),
          "warmup": (0, 1e9), "weight_decay": (0, 1e3), "mask_tokens": (0, 0.99), "patch_dropout": (0, 0.99), "max_bad": (0, 1),
          "seed": (0, 2**31 - 1), "workers": (0, 512), "valid_every": (0, 1e9), "save_every": (0, 1e9), "save_minutes": (0, 1e6),
          "keep": (1, 1e4), "log_every": (1, 1e9), "patience": (0, 1e6)}


def fitting_lr(batch_size, config):
    """A learning rate for fine-tuning with batches of this size. Small batches bear small rates only: with Adam the rate that fits grows
    with the square root of the batch (arXiv 2205.10287), so from FITTING's batch N and rate r it is r sqrt(batch_size / N)."""
    batch, lr = FITTING["tiny" if config == CONFIGS["tiny"] else "other models"]
    return lr * math.sqrt(batch_size / batch)


def description(settings, model, train_split, valid_split, device, world, first_step, source, state):
    """The first lines of a run: what trains, on what, with which settings; and what is odd about them."""
    lines, count = [], lambda params: f"{sum(p.numel() for p in params):,}"
    plural = lambda n, one, many: one if n == 1 else many
    if settings.data == "demo":
        lines.append("Training on the painted demo data set. For the real thing pass --data coco-cn, flickr30k-cn or a folder, "
                     "and --model vit-b-16 or another size.")
    if settings.recipe:
        source_of, recipe = RECIPES[settings.recipe]
        shown = lambda names: " ".join(f"{name}={getattr(settings, name)}" for name in names)
        other = [name for name, value in recipe.items() if getattr(settings, name) != value]
        lines.append(f"recipe {settings.recipe} ({source_of}): {shown(name for name in recipe if name not in other)}"
                     + (f"; otherwise than there: {shown(other)}" if other else ""))
    training = count(p for p in model.parameters() if p.requires_grad)
    lines.append(f"stage {settings.stage}: {name_of(model.cfg)}, {count(model.parameters())} parameters, "
                 f"{training} of them train; starts from {source}")
    if state.get("skipped"):
        lines.append(f"left out: {state['skipped']}")
    valid = "no validation, so no best.pt (--valid-data names what to validate on)"
    if valid_split:
        valid = f"{valid_split.name}: {len(valid_split.image_ids):,} images, {len(valid_split.texts):,} captions"
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid}")
    lines += remarks(settings, model.cfg, train_split, valid_split, world, source)
    batch = f"{settings.batch_size:,} pairs"
    if settings.micro_batch and settings.micro_batch < settings.batch_size // world:
        batch += f" ({math.ceil(settings.batch_size // world / settings.micro_batch):,} micro-batches a process)"
    lines.append(f"{settings.total_steps:,} {plural(settings.total_steps, 'step', 'steps')} of {batch}; "
                 f"{world} {plural(world, 'process', 'processes')}, {device.type}, {settings.precision}"
                 + (f"; validated every {settings.valid_every:,} {plural(settings.valid_every, 'step', 'steps')}" if valid_split else "")
                 + (f"; continues after step {first_step:,}" if first_step else ""))
    lines.append("settings: " + " ".join(f"{k}={v}" for k, v in vars(settings).items()))
    return "\n".join(lines)


def remarks(settings, config, train_split, valid_split, world, source):
    """What is odd about a run's settings, a line each."""
    lines, share, pairs = [], settings.batch_size // world, len(train_split)
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights, from which little can be learned; stage 1 is meant to start from "
                     "a trained one (--vision-weights or --init)")
    if settings.batch_size > pairs:
        lines.append(f"warning: --batch-size {settings.batch_size} is more than the {pairs} training pairs, so every step repeats pairs; "
                     "a smaller one, with more --epochs, learns more")
    if valid_split and len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} images in {valid_split.name} are too few to choose a checkpoint well; "
                     "100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: there is nothing to fine-tune in random weights; name a checkpoint, for example --init cn-clip-vit-b-16")
    fitting = fitting_lr(settings.batch_size, config)
    if settings.stage == "finetune" and not fitting / 10 <= settings.lr <= 3 * fitting:
        too = "large: it may destroy what the start knows" if settings.lr > fitting else "small: little will be learned"
        fits = round(settings.batch_size * (settings.lr / fitting) ** 2)        # the batch that this rate fits
        larger = ""
        if settings.batch_size < fits <= pairs:
            larger = f"; so does --batch-size {fits} (--micro-batch: what a device holds at a time)"
        lines.append(f"warning: for batches of {settings.batch_size} a learning rate of {settings.lr:g} is {too}; "
                     f"--lr {fitting:.1e} fits{larger}")
    if settings.norm_batch is not None and settings.norm_batch < settings.batch_size:
        lines.append(f"note: BatchNorm in this ResNet sees {settings.norm_batch:,} images at a time (--micro-batch x processes), "
                     "not the whole batch; a ViT has none")
    if not settings.micro_batch and share > 1024:
        lines.append(f"note: {share:,} pairs at a time need much memory; --micro-batch 256 needs less and takes the same steps")
    return lines


def parse_args(usage, data_names, augmentations, argv=None):
    """The flags of train.py; what only data.py knows is handed in."""
    shown = lambda value: f"{value:g}" if isinstance(value, float) else value
    flag = lambda name, value: f"--no-{name}" if value is False else f"--{name.replace('_', '-')} {shown(value)}"
    row = lambda stage, model, values: f"  {stage:8}  {model:12}" + "".join(f"  {value or 'by batch':>10}" for value in values)
    epilog = [usage, "recipes:"]
    for name, (source, sets) in RECIPES.items():
        epilog += [f"  {name:18}  {' '.join(flag(*item) for item in sets.items())}", f"{'':22}({source})"]
    epilog += ["", "defaults:", row("stage", "model", ("--" + name.replace("_", "-") for name in STAGES["1"]))]
    epilog += [row(stage, model, sets[stage].values()) for stage in STAGES for model, sets in (("tiny", TINY), ("other models", STAGES))]
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="Train CE-CLIP.", epilog="\n".join(epilog), formatter_class=as_written)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), help="1: vision tower frozen; 2: both towers; finetune: both, on your data")
    add("--recipe", choices=list(RECIPES), help="the settings of a table of the paper, or of ours, listed below; flags override them")
    add("--model", help=f"{', '.join(CONFIGS)} (default: that of --init or --vision-weights, else tiny)")
    add("--data",
        help=f"{', '.join(data_names)}, a folder, or a pattern of tar shards like "
             f"'shards/{{000000..020000}}.tar' (default: demo)")
    add("--valid-data",
        help="what to validate on: the valid split of a name or folder, or all of a pattern (default: that of --data; with a "
             "pattern of shards, nothing)")
    add("--data-root", default="data", help="where the named data sets lie (default: data)")
    add("--init", help="a checkpoint to start from: a file, a folder, or the name of released weights (see checkpoint.py)")
    add("--vision-weights", help="a checkpoint whose vision tower and temperature to start from: OpenAI CLIP or any Chinese CLIP")
    add("--text-weights",
        help="a checkpoint whose text tower to start from: BERT, RoBERTa, RBT3 of Hugging Face or any Chinese CLIP (default: a fresh one)")
    add("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    add("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    add("--micro-batch", type=int,
        help="pairs that a process holds at a time; several make up its share of the batch (default: the whole share)")
    add("--epochs", type=float, help="passes over the training pairs")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    add("--lr", type=float, help="peak learning rate (default of finetune: one that fits the batch)")
    add("--warmup", type=int, help="steps to reach it (at most half the run)")
    add("--weight-decay", type=float, default=0.001, help="of matrices and tables (default: %(default)s)")
    add("--augment", choices=augmentations, default="none",
        help="(default: none) photo: small shifts and stretches, mild colours; drawing: bends, turns and recolours")
    add("--positives", choices=("all", "pair"), default="all",
        help="what counts as right in a batch: all captions of a image and all images of a caption (default), or as in "
             "the paper its pair alone")
    add("--features", metavar="DIR", default="auto",
        help="stage 1 without augmentation: where the images' embeddings are kept, which are computed once; runs may share "
             "it. none: nowhere (default: OUT/features, when images come more than once)")
    add("--mask-tokens", type=float, default=0.0, help="share of a caption's tokens that become [MASK] in training (default: 0)")
    add("--patch-dropout", type=float, default=0.0,
        help="share of a image's patches that a ViT leaves out in training: less time and memory (default: 0)")
    add("--max-bad", type=float, default=0.01,
        help="share of the pairs that may be unreadable and are replaced; above it the run stops (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    add("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true",
        help="torch.compile for the vision tower: for GPUs, and a minute at the start; on CPUs it gains nothing")
    add("--workers", type=int, default=1, help="processes that read images, for each training process (default: 1)")
    add("--valid-every", type=int, default=0,
        help="steps between validations (default: a tenth of the run, of a fine-tune a twentieth, more where they would take "
             "much of the time)")
    add("--patience", type=int, default=0, help="stop after so many validations without a higher recall (default: 0, never)")
    add("--average", action=argparse.BooleanOptionalAction,
        help="at the end try averages of the start and the end, too, as the best weights (default: when fine-tuning)")
    add("--save-every", type=int, default=0, help="steps between snapshots, beside those at each validation (default: none)")
    add("--save-minutes", type=float, default=15.0, help="minutes between snapshots, beside those (default: %(default)g; 0: none)")
    add("--keep", type=int, default=1, help="how many of the latest snapshots to keep (default: 1, last.pt)")
    add("--log-every", type=int, default=10, help="steps between lines (default: 10)")
    args = parser.parse_args(argv)
    if args.max_steps and args.epochs is not None:
        raise BadInput(f"--max-steps {args.max_steps} --epochs {args.epochs:g}: pass one of them")
    if args.recipe:                                                             # once more: its values as defaults, so that flags win
        recipe = RECIPES[args.recipe][1]
        towers = args.vision_weights is not None or args.text_weights is not None
        parser.set_defaults(**{name: value for name, value in recipe.items() if not (towers and name == "init")})
        args = parser.parse_args(argv)
    if args.stage is None:
        parser.error("--stage or --recipe is required")
    if args.recipe and args.data is None:
        raise BadInput(f"--recipe {args.recipe}: name the data with --data")
    args.data = args.data or "demo"
    args.out = args.out or ("runs/finetune" if args.stage == "finetune" else f"runs/stage{args.stage}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise BadInput(f"--out {args.out}: it is a file; name a folder for the run")
    if args.init is not None and (args.vision_weights is not None or args.text_weights is not None):
        raise BadInput(f"--init {args.init}: it brings both towers, so neither --vision-weights nor --text-weights go with it")
    if args.features == "":
        raise BadInput("--features '': name a folder, auto or none")
    if args.model is not None and args.model not in CONFIGS:
        raise BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:                      # NaN fails, too
            raise BadInput(f"--{name.replace('_', '-')} {value}: out of range, at least {low:g} and at most {high:g}")
    return args


def resolve(args, config, train_split, valid_split, precision, world):
    """Every setting of the run: the flags that were given, the stage's defaults for the others, and what follows from both. Raises BadInput
    when they cannot be followed."""
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    settings = argparse.Namespace(**{name: defaults.get(name) if value is None else value for name, value in vars(args).items()})
    resnet, pairs = isinstance(config.vision_layers, tuple), len(train_split)
    if settings.batch_size % world:
        fits = max(1, settings.batch_size // world) * world
        raise BadInput(f"--batch-size {settings.batch_size} does not divide by {world} processes; {fits} does")
    if settings.patch_dropout and (args.stage == "1" or resnet):
        why = "the vision tower is frozen" if args.stage == "1" else "a ResNet has none"
        raise BadInput(f"--patch-dropout {settings.patch_dropout}: there are no patches to leave out, for {why}")
    if not pairs:
        raise BadInput(f"{train_split.name}: no caption names a image, so there are no pairs to train on")
    settings.model, settings.precision = name_of(config), precision
    settings.total_steps = args.max_steps or math.ceil(settings.epochs * pairs / settings.batch_size)
    settings.epochs = None if args.max_steps else settings.epochs
    settings.lr = fitting_lr(settings.batch_size, config) if settings.lr is None else settings.lr
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    settings.valid_every = args.valid_every or often_enough(settings, valid_split)
    settings.average = bool(valid_split) and args.stage == "finetune" if args.average is None else args.average
    if valid_split is None and (settings.average or settings.patience):
        flag, without = ("average", "--no-average") if settings.average else ("patience", "--patience 0")
        raise BadInput(f"--{flag}: there is no valid split to choose by; --valid-data names one, {without} does without")
    settings.features = features_folder(args, settings, train_split)
    settings.features_kept = True if settings.features else None                # they are rounded, so without them it is another run
    settings.processes = world
    settings.norm_batch = None                                                  # images that BatchNorm sees at a time
    if resnet and args.stage != "1":
        settings.norm_batch = min(settings.batch_size, world * (settings.micro_batch or settings.batch_size))
    settings.train_pairs, settings.valid_pairs = train_split.fingerprint(), valid_split.fingerprint() if valid_split else None
    return settings


def often_enough(settings, valid_split):
    """Steps between validations: a tenth of the run, of a fine-tune a twentieth; but not so few that validation takes more than about a
    tenth of the time, where a training pair costs as much as three images of the valid split."""
    affordable = len(valid_split.image_ids) * 10 // (3 * settings.batch_size) if valid_split else 0
    return max(1, settings.total_steps // (20 if settings.stage == "finetune" else 10), affordable)


def features_folder(args, settings, train_split):
    """Where the images' embeddings are kept; None where they would change or not be used again."""
    changing = None
    if args.stage != "1":
        changing = f"stage {args.stage} trains the vision tower"
    elif args.augment != "none":
        changing = f"--augment {args.augment} changes its images"
    if args.features not in ("auto", "none"):
        if changing:
            raise BadInput(f"--features {args.features}: {changing}, so there are no features to keep; leave it out")
        return args.features
    one_pass = (settings.total_steps - 1) * settings.batch_size < train_split.image_count()       # in which nothing would be saved
    return None if args.features == "none" or changing or one_pass else str(Path(args.out) / "features")
