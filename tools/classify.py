"""Zero-shot classification (figure 2, steps 2 and 3): images in one folder for each class.

    python -m tools.classify /path/to/classes --ckpt cn-clip-vit-b-16           # 猫/1.jpg, 狗/1.jpg, … or the ELEVATER-cn layout
    python -m tools.classify /path/to/classes --ckpt runs/own/best.pt --templates prompts.txt --report report.html
"""
import argparse
import collections
import functools
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import torch

import checkpoint
from evaluate import best_ranks, class_embeddings, class_probabilities, embed_images
from support import report, system
from support.captions import is_text
from support.images import ENDINGS, image_at, image_files
from support.processes import precision_of, start_processes
from support.system import BadInput, write_json
from support.tables import bootstrap_interval, change_of, class_notes, class_table


def class_root(folder, split=None):
    """Where the class folders are: folder/split; without a split folder/test, or the folder itself when it has no splits. Raises
    BadInput when they are not there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder; expected one with a folder for each class: 猫/1.jpg, 狗/1.jpg, …, "
                       f"or test/000, test/001, … beside label_cn.txt")
    # A class may be called "test", too: a split is a folder that holds folders.
    holds_folders = lambda path: path.is_dir() and any(inside.is_dir() for inside in path.iterdir())
    splits = sorted(name for name in {"train", "val", "valid", "test", split or "test"} if holds_folders(folder / name))
    if (split or "test") in splits:
        return folder / (split or "test")
    if split or splits:
        raise BadInput(f"{folder}: no split {split or 'test'!r}; it has {', '.join(splits) or 'none'}")
    return folder


def open_classes(root):
    """Images in one folder for each class, for zero-shot classification -> (C class names, I images as paths, I class numbers).

    Without label_cn.txt, in `root` or beside it, the folders' names are the classes': root/猫/*.jpg. With it: see _class_numbers.
    """
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    label_file = next((path for path in (root / "label_cn.txt", root.absolute().parent / "label_cn.txt") if path.is_file()), None)
    if label_file is None:
        names, class_of = [_composed(name) for name in folders], {name: c for c, name in enumerate(folders)}
        if folders and _are_numbers(folders):
            warnings.warn(f"{root}: there is no label_cn.txt, so the folders' numbers are taken for names: {_listed(folders)}")
    else:
        names = _read_labels(label_file)
        class_of = _class_numbers(root, folders, names, label_file)
    if len(set(class_of.values())) < len(class_of) or not all(names) or any(not is_text(name) for name in names):
        raise BadInput(f"{root}: two folders with one name or number, or a name that is empty or not UTF-8 ({_listed(folders)})")

    images = []                                                               # (path, class number)
    for name, c in class_of.items():
        files, unread = image_files(root / name)
        images += [(root / name / file, c) for file in files]
        if unread:
            place, reason = next(iter(unread.items()))
            raise BadInput(f"{root / name / place}: cannot be read ({reason}), so the figures would be those of a part")
    if len(names) < 2 or not images:
        raise BadInput(f"{root}: {len(names)} classes and {len(images)} images; "
                       f"expected two or more folders, one for each class, with images in them")
    if loose := sorted(path.name for path in root.iterdir() if path.is_file() and path.suffix.lower() in ENDINGS):
        warnings.warn(f"{root}: left out, for they are in no class folder: {len(loose):,} ({_listed(loose)})")
    seen = {c for _, c in images}
    if empty := [name for c, name in enumerate(names) if c not in seen]:
        warnings.warn(f"{root}: classes without a image, which can be guessed all the same: {len(empty):,} ({_listed(empty)})")
    return names, [path for path, _ in images], [c for _, c in images]


def _read_labels(path):
    """Line i of label_cn.txt names class i, counted from 0 -> the names."""
    names = [_composed(line) for _, line in system.utf8_lines(path)]
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        raise BadInput(f"{path}, line {names.index('') + 1 if names else 1}: empty; each line names one class")
    return names


def _class_numbers(root, folders, names, label_file):
    """Which folder has the images of which class -> {folder: class number}, for the three ways in which ELEVATER-cn and ImageNet
    do it: the folders have the classes' names; or numbers, 000, 001, …; or are as many, with other names (n01440764, …), in
    alphabetical order."""
    strange = [name for name in folders if _composed(name) not in names]
    if not strange:
        return {name: names.index(_composed(name)) for name in folders}
    if _are_numbers(folders):
        if beyond := [name for name in folders if int(name) >= len(names)]:
            raise BadInput(f"{root}: the folder {beyond[0]} has no line in {label_file}, "
                           f"whose {len(names)} lines name the classes 0 to {len(names) - 1}")
        return {name: int(name) for name in folders}
    if len(strange) < len(folders):
        raise BadInput(f"{root}: no line of {label_file} names the folders {_listed(strange)}; it does name others")
    if len(folders) != len(names):
        raise BadInput(f"{root}: {len(folders)} folders ({_listed(folders)}) and {len(names)} lines in {label_file}; "
                       f"which belongs to which? Name the folders 000, 001, … or as the lines")
    return {name: c for c, name in enumerate(folders)}


def _composed(name):
    return unicodedata.normalize("NFC", name.strip())                           # a Mac writes é as two characters


def _are_numbers(folders):
    return all(name.isdecimal() and name.isascii() for name in folders)


def _listed(names):
    return system.printable(", ".join(names[:5]) + ", …" * (len(names) > 5))


# A class's embedding is the mean over these sentences. They differ in what they say of the image, not of the class.
TEMPLATES = ("{}", "{}。", "这是{}。", "一张{}的照片。", "一张{}的图片。", "一张清晰的{}照片。", "一张模糊的{}照片。", "一张{}的特写。",
             "一张{}的黑白照片。", "远处的{}。", "画面里有{}。", "照片中的{}。", "许多{}。", "一个{}。", "小小的{}。", "巨大的{}。",
             "{}的插图。", "{}的素描。", "一幅{}的画。", "卡通风格的{}。")


def read_templates(path):
    """A text file with one template in each line, {} where the class's name goes -> the templates."""
    templates = []
    if not Path(path).is_file():
        raise BadInput(f"--templates {path}: there is no such file")
    for number, line in system.utf8_lines(path):
        if line.strip():
            if line.count("{}") != 1:
                raise BadInput(f"{path}, line {number}: expected one {{}} where the class's name goes, found {line.strip()[:60]}")
            templates.append(line.strip())
    if not templates:
        raise BadInput(f"{path}: no templates; expected lines like 一张{{}}的照片")
    return templates


def classification_of(image_embed, class_embed, labels, names):
    """A image belongs to the class whose embedding is most like its own; of equal ones to the first.

    image_embed (I, D), class_embed (C, D) unit vectors, labels: I class indices, names: C texts
    -> ({"top-1", "top-5", "mean_per_class", "top-1_interval", "chance_top-1" in percent; "images", "classes"; "per_class" of the classes
    that have images; "confused", the 20 pairs that are most often}, whether each image was right (I,) 0 or 1).
    """
    ranks = best_ranks(image_embed, class_embed, [[label] for label in labels])                     # (I,)
    right, labels = (ranks == 0).double().numpy(), np.array(labels)             # (I,), (I,)
    counts = np.bincount(labels, minlength=len(names))                          # (C,)
    accuracy = 100 * np.bincount(labels, weights=right, minlength=len(names)) / np.maximum(counts, 1)                    # (C,)
    figures = {"top-1": 100 * right.mean().item(),
               "top-5": 100 * (ranks < 5).double().mean().item(),
               "mean_per_class": accuracy[counts > 0].mean().item(),
               "top-1_interval": bootstrap_interval(right, np.arange(len(right))),
               "chance_top-1": 100 / len(names), "images": len(labels), "classes": len(names)}
    figures["per_class"] = [{"class": names[c], "images": int(counts[c]), "top-1": accuracy[c].item()} for c in np.flatnonzero(counts)]

    guesses = torch.cat([(some @ class_embed.T).argmax(dim=1) for some in image_embed.split(1024)]).tolist()
    taken_for = collections.Counter((label, guess) for label, guess in zip(labels.tolist(), guesses) if label != guess)
    figures["confused"] = [{"class": names[a], "taken_for": names[b], "times": times, "of": int(counts[a])}
                           for (a, b), times in taken_for.most_common(20)]
    return figures, right


def predictions(image_embed, class_embed, scale, names):
    """For each image its five most probable classes, best first, of equal ones the first: I lists of [name, probability]."""
    found = []
    for some in image_embed.split(1024):
        best = class_probabilities(some, class_embed, scale).sort(dim=1, descending=True, stable=True)
        for probabilities, classes in zip(best.values[:, :5].tolist(), best.indices[:, :5].tolist()):
            found.append([[names[c], p] for p, c in zip(probabilities, classes)])
    return found


def classify(args, device, is_main):
    """Zero-shot classification by each checkpoint of a folder of classes; the main process prints the table and writes what was
    asked for."""
    root = class_root(args.classes, args.split)
    names, images, labels = open_classes(root)                           # C, I, I
    templates = read_templates(args.templates) if args.templates is not None else TEMPLATES
    read = functools.partial(image_at, images)
    records, all_right = [], []
    for source in args.ckpt:
        record, right, embeds = classify_with(source, args, names, images, labels, templates, device)
        if records:
            record["change_of_top-1"] = change_of(all_right[0], right, np.arange(len(right)))
        best = predictions(*embeds, names)
        record["predictions"] = [{"image": str(path), "class": names[c], "best": some} for path, c, some in zip(images, labels, best)]
        records.append(record)
        all_right.append(right)

    if not is_main:
        return
    title = f"{root}: zero-shot classification (%)"
    print(class_table(records, title, len(templates)))
    write_json(args.json, {"data": str(root), "templates": list(templates), "results": records})
    if args.report is not None:
        lines = [*class_notes(records, len(templates)), f"prompts: {' '.join(templates)}"]
        image_embed, class_embed, scale = embeds
        report.write_classification(args.report, title, lines, records, names, read, labels,
                                    lambda i: class_probabilities(image_embed[i], class_embed, scale))
        print(f"wrote {args.report}")


def classify_with(source, args, names, images, labels, templates, device):
    """One checkpoint -> (its record, whether each image was right (I,), (image_embed (I, D), class_embed (C, D), scale)).
    The model is let go afterwards."""
    model, _ = checkpoint.load(source, device)
    autocast, precision = precision_of(args.precision, device, evaluating=True)
    class_embed = class_embeddings(model, names, templates, autocast, args.batch_size)
    read = functools.partial(image_at, images)
    image_embed = embed_images(model, read, len(images), device, autocast, args.batch_size, args.workers)
    if not (image_embed.sum().isfinite() and class_embed.sum().isfinite()):
        raise BadInput(f"{source}: its embeddings hold NaN or infinity; --precision fp32 may help")
    figures, right = classification_of(image_embed, class_embed, labels, names)
    record = {"ckpt": str(source), "model": checkpoint.name_of(model.cfg), "weights": checkpoint.fingerprint(model), "precision": precision}
    return record | figures, right, (image_embed, class_embed, model.logit_scale.exp().item())


def main():
    args = parse_args()
    device, rank, _ = start_processes()
    classify(args, device, is_main=rank == 0)


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tools.classify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", metavar="DIR", help="a folder with a folder of images for each class")
    parser.add_argument("--ckpt", nargs="+", required=True,
                        help="checkpoints: files, folders, or names of released weights (see checkpoint.py); several give one table")
    parser.add_argument("--templates", metavar="FILE",
                        help="prompts, one a line, {} for the class's name (default: 20 of our own)")
    parser.add_argument("--split", help="(default: test)")
    parser.add_argument("--batch-size", type=int, default=128, help="images or prompts embedded at a time (default: 128)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="of the towers (default: auto: fp16 on GPUs, on CPUs bf16 where they have it, else fp32)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images, for each process (default: 1)")
    parser.add_argument("--report", metavar="FILE.html",
                        help="write a page with the table and images: a sample and the worst misses")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 1e6 or not 0 <= args.workers <= 512:
        raise BadInput(f"--batch-size {args.batch_size} --workers {args.workers}: out of range, 1 to 1e6 and 0 to 512")
    system.check_place("--json", args.json)
    system.check_place("--report", args.report)
    if args.report is not None and args.json is not None and Path(args.report).resolve() == Path(args.json).resolve():
        raise BadInput(f"--report {args.report} --json {args.json}: name two files")
    return args


if __name__ == "__main__":
    system.run(main)
