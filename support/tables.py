"""support.tables"""
import unicodedata

import numpy as np

# The paper's table 1: pairs in each split.
TABLE_1 = {"coco-cn":      {"train": 22_980, "valid": 3_185, "test": 1_053},
           "flickr30k-cn": {"train": 148_915, "valid": 5_000, "test": 5_000},
           "ap-id":        {"train": 2_000, "valid": 1_000, "test": 1_000}}


def against_paper(name, split_name, pairs):
    """What to add to such a line of a named data set: whether it has as many pairs as in the paper's table 1."""
    published = TABLE_1.get(name, {}).get(split_name)
    if not published:
        return ""
    return ", as in the paper's table 1" if published == pairs else f"; the paper's table 1 has {published:,}"


KS = (1, 5, 10)

# The paper's published rows, in percent: (size group, model, setting, text-to-image R@1 R@5 R@10, image-to-text R@1 R@5 R@10).
# Tables 4 and 5 are after fine-tuning (section 4.1.4), table 6 before and after it.
PUBLISHED = {
    "coco-cn": ("Table 4. COCO-CN", [
        ("base-size", "Wukong ViT-B/32", "fine-tuned", 67.0, 91.4, 96.7, 65.8, 90.3, 96.6),
        ("base-size", "R2D2 ViT-B", "fine-tuned", 75.1, 94.2, 98.1, 76.1, 95.3, 98.5),
        ("base-size", "CE-CLIP ViT-B/16", "fine-tuned", 77.0, 97.1, 99.0, 77.4, 96.2, 98.9),
        ("large-size", "Wukong ViT-L/14", "fine-tuned", 74.0, 94.4, 98.1, 73.3, 94.0, 98.0),
        ("large-size", "R2D2 ViT-L/14", "fine-tuned", 79.1, 96.5, 98.9, 79.3, 97.1, 98.7),
        ("large-size", "CE-CLIP ViT-L/14", "fine-tuned", 78.9, 96.3, 99.0, 80.2, 96.7, 99.2)]),
    "flickr30k-cn": ("Table 5. Flickr30K-CN", [
        ("base-size", "Wukong ViT-B/32", "fine-tuned", 67.6, 89.6, 94.2, 83.9, 97.6, 99.0),
        ("base-size", "R2D2 ViT-B", "fine-tuned", 78.3, 94.6, 97.0, 92.6, 99.1, 99.8),
        ("base-size", "CE-CLIP ViT-B/16", "fine-tuned", 79.1, 94.8, 97.4, 93.5, 99.0, 99.5),
        ("large-size", "Wukong ViT-L/14", "fine-tuned", 77.4, 94.5, 97.0, 92.7, 99.1, 99.6),
        ("large-size", "R2D2 ViT-L/14", "fine-tuned", 84.4, 96.7, 98.4, 95.6, 98.8, 100.0),
        ("large-size", "CE-CLIP ViT-L/14", "fine-tuned", 82.7, 96.7, 98.6, 96.1, 99.5, 99.9)]),
    "ap-id": ("Table 6. AP-ID", [
        ("base-size", "CN-CLIP ViT-B/16", "zero-shot", 81.3, 89.5, 95.9, 84.4, 87.5, 97.3),
        ("base-size", "CN-CLIP ViT-B/16", "fine-tuned", 84.1, 95.3, 98.5, 82.7, 94.4, 97.4)]),
    "poems": ("As table 6, on the painted stand-in for AP-ID", []),            # ours
}

# Our models -> the size group (the paper's column "Scale") of whose rows theirs is the next.
SIZE_GROUP = {"tiny": "tiny", "rn50": "base-size", "vit-b-32": "base-size", "vit-b-16": "base-size",
              "vit-l-14": "large-size", "vit-l-14-336": "large-size", "vit-h-14": "large-size"}


def bootstrap_means(values, groups, draws=1000, seed=0):
    """The mean of `values` (A,) in percent, as it comes out on other sets of the same kind: (draws,) means over groups drawn
    with replacement.

    Captions of one image rise and fall together, so images are drawn, not captions: groups (A,) numbers the image of each value.
    The same seed and groups give the same draws, so differences between two models are paired.
    """
    _, groups = np.unique(groups, return_inverse=True)                          # numbered without gaps, from 0
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)     # (groups,)
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(100 * sums[drawn].sum() / counts[drawn].sum())
    return np.array(means)


def bootstrap_interval(values, groups):
    """-> [low, high] in percent, between which 95 % of the bootstrap's means lie."""
    return np.quantile(bootstrap_means(values, groups), (0.025, 0.975)).tolist()


def half_width(interval):
    """Of an interval [low, high]: what stands behind ±."""
    return (interval[1] - interval[0]) / 2


def change_of(before, after, groups):
    """What another model changes, on the same queries: values (A,) of both -> {"mean", "interval"} in percent points."""
    return {"mean": 100 * (after - before).mean().item(), "interval": bootstrap_interval(after - before, groups)}


def images_asked(rankings):
    """{way: Ranking} -> {way: (A,) the image of each query that has an answer}; a caption's is the first that it describes."""
    images_of, captions_of = rankings["text_to_image"].correct, rankings["image_to_text"].correct
    return {"text_to_image": np.array([images[0] for images in images_of if images]),
            "image_to_text": np.array([i for i, texts in enumerate(captions_of) if texts])}


