"""Caption files: captions.csv, captions.jsonl and the .jsonl files of the Chinese-CLIP layout."""
import csv
import functools
import hashlib
import json
import os
import posixpath

from support import system
from support.images import leads_out
from support.system import BadInput


def sentence_key(text):
    """A number that equal sentences share (and, by a chance of 1 in 2^56, two others)."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:7], "big")       # fits into an int64


def caption_file(folder):
    """The folder's captions.csv or captions.jsonl, or None."""
    names = "captions.csv", "captions.jsonl"
    present = [folder / name for name in names if (folder / name).is_file()]
    if len(present) == 2:
        raise BadInput(f"{folder}: it has both captions.csv and captions.jsonl; remove one")
    return present[0] if present else None


def caption_rows(path, allow_outside=False):
    """(image, caption, split) of each row. BadInput names the line of the first wrong one.

    Without allow_outside an image outside the folder is refused, too: shards would publish it.
    """
    split_of, has_splits = {}, None                         # image -> split; whether rows have one
    folder = str(path.parent)
    is_out = functools.cache(functools.partial(leads_out, os.path.realpath(folder)))
    if not allow_outside and os.path.islink(path) and is_out(path):
        raise BadInput(f"{path}: a link out of the folder; --allow-outside reads it")
    for number, row in read_csv(path) if path.suffix == ".csv" else read_jsonl(path):
        image, caption, split = row.get("image"), row.get("caption"), row.get("split") or ""
        line = f"{path}, line {number}"
        if isinstance(caption, str) and not caption.strip():
            raise BadInput(f"{line}: the caption is empty; fill it in or delete the row")
        if not all(isinstance(x, str) for x in (image, caption, split)) or not image.strip():
            shown = json.dumps(row, ensure_ascii=False)[:80]
            raise BadInput(f"{line}: expected an `image` and a `caption`, found {shown}")
        check_text(image + caption + split, path, number)
        image = posixpath.normpath(image.strip().replace("\\", "/"))    # \ in paths of Windows
        split = split.strip().lower()
        if has_splits not in (None, bool(split)):
            raise BadInput(f"{line}: give a `split` in every row or in none")
        has_splits = bool(split)
        split = split or hashed_split(image)
        if image not in split_of:
            place = os.path.join(folder, image)
            if not os.path.isfile(place):
                raise BadInput(f"{line}: there is no image {place}")
            at = place if os.path.islink(place) else os.path.dirname(place)     # fewer to look at
            if not allow_outside and is_out(at):
                raise BadInput(f"{line}: {image} is outside the folder; --allow-outside reads it")
        if split_of.setdefault(image, split) != split:
            raise BadInput(f"{line}: image {image} is in the split {split} here and in "
                           f"{split_of[image]} above; an image belongs to one split")
        yield image, caption.strip(), split


def hashed_split(text, parts=10):
    """One of `parts` is valid, one is test, the others are train: by the hash of a path or text."""
    digit = hashlib.md5(text.encode()).digest()[0] % parts
    return {0: "valid", 1: "test"}.get(digit, "train")


def is_text(text):
    """Whether no character of it is broken (a lone surrogate), as in JSON and file names."""
    return text.encode(errors="ignore").decode() == text


def check_text(text, path, number):
    if not is_text(text):
        raise BadInput(f"{path}, line {number}: the text holds a broken character")


def read_jsonl(path):
    """(line number, object) of each line that is not blank."""
    for number, line in system.utf8_lines(path):
        if line.strip():
            shown = line.strip()[:60]
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:   # also: long numbers, deep brackets
                raise BadInput(f"{path}, line {number}: not JSON ({error}): {shown}") from None
            if not isinstance(record, dict):
                raise BadInput(f"{path}, line {number}: expected an object {{…}}, found {shown}")
            yield number, record


def read_csv(path):
    """(line number, {column: value}) of each row that is not blank. Line 1 names the columns."""
    rows, number = csv.reader((line for _, line in system.utf8_lines(path)), strict=True), 1
    try:
        columns = [name.strip().lower() for name in next(rows, [])]
        if not {"image", "caption"} <= set(columns) or len(set(columns)) < len(columns):
            raise BadInput(f"{path}, line 1: expected the column names image,caption (with a comma "
                           f"between them, each once); found {','.join(columns) or 'nothing'}")
        number = rows.line_num + 1
        for row in rows:
            if any(cell.strip() for cell in row):           # spreadsheets leave rows of empty cells
                if len(row) > len(columns):
                    raise BadInput(f"{path}, line {number}: more columns than line 1 names; put a "
                                   'caption that has commas in "quotes"')
                yield number, dict(zip(columns, row))
            number = rows.line_num + 1                      # a row may take several lines
    except csv.Error as error:
        raise BadInput(f"{path}, line {number}: not CSV ({error}); every \" needs a partner, one "
                       "inside a caption is written \"\", lines end with \\n or \\r\\n") from None
