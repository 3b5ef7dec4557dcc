"""The paper's tables, with measured rows and their intervals.

A record is the dict of figures of one checkpoint, as --json writes it.
In the shapes, A is the number of queries that have a correct candidate.
"""
import json
import unicodedata
from pathlib import Path

import numpy as np

KS = (1, 5, 10)                                                 # the K of Recall@K

# The paper's tables. pairs: table 1, of each split. results: tables 4 to 6, (title, rows of
# [size group (its column "Scale"), model, setting, text-to-image R@1, R@5, R@10 in percent,
# image-to-text R@1, R@5, R@10]). size groups: of our models.
PAPER = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
TABLE_1, PUBLISHED, SIZE_GROUP = PAPER["pairs"], PAPER["results"], PAPER["size groups"]
SIZE_GROUPS = ("base-size", "large-size", "tiny", "custom")     # in the order of the rows


def against_paper(name, split_name, pairs):
    """Whether a split has as many pairs as in the paper's table 1: the end of a line, or ""."""
    published = TABLE_1.get(name, {}).get(split_name)
    if published == pairs:
        return ", as in the paper's table 1"
    return f"; the paper's table 1 has {published:,}" if published else ""


def bootstrap_interval(values, groups):
    """The 95 % interval of the mean of `values` (A,), in percent: [low, high].

    Captions of one image depend on each other. So whole groups are drawn, with replacement:
    groups (A,) is the image of each value. Two models get the same draws.
    """
    _, groups = np.unique(groups, return_inverse=True)                  # numbered 0, 1, 2, …
    sums = np.bincount(groups, weights=values)                          # (groups,)
    counts = np.bincount(groups)                                        # (groups,)
    rng, means = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(100 * sums[drawn].sum() / counts[drawn].sum())
    return np.quantile(means, (0.025, 0.975)).tolist()


def plus_minus(interval):
    return f"±{(interval[1] - interval[0]) / 2:.1f}"


def change_of(before, after, groups):
    """after - before, (A,) each -> {"mean", "interval"} in percent points."""
    gain = after - before
    return {"mean": 100 * gain.mean().item(), "interval": bootstrap_interval(gain, groups)}


def add_intervals(record, rankings, first):
    """Adds to a record the interval of R@1, and its change from the first checkpoint's.

    rankings, first: {way: Ranking} of this checkpoint and of the first one of the table.
    """
    images = {                                  # of each query; of a caption's images the first
        "text_to_image": [images[0] for images in rankings["text_to_image"].correct if images],
        "image_to_text": [i for i, texts in enumerate(rankings["image_to_text"].correct) if texts],
    }
    hits = {way: rankings[way].hits_at_1() for way in images}
    for way in images:
        record[way]["R@1_interval"] = bootstrap_interval(hits[way], images[way])
    if rankings is not first:
        record["change_of_R@1"] = {
            way: change_of(first[way].hits_at_1(), hits[way], images[way]) for way in images}


def result_rows(records, name, split):
    """The rows of the paper's table for this data set and split, and those of `records`.

    -> (title, [[size group, model, setting, R@1 R@5 R@10 MR of text-to-image, the same of
    image-to-text], …]): cells of text, the names of the columns first. In measured rows the model
    begins with "> ".
    """
    title, published = PUBLISHED.get(name, (name, [])) if split == "test" else (name, [])
    rows = []
    for group, model, setting, *recalls in published:
        rows.append([group, model, setting, *recall_cells(recalls[:3]), *recall_cells(recalls[3:])])
    for record in records:
        row = [SIZE_GROUP.get(record["model"], "custom"),
               f"> {record['model']} ({record['ckpt']})", record["setting"]]
        for way in ("text_to_image", "image_to_text"):
            cells = recall_cells([record[way][f"R@{k}"] for k in KS])
            cells[0] += " " + plus_minus(record[way]["R@1_interval"])
            row += cells
        rows.append(row)
    rows.sort(key=lambda row: SIZE_GROUPS.index(row[0]))        # stable: measured rows end a group
    names = ["  R@1", "  R@5", " R@10", "   MR"]
    return f"{title}, {split} split (%)", [["scale", "model", "setting", *names, *names], *rows]


def recall_cells(recalls):
    """The cells of R@1, R@5 and R@10, and that of their mean."""
    return [f"{x:5.1f}" for x in (*recalls, sum(recalls) / len(recalls))]


def align_columns(rows):
    """Rows of cells -> lines whose columns are aligned in a terminal."""
    def width(cell):
        return len(cell) + sum(unicodedata.east_asian_width(c) in "WF" for c in cell)       # 猫: 2

    lines = [""] * len(rows)
    for column in zip(*rows):
        size = max(map(width, column)) + 2
        lines = [line + cell + " " * (size - width(cell)) for line, cell in zip(lines, column)]
    return [line.rstrip() for line in lines]


def table(records, name, split):
    """The text that evaluate.py prints: result_rows aligned, and notes."""
    title, rows = result_rows(records, name, split)
    rows = [[*row[:7], "", *row[7:]] for row in rows]           # "": room between the directions
    head, *body = align_columns(rows)
    above = " " * head.find("R@1") + "Text-to-Image"
    above = above.ljust(head.rfind("R@1")) + "Image-to-Text"
    return "\n".join([title, above, head, *body, *notes(records, name, split)])


def notes(records, name, split):
    """How to read the table: lines."""
    first, *others = records
    to_image, to_text = first["text_to_image"], first["image_to_text"]
    lines = [
        f"> measured here, towers in {first['precision']}: {to_image['queries']:,} captions and "
        f"{to_text['queries']:,} images as queries. A random order gives text-to-image "
        f"R@1 {to_image['chance_R@1']:.1f}, MR {to_image['chance_MR']:.1f}; "
        f"image-to-text {to_text['chance_R@1']:.1f}, {to_text['chance_MR']:.1f}.",
        "MR is the mean of R@1, R@5 and R@10. ±: half of the 95 % interval of R@1 when the "
        "split's images are resampled (bootstrap, 1,000 draws).",
        "Setting: trained or fine-tuned on this data if the checkpoint says so; else zero-shot.",
    ]
    if compared := against_paper(name, split, first["pairs"]):
        if split == "test" and TABLE_1[name]["test"] != first["pairs"]:
            compared += ", so the published rows are of another set"
        lines.append(f"{first['pairs']:,} pairs{compared}.")
    for way, what, partner in ((to_image, "caption", "image"), (to_text, "image", "caption")):
        if count := way["without_answer"]:
            lines.append(f"{count:,} {what}{'s' * (count > 1)} without {partner} in the split: "
                         "no query, but a candidate.")
    for record in others:
        change = record["change_of_R@1"]
        lines.append(f"R@1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval: "
                     f"text-to-image {gain_in_words(change['text_to_image'])}, "
                     f"image-to-text {gain_in_words(change['image_to_text'])}.")
    return lines


def gain_in_words(change):
    """What change_of returns, as text: "+2.0 (+0.5 to +3.5)"."""
    low, high = change["interval"]
    chance = ", which may be chance" if low <= 0 <= high else ""
    return f"{change['mean']:+.1f} ({low:+.1f} to {high:+.1f}{chance})"