def compare_rows(records, name, split):
    """The rows of the paper's table for this data set and split, and those measured here
    -> (title, [(size group, model, setting, six recalls, the two ± of the R@1 or None), …])."""
    title, published = PUBLISHED.get(name, (name, [])) if split == "test" else (name, [])
    rows = [(group, model, setting, figures, None) for group, model, setting, *figures in published]
    for record in records:
        ways = record["text_to_image"], record["image_to_text"]
        figures = [way[f"R@{k}"] for way in ways for k in KS]
        halves = [half_width(way["R@1_interval"]) for way in ways]
        group = SIZE_GROUP.get(record["model"], "custom")
        rows.append((group, f"> {record['model']} ({record['ckpt']})", record["setting"], figures, halves))
    groups = ["base-size", "large-size", "tiny", "custom"]
    rows.sort(key=lambda row: groups.index(row[0]))                             # stable: a measured row ends its own size group
    return f"{title}, {split} split (%)", rows


def recalls_as_text(figures, halves, plus_minus=" ±{:.1f}"):
    """Six recalls, two ± or None -> for each direction the cells R@1, R@5, R@10 and their mean."""
    cells = []
    for way in (0, 1):
        three = figures[3 * way : 3 * way + 3]
        cells.append([f"{x:.1f}" for x in (*three, sum(three) / 3)])
        cells[way][0] += plus_minus.format(halves[way]) if halves else ""
    return cells


def width(text):
    """Columns that a text takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def align_columns(rows):
    """Rows of cells -> lines in which the cells of each column start below each other."""
    widths = [max(map(width, column)) for column in zip(*rows)]
    pad = lambda cell, size: cell + " " * (size - width(cell))
    return ["  ".join(map(pad, row, widths)).rstrip() for row in rows]


def table(records, name, split):
    """The paper's table for this data set as text, published rows and the measured ones (marked >)."""
    title, rows = compare_rows(records, name, split)
    lines = [["scale", "model", "setting", *["  R@1", "  R@5", " R@10", "   MR", ""] * 2]]
    for group, model, setting, figures, halves in rows:
        to_image, to_text = recalls_as_text(figures, halves)
        right_set = lambda cells: [" " * (5 - len(cell.split()[0])) + cell for cell in cells]
        lines.append([group, model, setting, *right_set(to_image), "", *right_set(to_text), ""])
    head, *body = align_columns(lines)
    left, right = head.find("R@1"), head.rfind("R@1")
    above = " " * left + "Text-to-Image" + " " * (right - left - 13) + "Image-to-Text"
    return "\n".join([title, above, head, *body, *notes(records, name, split)])


def gain_in_words(what, change):
    """{"mean", "interval"} of change_of -> a sentence's part."""
    low, high = change["interval"]
    return f"{what} {change['mean']:+.1f} ({low:+.1f} to {high:+.1f}{', which may be chance' if low <= 0 <= high else ''})"


def notes(records, name, split):
    """What a reader of the table must know: lines."""
    ways = {"text_to_image": "caption{s} without a image in the split", "image_to_text": "image{s} without a caption"}
    first, *others = records
    t, i = (first[way] for way in ways)
    lines = [f"> measured here, towers in {first['precision']}: {t['queries']:,} captions ask, {i['queries']:,} images ask. "
             f"Guessing gives text-to-image R@1 {t['chance_R@1']:.1f}, MR {t['chance_MR']:.1f}; "
             f"image-to-text {i['chance_R@1']:.1f}, {i['chance_MR']:.1f}.",
             "MR is the mean of R@1, R@5 and R@10. ±: half of the interval that holds 95 % of the R@1 when the split's images are "
             "resampled (bootstrap, 1,000 draws).",
             "Setting: fine-tuned or trained on this data set, as far as the checkpoint's file tells; else zero-shot."]
    published = TABLE_1.get(name, {}).get(split)
    if published and published == first["pairs"]:
        lines.append(f"{published:,} pairs, as in the paper's table 1.")
    elif published:
        lines.append(f"NOTE: {first['pairs']:,} pairs where the paper's table 1 has {published:,}, "
                     f"so the published rows are of another set.")
    for way, what in ways.items():
        if missing := first[way]["without_answer"]:
            lines.append(f"{missing:,} {what.format(s='s' * (missing > 1))}: asked nothing, but they stay candidates.")
    for record in others:
        gains = ", ".join(gain_in_words(way.replace("_", "-"), change) for way, change in record["change_of_R@1"].items())
        lines.append(f"R@1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval: {gains}.")
    return lines


def class_table(records, title, templates):
    """Zero-shot classification as text; templates: how many prompts each class has."""
    lines = [["model", "top-1", "top-5", "mean per class"]]
    for r in records:
        top_1 = f"{r['top-1']:5.1f} ±{half_width(r['top-1_interval']):.1f}"
        lines.append([f"> {r['model']} ({r['ckpt']})", top_1, f"{r['top-5']:5.1f}", f"{r['mean_per_class']:5.1f}"])
    return "\n".join([title, *align_columns(lines), *class_notes(records, templates)])


def class_notes(records, templates):
    """What a reader of the table must know: lines."""
    first, *others = records
    lines = [f"> measured here, towers in {first['precision']}: {first['images']:,} images, {first['classes']:,} classes, "
             f"{templates} prompt{'s' * (templates > 1)} each. Guessing gives top-1 of {first['chance_top-1']:.1f}.",
             "±: half of the interval that holds 95 % of the top-1 when the images are resampled (bootstrap, 1,000 draws)."]
    for record in others:
        what = f"top-1 of {record['ckpt']} less that of {first['ckpt']}, with 95 % interval:"
        lines.append(f"{gain_in_words(what, record['change_of_top-1'])}.")
    for record in records:
        if record["confused"]:
            pairs = "; ".join(f"{c['class']} taken for {c['taken_for']}, {c['times']} of {c['of']}" for c in record["confused"][:5])
            lines.append(f"most often confused by {record['ckpt']}: {pairs}")
    return lines
