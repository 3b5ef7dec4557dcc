"""What a training run says at its start: its settings, and warnings about them."""
import math

from support.checks import name_of
from support.recipes import RECIPES, fitting_lr


def description(settings, model, train_split, valid_split, device, source, left_out, first_step):
    """The first lines of a run: the model, the data, the settings, and remarks on them.

    source: the name of the starting weights. left_out: what was not read of them, or None.
    """
    lines = []
    if settings.data == "demo":
        lines.append("Training on the painted demo data set. For the real thing pass --data "
                     "coco-cn, flickr30k-cn or a folder, and --model vit-b-16 or another size.")
    if settings.recipe:
        lines.append(recipe_line(settings))
    parameters = sum(p.numel() for p in model.parameters())
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(f"stage {settings.stage}: {name_of(model.cfg)}, {parameters:,} parameters, "
                 f"{training:,} of them train; starts from {source}")
    if left_out:
        lines.append(f"left out: {left_out}")
    valid = "no validation, so no best.pt (--valid-data names what to validate on)"
    if valid_split:
        valid = (f"{valid_split.name}: {len(valid_split.image_ids):,} images, "
                 f"{len(valid_split.texts):,} captions")
    lines.append(f"{train_split.name}: {len(train_split):,} pairs; {valid}")
    lines += remarks(settings, model.cfg, train_split, valid_split, source)
    share = settings.batch_size // settings.processes
    batch = f"{settings.batch_size:,} pairs"
    if settings.micro_batch and settings.micro_batch < share:
        batch += f" ({math.ceil(share / settings.micro_batch):,} micro-batches a process)"
    line = (f"{counted(settings.total_steps, 'step', 'steps')} of {batch}; "
            f"{counted(settings.processes, 'process', 'processes')}, {device.type}, "
            f"{settings.precision}")
    if valid_split:
        line += f"; validated every {counted(settings.valid_every, 'step', 'steps')}"
    if first_step:
        line += f"; continues after step {first_step:,}"
    lines += [line, "settings: " + " ".join(f"{k}={v}" for k, v in vars(settings).items())]
    return "\n".join(lines)


def counted(number, one, many):
    return f"{number:,} {one if number == 1 else many}"


def recipe_line(settings):
    """The recipe's settings that the run has, and those in which it differs."""
    source, recipe = RECIPES[settings.recipe]
    followed, changed = [], []
    for name, value in recipe.items():
        now = getattr(settings, name)
        (followed if now == value else changed).append(f"{name}={now}")
    line = f"recipe {settings.recipe} ({source}): {' '.join(followed)}"
    return line + (f"; otherwise than there: {' '.join(changed)}" if changed else "")


def remarks(settings, config, train_split, valid_split, source):
    """Warnings about a run's settings, a line each."""
    lines, batch, pairs = [], settings.batch_size, len(train_split)
    if settings.stage == "1" and settings.init is None and settings.vision_weights is None:
        lines.append("note: the frozen vision tower has random weights, from which little can be "
                     "learned; stage 1 is meant to start from a trained one (--vision-weights or "
                     "--init)")
    if batch > pairs:
        lines.append(f"warning: --batch-size {batch} is more than the {pairs} training pairs, so "
                     "every step repeats pairs; a smaller one, with more --epochs, learns more")
    if valid_split and len(valid_split.image_ids) < 50:
        lines.append(f"warning: {len(valid_split.image_ids)} images in {valid_split.name} are too "
                     "few to choose a checkpoint well; 100 or more are better")
    if settings.stage == "finetune" and source == "random weights":
        lines.append("note: there is nothing to fine-tune in random weights; name a checkpoint, "
                     "for example --init cn-clip-vit-b-16")
    fitting = fitting_lr(batch, config)
    if settings.stage == "finetune" and not fitting / 10 <= settings.lr <= 3 * fitting:
        too = "small: little will be learned"
        if settings.lr > fitting:
            too = "large: it may destroy what the start knows"
        line = (f"warning: for batches of {batch} a learning rate of {settings.lr:g} is {too}; "
                f"--lr {fitting:.1e} fits")
        its_batch = round(batch * (settings.lr / fitting) ** 2)     # the batch that this rate fits
        if batch < its_batch <= pairs:
            line += (f"; so does --batch-size {its_batch} (--micro-batch: what a device holds at a "
                     "time)")
        lines.append(line)
    if settings.norm_batch is not None and settings.norm_batch < batch:
        lines.append(f"note: BatchNorm in this ResNet sees {settings.norm_batch:,} images at a "
                     "time (--micro-batch x processes), not the whole batch; a ViT has none")
    share = batch // settings.processes
    if not settings.micro_batch and share > 1024:
        lines.append(f"note: {share:,} pairs at a time need much memory; --micro-batch 256 needs "
                     "less and takes the same steps")
    return lines
