"""Zero-shot classification (figure 2, steps 2 and 3): images in one folder for each class.

    python -m tools.classify /path/to/classes --ckpt cn-clip-vit-b-16       # 猫/1.jpg, 狗/1.jpg, …
    python -m tools.classify /path/to/classes --ckpt runs/own/best.pt --report report.html
    python -m tools.classify /path/to/classes --ckpt runs/own/best.pt --templates prompts.txt
"""
import argparse
import collections
import functools
import unicodedata
import warnings
from pathlib import Path

from support import report, system                  # before torch: see support/__init__.py

import numpy as np
import torch

import checkpoint
from evaluate import (best_ranks, check_shared, class_embeddings, class_probabilities,
                      embed_images, shared_flags)
from support.captions import is_text
from support.images import ENDINGS, image_at, image_files
from support.processes import precision_of, start_processes
from support.system import BadInput, write_json
from support.tables import bootstrap_interval, change_of, class_notes, class_table

# The embedding of a class is the mean over these sentences: they vary what is said of the image.
TEMPLATES = ("{}", "{}。", "这是{}。", "一张{}的照片。", "一张{}的图片。", "一张清晰的{}照片。",
             "一张模糊的{}照片。", "一张{}的特写。", "一张{}的黑白照片。", "远处的{}。", "画面里有{}。",
             "照片中的{}。", "许多{}。", "一个{}。", "小小的{}。", "巨大的{}。", "{}的插图。",
             "{}的素描。", "一幅{}的画。", "卡通风格的{}。")


# ---- folders of classes


def class_root(folder, split=None):
    """folder/split, or without a split folder/test, or `folder` itself if it has no splits.

    Raises BadInput when that folder of class folders does not exist.
    """
    folder, wanted = Path(folder), Path(folder, split or "test")
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; expected one with a folder for each "
                       "class: 猫/1.jpg, 狗/1.jpg, …, or test/000, test/001, … and label_cn.txt")
    # A class may be called "test", too: a split is a folder that holds folders.
    splits = [path.name for path in (wanted, *(folder / name for name in ("train", "val", "valid")))
              if path.is_dir() and any(inside.is_dir() for inside in path.iterdir())]
    if wanted.name in splits:
        return wanted
    if split or splits:
        raise BadInput(f"{folder}: no split {wanted.name!r}; it has {', '.join(splits) or 'none'}")
    return folder


def open_classes(root):
    """-> (names of C classes, paths of I images, I class numbers).

    The folders have the names of the classes: root/猫/1.jpg; or see class_numbers.
    """
    folders = sorted(path.name for path in root.iterdir()
                     if path.is_dir() and not path.name.startswith("."))
    names, class_of = list(map(composed, folders)), {name: c for c, name in enumerate(folders)}
    label_files = [root / "label_cn.txt", root.absolute().parent / "label_cn.txt"]
    if label_file := next(filter(Path.is_file, label_files), None):
        names = read_labels(label_file)
        class_of = class_numbers(root, folders, names, label_file)
    elif folders and are_numbers(folders):
        warnings.warn(f"{root}: there is no label_cn.txt, so the folders' numbers are taken for "
                      f"names: {listed(folders)}")
    bad_names = [name for name in names if not name or not is_text(name)]
    if len(set(class_of.values())) < len(class_of) or bad_names:
        raise BadInput(f"{root}: two folders with one name or number, or a name that is empty or "
                       f"not UTF-8 ({listed(folders)})")

    paths, labels = [], []
    for name, c in class_of.items():
        files, unread = image_files(root / name)
        for place, reason in unread.items():
            raise BadInput(f"{root / name / place}: cannot be read ({reason})")
        paths += [root / name / file for file in files]
        labels += [c] * len(files)
    if len(names) < 2 or not paths:
        raise BadInput(f"{root}: {len(names)} classes and {len(paths)} images; expected two or "
                       "more folders, one for each class, with images in them")
    files = sorted(path.name for path in root.iterdir() if path.is_file())
    if loose := [name for name in files if Path(name).suffix.lower() in ENDINGS]:
        warnings.warn(f"{root}: images in no class folder: {len(loose):,} ({listed(loose)})")
    if empty := [names[c] for c in sorted(set(range(len(names))) - set(labels))]:
        warnings.warn(f"{root}: classes without an image: {len(empty):,} ({listed(empty)})")
    return names, paths, labels


