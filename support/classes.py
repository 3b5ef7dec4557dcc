"""Folders of classes, for zero-shot classification: images in one folder for each class."""
import os
import unicodedata
import warnings
from pathlib import Path

from support import system
from support.captions import is_text
from support.images import ENDINGS, image_files, leads_out
from support.system import BadInput


def folders_in(folder):
    """The names of the folders in a folder, sorted; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir()
                  if path.is_dir() and not path.name.startswith("."))


def class_root(folder, split=None):
    """folder/split, or without a split folder/test, or `folder` itself if it has no splits."""
    wanted = split or "test"
    # A class may be called "test", too: a split is a folder that holds folders.
    splits = [name for name in (wanted, "train", "val", "valid") if folders_in(folder / name)]
    if wanted in splits:
        return folder / wanted
    if split or splits:
        raise BadInput(f"{folder}: no split {wanted!r}; it has {', '.join(splits) or 'none'}")
    return folder


def open_classes(root, allow_outside=False):
    """-> (names of C classes, paths of I images, I class numbers). See also class_numbers."""
    folders = folders_in(root)
    names, numbers = [composed(name) for name in folders], list(range(len(folders)))
    label_files = [folder / "label_cn.txt" for folder in (root, root.absolute().parent)]
    if label_file := next(filter(Path.is_file, label_files), None):
        names = [composed(line) for _, line in system.utf8_lines(label_file)]
        while names and not names[-1]:
            names.pop()
        numbers = class_numbers([composed(name) for name in folders], names, label_file)
    elif "".join(folders).isdecimal():
        warnings.warn(f"{root}: there is no label_cn.txt, so the folders' numbers are taken for "
                      f"names: {listed(folders)}")
    if len(set(numbers)) < len(folders) or not all(name and is_text(name) for name in names):
        raise BadInput(f"{root}: two folders with one number, or a name that is empty or not UTF-8 "
                       f"({listed(names)})")
    paths, labels = [], []
    for folder, number in zip(folders, numbers):
        files, unread = image_files(root / folder)
        for place, reason in unread.items():
            raise BadInput(f"{root / folder / place}: cannot be read ({reason})")
        paths += [root / folder / file for file in files]
        labels += [number] * len(files)
    if not 2 <= len(names) <= 100_000 or not paths:
        raise BadInput(f"{root}: {len(names)} classes and {len(paths)} images; expected a folder "
                       "for each of 2 to 100,000 classes: 猫/1.jpg, 狗/1.jpg, …")
    base = os.path.realpath(label_file.parent if label_file else root)
    for path in [Path(base, "label_cn.txt"), *map(root.joinpath, folders), *paths]:
        if path.is_symlink() and not allow_outside and leads_out(base, path):
            raise BadInput(f"{path}: a link out of {base}; --allow-outside reads it")
    if loose := sorted(path.name for path in root.iterdir() if path.suffix.lower() in ENDINGS):
        warnings.warn(f"{root}: images in no class folder are left out: {listed(loose)}")
    if empty := [names[c] for c in sorted(set(range(len(names))) - set(labels))]:
        warnings.warn(f"{root}: classes without an image: {len(empty):,} ({listed(empty)})")
    return names, paths, labels


def class_numbers(folders, names, label_file):
    """The class number of each folder, where line i of a label file, from 0, names class i.

    As in ELEVATER-cn and ImageNet, the folders have the names of the classes; or their numbers,
    000, 001, …; or other names (n01440764, …), one for each class in alphabetical order.
    """
    if set(folders) <= set(names):
        return [names.index(folder) for folder in folders]
    if "".join(folders).isdecimal():
        if max(map(int, folders)) < len(names):
            return list(map(int, folders))
    elif len(folders) == len(names) and not set(folders) & set(names):
        return list(range(len(folders)))
    raise BadInput(f"{label_file}: its {len(names)} lines do not fit the folders "
                   f"{listed(folders)}; name them 000, 001, … or as the lines")


def composed(name):
    return unicodedata.normalize("NFC", " ".join(name.split()))     # a Mac writes é as two letters


def listed(names):
    return system.printable(", ".join(names[:5]) + ", …" * (len(names) > 5))
