"""Zero-shot classification (figure 2, steps 2 and 3): images in one folder for each class.

    python -m tools.classify /path/to/classes --ckpt cn-clip-vit-b-16       # 猫/1.jpg, 狗/1.jpg, …
    python -m tools.classify /path/to/classes --ckpt runs/own/best.pt --report report.html
    python -m tools.classify /path/to/classes --ckpt runs/own/best.pt --templates prompts.txt
"""
import argparse
import collections
import functools
from pathlib import Path

from support import report, system                  # before torch: see support/__init__.py

import numpy as np
import torch

import checkpoint
from evaluate import (best_ranks, check_shared, class_embeddings, class_probabilities,
                      embed_images, shared_flags)
from support.classes import class_root, listed, open_classes
from support.images import image_at
from support.processes import precision_of, start_processes
from support.system import BadInput, write_json
from support.tables import (align_columns, bootstrap_interval, change_of, gain_in_words,
                            plus_minus)

# One prompt a line; they vary what is said of the image. A class's embedding is their mean.
TEMPLATES = Path(__file__).with_name("templates.txt")


def read_templates(path):
    """A text file with one template a line, {} for the name of the class -> the templates."""
    lines = [line.strip() for _, line in system.utf8_lines(path) if line.strip()]
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise BadInput(f"{path}: expected lines with one {{}} each, for the name of the class, "
                       f"like 一张{{}}的照片; found {listed(wrong[:1]) or 'none'}")
    return lines


def classification_of(image_embed, class_embed, labels, names):
    """Each image gets the class with the most similar embedding, of equal ones the first.

    image_embed (I, D), class_embed (C, D): unit vectors; labels: I class numbers; names: of C
    classes -> (figures as --json writes them, whether each image was right: (I,) float64).
    """
    ranks = best_ranks(image_embed, class_embed, [[label] for label in labels])             # (I,)
    right = (ranks == 0).double().numpy()                                                   # (I,)
    counts = np.bincount(labels, minlength=len(names))                                      # (C,)
    rights = np.bincount(labels, weights=right, minlength=len(names))                       # (C,)
    accuracy = 100 * rights / np.maximum(counts, 1)                                         # (C,)
    figures = {"top-1": 100 * right.mean().item(),
               "top-5": 100 * (ranks < 5).double().mean().item(),
               "mean_per_class": accuracy[counts > 0].mean().item(),
               "top-1_interval": bootstrap_interval(right, np.arange(len(right))),
               "chance_top-1": 100 / len(names), "images": len(labels), "classes": len(names)}
    figures["per_class"] = [
        {"class": names[c], "images": int(counts[c]), "top-1": accuracy[c].item()}
        for c in np.flatnonzero(counts)]

    guesses = [(part @ class_embed.T).argmax(dim=1) for part in image_embed.split(1024)]
    pairs = collections.Counter(zip(labels, torch.cat(guesses).tolist()))
    confused = [
        {"class": names[a], "taken_for": names[b], "times": times, "of": int(counts[a])}
        for (a, b), times in pairs.most_common() if a != b]
    return figures | {"confused": confused[:20]}, right


def classify(source, args, device, names, paths, labels, templates):
    """-> (a checkpoint's record, whether each image was right (I,), i -> probabilities (C,))."""
    model, _ = checkpoint.load(source, device)
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    class_embed = class_embeddings(model, names, templates, autocast, args.batch_size)      # (C, D)
    image_embed = embed_images(model, functools.partial(image_at, paths), len(paths), device,
                               autocast, args.batch_size, args.workers)                     # (I, D)
    if not (image_embed.sum().isfinite() and class_embed.sum().isfinite()):
        raise BadInput(f"{source}: its embeddings hold NaN or infinity; --precision fp32 may help")
    figures, right = classification_of(image_embed, class_embed, labels, names)
    scale, predictions = model.logit_scale.exp().item(), []
    for part in image_embed.split(1024):
        p, order = class_probabilities(part, class_embed, scale).sort(descending=True, stable=True)
        for values, classes in zip(p[:, :5].tolist(), order[:, :5].tolist()):
            i = len(predictions)
            best = [[names[c], value] for c, value in zip(classes, values)]
            predictions.append({"image": str(paths[i]), "class": names[labels[i]], "best": best})
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg),
              "weights": checkpoint.fingerprint(model), "precision": precision,
              **figures, "predictions": predictions}
    return record, right, lambda i: class_probabilities(image_embed[i], class_embed, scale)


def class_rows(records):
    """The table: the names of its columns, and rows of cells."""
    rows = [["model", "top-1", "top-5", "mean per class"]]
    for record in records:
        top_1 = f"{record['top-1']:5.1f} {plus_minus(record['top-1_interval'])}"
        rows.append([f"> {record['model']} ({record['ckpt']})", top_1,
                     f"{record['top-5']:5.1f}", f"{record['mean_per_class']:5.1f}"])
    return rows


def class_notes(records, templates):
    """How to read class_rows: lines. templates: the number of prompts of a class."""
    first, *others = records
    lines = [
        f"> measured here, towers in {first['precision']}: {first['images']:,} images, "
        f"{first['classes']:,} classes, {templates} prompt{'s' * (templates > 1)} each. "
        f"A random guess gives top-1 of {first['chance_top-1']:.1f}.",
        "±: half of the 95 % interval when the images are resampled (bootstrap, 1,000 draws).",
    ]
    for record in others:
        lines.append(f"top-1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval: "
                     f"{gain_in_words(record['change_of_top-1'])}.")
    for record in records:
        pairs = [f"{c['class']} taken for {c['taken_for']}, {c['times']} of {c['of']}"
                 for c in record["confused"][:5]]
        if pairs:
            lines.append(f"most often confused by {record['ckpt']}: {'; '.join(pairs)}")
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.classify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", metavar="DIR", help="a folder with a folder for each class")
    parser.add_argument("--templates", metavar="FILE", default=TEMPLATES,
                        help="prompts, one a line, {} for the name of the class (default: 20)")
    args = shared_flags(parser).parse_args()
    check_shared(args)
    device, rank, _ = start_processes()
    root = class_root(Path(args.classes), args.split)
    names, paths, labels = open_classes(root, args.allow_outside)               # C, I, I
    templates = read_templates(args.templates)
    records, rights = [], []
    for source in args.ckpt:
        record, right, probabilities = classify(
            source, args, device, names, paths, labels, templates)
        if rights:
            record["change_of_top-1"] = change_of(rights[0], right, np.arange(len(right)))
        records.append(record)
        rights.append(right)
    if rank:
        return
    title = f"{root}: zero-shot classification (%)"
    notes = class_notes(records, len(templates))
    rows = class_rows(records)
    print("\n".join([title, *align_columns(rows), *notes]))
    if args.json is not None:
        write_json(args.json, {"data": str(root), "templates": templates, "results": records})
        print(f"wrote {args.json}")
    if args.report is not None:
        notes.append(f"prompts: {' '.join(templates)}")
        report.write_classification(
            args.report, title, rows, notes, records, names, paths, labels, probabilities)
        print(f"wrote {args.report}")


if __name__ == "__main__":
    system.run(main)