def read_labels(path):
    """label_cn.txt -> the names of the classes: line i, from 0, names class i."""
    names = [composed(line) for _, line in system.utf8_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise BadInput(f"{path}, line {line}: empty; each line names one class")
    return names


def class_numbers(root, folders, names, label_file):
    """{folder: class number}, for a label file with these names.

    As in ELEVATER-cn and ImageNet, the folders have the names of the classes; or their numbers,
    000, 001, …; or other names (n01440764, …), one for each class in alphabetical order.
    """
    strange = [name for name in folders if composed(name) not in names]
    if not strange:
        return {name: names.index(composed(name)) for name in folders}
    if are_numbers(folders):
        if beyond := [name for name in folders if int(name) >= len(names)]:
            raise BadInput(f"{root}: the folder {beyond[0]} has no line in {label_file}, whose "
                           f"{len(names)} lines name the classes 0 to {len(names) - 1}")
        return {name: int(name) for name in folders}
    if len(strange) < len(folders) or len(folders) != len(names):
        raise BadInput(f"{root}: no line of {label_file} ({len(names)} lines) names the folders "
                       f"{listed(strange)}; name them 000, 001, … or as the lines")
    return {name: c for c, name in enumerate(folders)}


def composed(name):
    return unicodedata.normalize("NFC", name.strip())           # macOS writes é as two characters


def are_numbers(folders):
    return all(name.isdecimal() and name.isascii() for name in folders)


def listed(names):
    return system.printable(", ".join(names[:5]) + ", …" * (len(names) > 5))


# ---- figures


def read_templates(path):
    """A text file with one template a line, {} for the name of the class -> the templates."""
    if not Path(path).is_file():
        raise BadInput(f"--templates {path}: there is no such file")
    templates = []
    for number, line in system.utf8_lines(path):
        if line.strip():
            templates.append(line.strip())
            if line.count("{}") != 1:
                raise BadInput(f"{path}, line {number}: expected one {{}} for the name of the "
                               f"class, found {line.strip()[:60]}")
    if not templates:
        raise BadInput(f"{path}: no templates; expected lines like 一张{{}}的照片")
    return templates


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
    wrong = [(pair, times) for pair, times in pairs.most_common() if pair[0] != pair[1]]
    figures["confused"] = [
        {"class": names[a], "taken_for": names[b], "times": times, "of": int(counts[a])}
        for (a, b), times in wrong[:20]]
    return figures, right


def predictions_of(image_embed, class_embed, scale, names):
    """For each image its five most probable classes, best first: [[[name, probability], …], …]."""
    found = []
    for part in image_embed.split(1024):
        p, order = class_probabilities(part, class_embed, scale).sort(descending=True, stable=True)
        for values, classes in zip(p[:, :5].tolist(), order[:, :5].tolist()):
            found.append([[names[c], value] for c, value in zip(classes, values)])
    return found


# ---- the program


def classify(args, device, is_main):
    """Classify the images with each checkpoint, print the table, write --json and --report."""
    root = class_root(args.classes, args.split)
    names, paths, labels = open_classes(root)                                   # C, I, I
    templates = TEMPLATES if args.templates is None else read_templates(args.templates)
    records, rights = [], []                                                    # of each checkpoint
    for source in args.ckpt:
        model, _ = checkpoint.load(source, device)
        record, image_embed, class_embed = embed(model, source, args, names, paths, templates)
        figures, right = classification_of(image_embed, class_embed, labels, names)
        records.append(record | figures)
        rights.append(right)
        if len(records) > 1:
            change = change_of(rights[0], right, np.arange(len(right)))
            records[-1]["change_of_top-1"] = change
        scale = model.logit_scale.exp().item()
        best = predictions_of(image_embed, class_embed, scale, names)
        records[-1]["predictions"] = [
            {"image": str(path), "class": names[c], "best": some}
            for path, c, some in zip(paths, labels, best)]
    if not is_main:
        return
    title = f"{root}: zero-shot classification (%)"
    print(class_table(records, title, len(templates)))
    if args.json is not None:
        content = {"data": str(root), "templates": list(templates), "results": records}
        write_json(args.json, content)
        print(f"wrote {args.json}")
    if args.report is not None:
        notes = [*class_notes(records, len(templates)), f"prompts: {' '.join(templates)}"]
        report.write_classification(
            args.report, title, notes, records, names, paths, labels,
            lambda i: class_probabilities(image_embed[i], class_embed, scale))
        print(f"wrote {args.report}")


def embed(model, source, args, names, paths, templates):
    """-> (the record of a checkpoint, without figures, image_embed (I, D), class_embed (C, D))."""
    device = model.logit_scale.device
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg),
              "weights": checkpoint.fingerprint(model), "precision": precision}
    class_embed = class_embeddings(model, names, templates, autocast, args.batch_size)
    image_embed = embed_images(model, functools.partial(image_at, paths), len(paths), device,
                               autocast, args.batch_size, args.workers)
    if not (image_embed.sum().isfinite() and class_embed.sum().isfinite()):
        raise BadInput(f"{source}: its embeddings hold NaN or infinity; --precision fp32 may help")
    return record, image_embed, class_embed


def main(argv=None):
    """argv: the arguments (default: those of the command line)."""
    parser = argparse.ArgumentParser(prog="python -m tools.classify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", metavar="DIR", help="a folder with a folder for each class")
    parser.add_argument("--templates", metavar="FILE",
                        help="prompts, one a line, {} for the name of the class (default: 20)")
    args = shared_flags(parser).parse_args(argv)
    check_shared(args)
    device, rank, _ = start_processes()
    classify(args, device, is_main=rank == 0)


if __name__ == "__main__":
    system.run(main)
