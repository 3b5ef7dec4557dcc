"""support.captions"""
import csv
import hashlib
import json
import os
import posixpath

from support import system
from support.system import BadInput


def sentence_key(text):
    """A number for a sentence: equal for equal ones (and, by a chance of 1 in 2^56, for two others)."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:7], "big")       # 7 bytes fit into an int64


def caption_file(folder):
    """The folder's captions.csv or captions.jsonl, or None."""
    present = [folder / name for name in ("captions.csv", "captions.jsonl") if (folder / name).is_file()]
    if len(present) == 2:
        raise BadInput(f"{folder}: it has both captions.csv and captions.jsonl; remove one")
    return present[0] if present else None


def caption_rows(path):
    """(image, caption, split) of every row of a caption file that is not blank. The images are there, each in one split."""
    split_of, marked = {}, None                                                 # image -> split; whether the rows name one
    for number, row in read_csv(path) if path.suffix == ".csv" else read_jsonl(path):
        image, caption, split = row.get("image"), row.get("caption"), row.get("split") or ""
        if isinstance(caption, str) and not caption.strip():
            raise BadInput(f"{path}, line {number}: the caption is empty; fill it in or delete the row")
        if not all(isinstance(x, str) for x in (image, caption, split)) or not image.strip():
            raise BadInput(f"{path}, line {number}: expected an `image` and a `caption`, found {json.dumps(row, ensure_ascii=False)[:80]}")
        check_text(image + caption + split, path, number)
        image = posixpath.normpath(image.strip().replace("\\", "/"))            # Windows writes paths with backslashes
        split = split.strip().lower()
        if marked not in (None, bool(split)):
            difference = "given here but not" if split else "empty here but given"
            raise BadInput(f"{path}, line {number}: `split` is {difference} in the rows above; give it in every row or in none")
        marked = bool(split)
        split = split or hashed_split(image)
        if image not in split_of and not os.path.isfile(path.parent / image):
            raise BadInput(f"{path}, line {number}: there is no image {path.parent / image}")
        if split_of.setdefault(image, split) != split:
            raise BadInput(f"{path}, line {number}: image {image} is in the split {split} here and in {split_of[image]} above; "
                           f"a image belongs to one split")
        yield image, caption.strip(), split


def hashed_split(image):
    """80 % train, 10 % valid, 10 % test: a property of the path alone, so adding images moves none of the others."""
    digit = hashlib.md5(image.encode()).digest()[0] % 10
    return {0: "valid", 1: "test"}.get(digit, "train")


def is_text(text):
    """Whether it is whole characters. JSON can spell half of one (a lone surrogate), and what is not UTF-8 in names of files becomes such;
    no tokenizer can read them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(text, path, number):
    if not is_text(text):
        shown = text.encode("utf-8", "replace").decode()[:60]
        raise BadInput(f"{path}, line {number}: the text holds a broken character (a lone surrogate): {shown}") from None


def read_jsonl(path):
    """(line number, object) of every line that is not blank."""
    for number, line in system.utf8_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:                       # not JSON, or numbers too long or lists too deep
                raise BadInput(f"{path}, line {number}: not JSON ({error}): {line.strip()[:60]}") from None
            if not isinstance(record, dict):
                raise BadInput(f"{path}, line {number}: expected an object {{…}}, found {line.strip()[:60]}")
            yield number, record


def read_csv(path):
    """(line number, {column: value}) of every row that is not blank; the first line names the columns, `image` and `caption` among them."""
    reader, start = csv.reader((line for _, line in system.utf8_lines(path)), strict=True), 1
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not {"image", "caption"} <= set(columns) or len(set(columns)) < len(columns):
            raise BadInput(f"{path}, line 1: expected the column names image,caption (with a comma between them, each once); "
                           f"found {','.join(columns) or 'nothing'}")
        while True:
            start = reader.line_num + 1                                         # a row may go over several lines: a message names the first
            row = next(reader, None)
            if row is None:
                return
            if not any(cell.strip() for cell in row):                           # spreadsheets leave rows of empty cells
                continue
            if len(row) > len(columns):
                raise BadInput(f"{path}, line {start}: more columns than the first line names; "
                               f'put a caption that has commas in "quotes"')
            yield start, dict(zip(columns, row))
    except csv.Error as error:
        raise BadInput(f"{path}, line {start}: not CSV ({error}); every \" must have its partner, a \" inside a caption is written \"\", "
                       f"and lines end as on Windows or Unix") from None
