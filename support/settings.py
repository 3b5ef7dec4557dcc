"""The settings of a training run: stages, recipes, flags, and what follows from them.

    args = parse_args(usage=__doc__)                        # the flags of train.py
    settings = resolve(args, config, train_split, valid_split, precision, world_size)

A flag that is not given takes its value from the recipe, else from the stage, else its default.
"""
import argparse
import math
from pathlib import Path

from model import CONFIGS
from support.checks import name_of
from support.recipes import RECIPES, STAGES, TINY, fitting_lr
from support.system import BadInput

RANGES = {
    "batch_size": (2, 1e7), "micro_batch": (1, 1e7), "epochs": (1e-6, 1e6), "max_steps": (0, 1e9),
    "lr": (0, 1e30), "warmup": (0, 1e9), "weight_decay": (0, 1e3), "mask_tokens": (0, 0.99),
    "patch_dropout": (0, 0.99), "max_bad": (0, 1), "seed": (0, 2**31 - 1), "workers": (0, 512),
    "valid_every": (0, 1e9), "save_every": (0, 1e9), "save_minutes": (0, 1e6), "keep": (1, 1e4),
    "log_every": (1, 1e9), "patience": (0, 1e6),
}


# ---- flags


def parse_args(argv=None, usage="", data_names=(), augmentations=None):
    """The flags of train.py, checked as far as they can be without data and weights.

    usage: the text after the flags in --help. data_names, augmentations: the known ones; data.py
    has them, which this file must not import. Raises BadInput.
    """
    parser = argparse.ArgumentParser(
        description="Train CE-CLIP.", epilog="\n".join([usage, *recipe_table(), *default_table()]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_start(parser.add_argument_group("start"))
    add_data(parser.add_argument_group("data"), data_names, augmentations)
    add_steps(parser.add_argument_group("steps"))
    add_running(parser.add_argument_group("running"))
    args = parser.parse_args(argv)
    if args.max_steps and args.epochs is not None:
        raise BadInput(f"--max-steps {args.max_steps} --epochs {args.epochs:g}: pass one of them")
    towers = args.vision_weights is not None or args.text_weights is not None
    if args.recipe:                                         # parse again: flags win over the recipe
        recipe = dict(RECIPES[args.recipe][1])
        if towers:
            recipe.pop("init", None)
        parser.set_defaults(**recipe)
        args = parser.parse_args(argv)
    if args.stage is None:
        parser.error("--stage or --recipe is required")
    if args.recipe and args.data is None:
        raise BadInput(f"--recipe {args.recipe}: name the data with --data")
    args.data = args.data or "demo"
    args.out = args.out or "runs/" + {"1": "stage1", "2": "stage2"}.get(args.stage, args.stage)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise BadInput(f"--out {args.out}: it is a file; name a folder for the run")
    if args.init is not None and towers:
        raise BadInput(f"--init {args.init}: it brings both towers, so neither --vision-weights "
                       "nor --text-weights go with it")
    if args.features == "":
        raise BadInput("--features '': name a folder, auto or none")
    if args.model is not None and args.model not in CONFIGS:
        raise BadInput(f"--model {args.model}: not a known model ({', '.join(CONFIGS)})")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # NaN, too, is out of range
            raise BadInput(f"--{name.replace('_', '-')} {value}: out of range, at least {low:g} "
                           f"and at most {high:g}")
    return args


def add_start(group):
    add = group.add_argument
    add("--stage", choices=list(STAGES),
        help="1: vision tower frozen; 2: both towers; finetune: both, on your data")
    add("--recipe", choices=list(RECIPES),
        help="the settings of a table of the paper, or of ours, listed below; flags override them")
    add("--model",
        help=f"{', '.join(CONFIGS)} (default: that of --init or --vision-weights, else tiny)")
    add("--init",
        help="a checkpoint to start from: a file, a folder, or the name of released weights (see "
             "checkpoint.py)")
    add("--vision-weights",
        help="a checkpoint whose vision tower and temperature to start from: OpenAI CLIP or any "
             "Chinese CLIP")
    add("--text-weights",
        help="a checkpoint whose text tower to start from: BERT, RoBERTa, RBT3 of Hugging Face or "
             "any Chinese CLIP (default: a fresh one)")
    add("--out", help="folder of the run (default: runs/stage1, runs/stage2 or runs/finetune)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")


def add_data(group, data_names, augmentations):
    add = group.add_argument
    add("--data",
        help=f"{', '.join(data_names)}, a folder, or a pattern of tar shards like "
             "'shards/{000000..020000}.tar' (default: demo)")
    add("--valid-data",
        help="what to validate on: the valid split of a name or folder, or all of a pattern "
             "(default: that of --data; with a pattern of shards, nothing)")
    add("--data-root", default="data", help="where the named data sets lie (default: data)")
    add("--augment", choices=augmentations, default="none",
        help="(default: none) photo: small shifts and stretches, mild colours; drawing: bends, "
             "turns and recolours")
    add("--positives", choices=("all", "pair"), default="all",
        help="the matches in a batch: all captions of an image and all images of a caption "
             "(default), or its pair alone, as in the paper")
    add("--mask-tokens", type=float, default=0.0,
        help="share of a caption's tokens that become [MASK] in training (default: 0)")
    add("--patch-dropout", type=float, default=0.0,
        help="share of an image's patches that a ViT leaves out in training: less time and memory "
             "(default: 0)")
    add("--max-bad", type=float, default=0.01,
        help="share of the pairs that may be unreadable and are replaced; above it the run stops "
             "(default: %(default)s)")
    # auto: OUT/features, when images come more than once. none: nowhere. Or a folder.
    add("--features", metavar="DIR", default="auto", help=argparse.SUPPRESS)


def add_steps(group):
    add = group.add_argument
    add("--batch-size", type=int, help="pairs per optimizer step, over all processes")
    add("--micro-batch", type=int,
        help="pairs that a process embeds at a time; several make up its share of the batch "
             "(default: the whole share)")
    add("--epochs", type=float, help="passes over the training pairs")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs")
    add("--lr", type=float, help="peak learning rate (default of finetune: it fits the batch)")
    add("--warmup", type=int, help="steps to reach it (at most half the run)")
    add("--weight-decay", type=float, default=0.001,
        help="of matrices and tables (default: %(default)s)")
    add("--valid-every", type=int, default=0,
        help="steps between validations (default: a tenth of the run, of a fine-tune a twentieth, "
             "more where they would take much of the time)")
    add("--patience", type=int, default=0,
        help="stop after so many validations without a higher recall (default: 0, never)")
    add("--average", action=argparse.BooleanOptionalAction,
        help="at the end try averages of the start and the end, too, as the best weights (default: "
             "when fine-tuning)")


def add_running(group):
    add = group.add_argument
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where the hardware has it, else fp16 on GPUs, else fp32")
    add("--grad-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true",
        help="torch.compile for the vision tower: for GPUs, and a minute at the start; on CPUs it "
             "gains nothing")
    add("--workers", type=int, default=1,
        help="processes that read images, for each training process (default: 1)")
    add("--save-minutes", type=float, default=15.0,
        help="minutes between snapshots, beside those at each validation (default: "
             "%(default)g; 0: none)")
    add("--keep", type=int, default=1,
        help="how many of the latest snapshots to keep (default: 1, last.pt)")
    add("--save-every", type=int, default=0, help=argparse.SUPPRESS)            # steps; 0: never
    add("--log-every", type=int, default=10, help=argparse.SUPPRESS)            # steps


def recipe_table():
    """Lines of --help."""
    lines = ["recipes:"]
    for name, (source, settings) in RECIPES.items():
        flags = " ".join(as_flag(*setting) for setting in settings.items())
        lines += [f"  {name:18}  {flags}", f"{'':22}({source})"]
    return lines


def default_table():
    """Lines of --help."""
    def row(stage, model, values):
        columns = [f"  {value or 'by batch':>10}" for value in values]
        return f"  {stage:8}  {model:12}" + "".join(columns)

    names = ["--lr", "--batch-size", "--epochs", "--warmup"]
    lines = ["", "defaults:", row("stage", "model", names)]
    for stage in STAGES:
        lines.append(row(stage, "tiny", TINY[stage].values()))
        lines.append(row(stage, "other models", STAGES[stage].values()))
    return lines


def as_flag(name, value):
    if value is False:
        return f"--no-{name}"
    return f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"


# ---- every setting of a run


def resolve(args, config, train_split, valid_split, precision, world_size):
    """Every setting of the run, a Namespace: flags, defaults of the stage, and what follows.

    Raises BadInput when they contradict each other or the data.
    """
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    settings = argparse.Namespace(**vars(args))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(settings, name, value)
    is_resnet, pairs = isinstance(config.vision_layers, tuple), len(train_split)
    if settings.batch_size % world_size:
        fits = max(1, settings.batch_size // world_size) * world_size
        raise BadInput(f"--batch-size {settings.batch_size} does not divide by {world_size} "
                       f"processes; {fits} does")
    if settings.patch_dropout and (args.stage == "1" or is_resnet):
        why = "the vision tower is frozen" if args.stage == "1" else "a ResNet has none"
        raise BadInput(f"--patch-dropout {settings.patch_dropout}: there are no patches to leave "
                       f"out: {why}")
    if settings.compile and is_resnet:
        raise BadInput("--compile: it is for ViTs; the blocks of a ResNet all differ")
    if not pairs:
        raise BadInput(f"{train_split.name}: no caption names an image, so there are no pairs to "
                       "train on")
    settings.model, settings.precision = name_of(config), precision
    settings.total_steps = args.max_steps
    if args.max_steps:
        settings.epochs = None
    else:
        settings.total_steps = math.ceil(settings.epochs * pairs / settings.batch_size)
    if settings.lr is None:
        settings.lr = fitting_lr(settings.batch_size, config)
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    settings.valid_every = args.valid_every or often_enough(settings, valid_split)
    if args.average is None:
        settings.average = args.stage == "finetune" and valid_split is not None
    if valid_split is None and (settings.average or settings.patience):
        flag, without = "--patience", "--patience 0"
        if settings.average:
            flag, without = "--average", "--no-average"
        raise BadInput(f"{flag}: there is no valid split to choose by; --valid-data names one, "
                       f"{without} does without")
    settings.features = features_folder(args, settings, train_split)
    settings.features_kept = True if settings.features else None    # rounded: they change the run
    settings.processes = world_size
    settings.norm_batch = None                              # images that BatchNorm sees at a time
    if is_resnet and args.stage != "1":
        together = world_size * (settings.micro_batch or settings.batch_size)
        settings.norm_batch = min(settings.batch_size, together)
    settings.train_pairs = train_split.fingerprint()
    settings.valid_pairs = valid_split.fingerprint() if valid_split else None
    return settings


def often_enough(settings, valid_split):
    """Steps between validations: a tenth of the run, of a fine-tune a twentieth.

    More where validation would take over a tenth of the time; a training pair costs as much as
    three images of the valid split.
    """
    share = settings.total_steps // (20 if settings.stage == "finetune" else 10)
    affordable = 0
    if valid_split:
        affordable = len(valid_split.image_ids) * 10 // (3 * settings.batch_size)
    return max(1, share, affordable)


def features_folder(args, settings, train_split):
    """Where the image embeddings are kept; None where they would change or not be used again."""
    changing = None
    if args.stage != "1":
        changing = f"stage {args.stage} trains the vision tower"
    elif args.augment != "none":
        changing = f"--augment {args.augment} changes its images"
    if args.features not in ("auto", "none"):
        if changing:
            raise BadInput(f"--features {args.features}: {changing}, so there are no features to "
                           "keep; leave it out")
        return args.features
    # In a single pass nothing would be used again.
    one_pass = (settings.total_steps - 1) * settings.batch_size < train_split.image_count()
    if args.features == "none" or changing or one_pass:
        return None
    return str(Path(args.out) / "features")
