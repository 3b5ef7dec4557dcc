"""The settings of a training run: stages, recipes, flags, and what follows from them.

    args = parse_args(usage=__doc__)                        # the flags of train.py
    settings = resolve(args, config, train_split, valid_split, precision, world_size)
    print(description(settings, …))                         # and warnings

A flag that is not given takes its value from the recipe, else from the stage, else its default.
recipes.json holds recipes, {name: [source, settings]}, and defaults of the stages; flags.json
every flag.
"""
import argparse
import json
import math
from pathlib import Path

from model import CONFIGS
from support.formats import name_of
from support.system import BadInput

TABLES = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))
STAGES, TINY, RECIPES = TABLES["stages"], TABLES["tiny"], TABLES["recipes"]
TABLES = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
FLAGS, RANGES = TABLES["groups"], TABLES["ranges"]
MAY_CHANGE_ON_RESUME = set(TABLES["may change on resume"])


def parse_args(argv=None, usage="", data_names=(), augmentations=None):
    """The flags of train.py, checked as far as they can be without data and weights.

    usage: the text after the flags in --help. data_names, augmentations: the known ones; data.py
    has them, which this file must not import. Raises BadInput.
    """
    parser = argparse.ArgumentParser(
        description="Train CE-CLIP.", epilog=f"{usage}\n{tables()}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, data_names, augmentations)
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
    if args.init is not None and towers:
        raise BadInput(f"--init {args.init} brings both towers: leave out --vision-weights and "
                       "--text-weights")
    if args.features == "":
        raise BadInput("--features '': name a folder, auto or none")
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # NaN, too, is out of range
            raise BadInput(f"--{name.replace('_', '-')} {value}: out of range, {low:g} to {high:g}")
    return args


def add_flags(parser, data_names, augment):
    """Adds the flags of flags.json, and what JSON cannot say of them."""
    choices = {"--stage": STAGES, "--recipe": RECIPES, "--model": CONFIGS, "--augment": augment}
    parser.register("action", "yes or no", argparse.BooleanOptionalAction)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, options in flags.items():
            options = {"help": argparse.SUPPRESS} | options
            if "type" in options:
                options["type"] = {"int": int, "float": float}[options["type"]]
            if flag in choices:
                options["choices"] = choices[flag]
            if flag == "--data":
                options["help"] = f"{', '.join(data_names)}, {options['help']}"
            group.add_argument(flag, **options)


def tables():
    """The recipes and the defaults of the stages, for --help."""
    lines = ["recipes:"]
    for name, (source, settings) in RECIPES.items():
        lines += [f"  {name:18}  {as_flags(settings)}", f"{'':22}({source})"]
    lines += ["", "defaults:"]
    for model, stages in (("tiny", TINY), ("other models", STAGES)):
        lines += [f"  {model + ', ' + name:22}  {as_flags(stages[name])}" for name in stages]
    return "\n".join(lines)


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        if value is False:
            flags.append(f"--no-{name}")
        elif value is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            flags.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(flags)


# ---- every setting of a run


def resolve(args, config, train_split, valid_split, precision, world_size):
    """Every setting of the run, a Namespace: flags, defaults of the stage, and what follows.

    Raises BadInput when they contradict each other or the data.
    """
    settings = argparse.Namespace(**vars(args))
    defaults = (TINY if config == CONFIGS["tiny"] else STAGES)[args.stage]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(settings, name, value)
    is_resnet, pairs = isinstance(config.vision_layers, tuple), len(train_split)
    if settings.batch_size % world_size:
        raise BadInput(f"--batch-size {settings.batch_size}: no multiple of {world_size} processes")
    if settings.patch_dropout and (args.stage == "1" or is_resnet):
        raise BadInput(f"--patch-dropout {settings.patch_dropout}: it is for a ViT that trains")
    if settings.compile and is_resnet:
        raise BadInput("--compile: it is for ViTs; the blocks of a ResNet all differ")
    if not pairs:
        raise BadInput(f"{train_split.name}: no caption names an image, so there are no pairs")
    if settings.batch_size > 1000 * pairs:
        raise BadInput(f"--batch-size {settings.batch_size}: more than 1,000 times the {pairs:,} "
                       f"pairs of {train_split.name}")
    settings.model, settings.precision = name_of(config), precision
    if args.max_steps:
        settings.total_steps, settings.epochs = args.max_steps, None
    else:
        settings.total_steps = math.ceil(settings.epochs * pairs / settings.batch_size)
    if settings.lr is None:
        settings.lr = fitting_lr(settings.batch_size, config)
    settings.warmup = min(settings.warmup, settings.total_steps // 2)
    settings.valid_every = args.valid_every or often_enough(settings, valid_split)
    if args.average is None:
        settings.average = args.stage == "finetune" and valid_split is not None
    for flag in ("average", "patience"):
        if valid_split is None and getattr(settings, flag):
            raise BadInput(f"--{flag}: there is no valid split to choose by; pass --valid-data")
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


def fitting_lr(batch_size, config):
    """A learning rate for fine-tuning with batches of this size.

    With Adam it grows with the square root of the batch (arXiv 2205.10287): r sqrt(batch_size / N).
    N and r of the tiny model are measured, those of others are the paper's (table 3, Flickr30K-CN).
    """
    batch, lr = (128, 2e-3) if config == CONFIGS["tiny"] else (7680, 5e-5)
    return lr * math.sqrt(batch_size / batch)


def often_enough(settings, valid_split):
    """Steps between validations: a tenth of the run, of a fine-tune a twentieth.

    More where validation would take over a tenth of the time; a training pair costs as much as
    three images of the valid split.
    """
    share = settings.total_steps // (20 if settings.stage == "finetune" else 10)
    images = len(valid_split.image_ids) if valid_split else 0
    return max(1, share, 10 * images // (3 * settings.batch_size))


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
    one_pass = (settings.total_steps - 1) * settings.batch_size < train_split.image_count()
    if args.features == "none" or changing or one_pass:
        return None
    return str(Path(args.out) / "features")


# ---- what a run says at its start


def description(settings, model, train_split, valid_split, device, source, left_out, first_step):
    """The first lines of a run: the model, the data, the settings, and remarks on them.

    source: the name of the starting weights. left_out: what was not read of them, or None.
    """
    lines = []
    if settings.data == "demo":
        lines.append("Training on the painted demo data. For the real thing pass --data coco-cn "
                     "or a folder, and --model vit-b-16 or another size.")
    if settings.recipe:
        recipe_source, recipe = RECIPES[settings.recipe]
        now = {name: getattr(settings, name) for name in recipe}
        changed = {name: value for name, value in now.items() if value != recipe[name]}
        lines.append(f"recipe {settings.recipe} ({recipe_source}); otherwise than there: "
                     f"{listed(changed) or 'nothing'}")
    parameters = sum(p.numel() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(f"stage {settings.stage}: {settings.model}, {parameters:,} parameters, "
                 f"{training:,} of them train; starts from {source}")
    if left_out:
        lines.append(f"left out: {left_out}")
    valid = "no validation, so no best.pt (--valid-data names what to validate on)"
    if valid_split:
        valid = (f"{valid_split.name}: {len(valid_split.image_ids):,} images, "
                 f"{len(valid_split.texts):,} captions, every {settings.valid_every:,} steps")
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid}")
    lines += remarks(settings, model.cfg, train_split, valid_split, source)
    line = (f"steps: {settings.total_steps:,} of {settings.batch_size:,} pairs; processes: "
            f"{settings.processes}, {device.type}, {settings.precision}")
    if first_step:
        line += f"; continues after step {first_step:,}"
    return "\n".join([*lines, line, f"settings: {listed(vars(settings))}"])


def listed(settings):
    return " ".join(f"{name}={value}" for name, value in settings.items())


def remarks(settings, config, train_split, valid_split, source):
    """Warnings about a run's settings, a line each."""
    lines, batch, pairs = [], settings.batch_size, len(train_split)
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights; start from trained ones "
                     "(--vision-weights or --init)")
    if batch > pairs:
        lines.append(f"warning: --batch-size {batch} repeats some of the {pairs} pairs in a step")
    if valid_split and len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} images in {valid_split.name} are too "
                     "few to choose a checkpoint well; 100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: random weights leave nothing to fine-tune; try --init cn-clip-vit-b-16")
    fitting = fitting_lr(batch, config)
    if settings.stage == "finetune" and not fitting / 10 <= settings.lr <= 3 * fitting:
        too = "large: it may destroy what the start knows"
        if settings.lr < fitting:
            too = "small: little will be learned"
        lines.append(f"warning: for batches of {batch} a learning rate of {settings.lr:g} is "
                     f"{too}; --lr {fitting:.1e} fits")
    if settings.norm_batch is not None and settings.norm_batch < batch:
        lines.append(f"note: BatchNorm in this ResNet sees {settings.norm_batch:,} images at a "
                     "time (--micro-batch x processes), not the whole batch")
    share = batch // settings.processes
    if not settings.micro_batch and share > 1024:
        lines.append(f"note: --micro-batch 256 takes the same steps in less memory ({share:,} now)")
    return lines
