"""Pages for a browser: an evaluation with images to look at, and the contact sheet of a search.

    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html
    python -m tools.search --ckpt runs/own/best.pt --images /path/to/folder "海边的日落" --html a.html

A page is one file: it needs no network and no scripts. All text of the data is escaped: a caption
<script> stays text. Curves are inline SVG. The page follows the browser's light or dark mode.
"""
import base64
import functools
import html
import io
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np

from support import system, tables
from support.images import image_at

SAMPLE = 8                                                      # queries of each kind on a page
BEST = 5                                                        # candidates shown of each query
LONGEST = 160                                                   # characters shown of a text
WAYS = {"text_to_image": "Text-to-Image", "image_to_text": "Image-to-Text"}


# ---- parts of a page


def text(x):
    """Any text as HTML, cut to LONGEST characters."""
    x = str(x).encode(errors="backslashreplace").decode()       # a file name may not be UTF-8
    return html.escape(x if len(x) <= LONGEST else x[:LONGEST] + "…")


def chinese(x):
    return f'<span lang="zh">{text(x)}</span>'


def write_page(path, title, parts):
    """Write a page whole, or raise BadInput. parts: pieces of HTML."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = ('<!doctype html>\n<html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{text(title)}</title><style>\n{style}</style>\n<body><h1>{text(title)}</h1>')
    system.write_text(path, "\n".join([head, *parts, "</body></html>\n"]))


def thumbnail(image, side=176):
    """A PIL image as the src of an <img>: a JPEG inside the page."""
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def card(read, lines, classes="card", side=176):
    """The image that read() returns, or why it cannot be read; below it lines of HTML."""
    try:
        image = f'<img src="{thumbnail(read(), side)}" alt="">'
    except system.BadInput as error:
        image = f"<p>{text(error)}</p>"
    caption = "<br>".join(lines)
    return f'<figure class="{classes}">{image}<figcaption>{caption}</figcaption></figure>'


def html_table(names, rows, above=""):
    """names: of the columns; rows: lists of HTML cells; above: a row of <th> above the names.

    Columns of numbers are set to the right. Rows with a cell that begins with "> " stand out.
    """
    kinds = [' class="n"' if cell.strip()[:1].isdigit() else "" for cell in rows[0]]
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, names))
    body = ""
    for row in rows:
        measured = any(cell.startswith("&gt; ") for cell in row)
        body += '<tr class="measured">' if measured else "<tr>"
        for kind, cell in zip(kinds, row):
            if kind and "±" in cell:
                cell = cell.replace("±", "<small>±") + "</small>"
            body += f"<td{kind}>{cell}</td>"
        body += "</tr>"
    return (f'<div class="wide"><table><thead>{above}<tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def paragraphs(lines):
    return [f'<p class="soft">{html.escape(line)}</p>' for line in lines]


def section(title, hint, parts):
    """A heading and what stands under it; `hint` says what the parts show."""
    if not parts:
        return [f"<h2>{title}</h2><p>There are none.</p>"]
    return [f'<h2>{title}</h2><p class="soft">{hint}</p>', *parts]


# ---- charts


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * k for k in range(first, last + 1)]


def chart(title, curves, x_name, log_x=False, high=None):
    """A line chart, inline SVG. curves: {name: [(x, y), …]}; y goes from 0 to `high`.

    Each two curves have one colour; the second of them is dashed.
    """
    xs, ys = zip(*(point for curve in curves.values() for point in curve))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    high = high or 1.05 * max(ys) or 1
    scale = math.log if log_x else float
    W, H, left, bottom = 560, 300, 46, 40                       # pixels; room for the axes

    def across(x):
        share = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low))
        return f"{left + share * (W - left - 14):.1f}"

    def down(y):
        return f"{H - bottom - y / high * (H - bottom - 10):.1f}"

    svg, keys = [], []
    for y in ticks(0, high):
        svg.append(f'<line class="grid" x1="{left}" x2="{W - 14}" y1="{down(y)}" y2="{down(y)}"/>'
                   f'<text x="{left - 7}" y="{down(y)}" dy="4" text-anchor="end">{y:g}</text>')
    for x in (1, 2, 5, 10, 20, 50, 100) if log_x else ticks(x_low, x_high):
        if x_low <= x <= x_high:
            svg.append(f'<text x="{across(x)}" y="{H - bottom + 18}" '
                       f'text-anchor="middle">{x:g}</text>')
    svg.append(f'<text x="{(W + left) / 2}" y="{H - 4}" text-anchor="middle">{x_name}</text>')
    for n, (name, curve) in enumerate(curves.items()):
        colour = f"var(--c{n // 2 % 6})"
        dash, border = ("7 4", "dashed") if n % 2 else ("none", "solid")
        shown = curve[: -1 : max(1, len(curve) // 400)] + curve[-1:]        # enough for a screen
        points = " ".join(f"{across(x)},{down(y)}" for x, y in shown)
        svg.append(f'<polyline points="{points}" style="stroke: {colour}; '
                   f'stroke-dasharray: {dash}"><title>{text(name)}</title></polyline>')
        keys.append(f'<span><i style="border-color: {colour}; border-top-style: {border}"></i>'
                    f'{text(name)}</span>')
    title = text(title)
    return (f'<figure><figcaption>{title}</figcaption>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{title}">{"".join(svg)}</svg>'
            f'<div class="key">{"".join(keys)}</div></figure>')


def recall_chart(records, rankings):
    """Recall at K up to 100, of each checkpoint in both directions."""
    curves = {}
    for record, ranking in zip(records, rankings):
        for way, name in WAYS.items():
            if len(records) > 1:
                name += f", {record['ckpt']}"
            ranks = ranking[way].counted_ranks()
            K = range(1, min(100, ranking[way].candidates) + 1)
            curves[name] = [(k, 100 * (ranks < k).double().mean().item()) for k in K]
    return chart("Recall@K (%)", curves, "K", log_x=True, high=100)


def training_charts(records):
    """Charts of the runs that wrote these checkpoints, if metrics.jsonl lies beside them."""
    charts = []
    files = [Path(record["ckpt"]) for record in records]
    for folder in dict.fromkeys(file.parent for file in files if file.is_file()):
        loss, valid = metrics_of(folder / "metrics.jsonl")
        if len(loss["loss"]) > 1:
            charts.append(chart(f"{folder}: training loss", loss, "step"))
        if len(valid["mean recall"]) > 1:
            charts.append(chart(f"{folder}: recall on the valid split (%)", valid, "step"))
    return charts


def metrics_of(path):
    """The curves in a metrics.jsonl -> {"loss": [(step, y), …]}, and those of the valid split."""
    loss = {"loss": []}
    valid = {"Text-to-Image R@1": [], "Image-to-Text R@1": [], "mean recall": []}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return loss, valid
    for line in lines:
        try:
            record = json.loads(line)
            if "valid" in record:
                recall = record["valid"]
                curves, values = valid, [*(recall[way]["R@1"] for way in WAYS), record["score"]]
            else:
                curves, values = loss, [record["loss"]]
            # "average": of averaged weights, no point of the curve
            if "average" not in record and all(map(math.isfinite, [record["step"], *values])):
                for curve, y in zip(curves.values(), values):
                    curve.append((record["step"], y))
        # a line that a crash has cut, or that another program wrote
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return loss, valid


# ---- examples


Found = namedtuple("Found", "rank candidate score is_correct")   # what a page shows of a query


def top_candidates(scores, correct):
    """The BEST candidates, and the best correct one: [Found]. scores (C,), correct: a list."""
    scores, order = scores.cpu().sort(descending=True, stable=True)
    found = []
    for rank, candidate in enumerate(order.tolist()):
        is_correct = candidate in correct
        if rank < BEST or is_correct:
            found.append(Found(rank, candidate, scores[rank].item(), is_correct))
        if rank >= BEST - 1 and any(f.is_correct for f in found):
            break
    return found


def correct_rank(found):
    return next(f"correct at rank {f.rank + 1:,}" for f in found if f.is_correct)


def image_and_texts(read, lines, found, texts, score="{:.3f}"):
    """An image with lines of HTML below it, and the texts found for it: captions or classes."""
    items = ""
    for f in found:
        frame, mark = (' class="right"', " ✓") if f.is_correct else ("", "")
        late = f"<small>rank {f.rank + 1:,}</small>" if f.rank >= BEST else ""
        items += (f"<li{frame}><b>{score.format(f.score)}{mark}</b>"
                  f"{chinese(texts[f.candidate])}{late}</li>")
    return f'<div class="query pair">{card(read, lines)}<ol>{items}</ol></div>'


def text_and_images(caption, found, split, captions_of_image):
    """A caption and the images found for it, each with the first of its own captions."""
    cards = ""
    for f in found:
        mark, classes = (" ✓", "card right") if f.is_correct else ("", "card")
        score = f"<b>{f.score:.3f}{mark}</b>"
        if f.rank >= BEST:
            score, classes = f"{score} rank {f.rank + 1:,}", f"{classes} later"
        own = [split.texts[t] for t in captions_of_image[f.candidate][:1]]
        name = text(split.image_ids[f.candidate])
        lines = [score, f'<span lang="zh" title="{name}">{text("".join(own))}</span>']
        cards += card(functools.partial(split.image, f.candidate), lines, classes)
    return (f'<figure class="query"><figcaption>{chinese(caption)}'
            f'<small>{correct_rank(found)}</small></figcaption>'
            f'<div class="cards">{cards}</div></figure>')


def sample_and_worst(worst_first, missed):
    """{heading: what a page shows} of queries, the worst first; missed: whether each was missed."""
    sample = np.random.default_rng(0).permutation(worst_first)[:SAMPLE].tolist()
    return {f"a random sample of {len(sample)}": sample,
            "the worst misses": [q for q in worst_first[:SAMPLE] if missed[q]]}


# ---- pages


def write_retrieval(path, name, split_name, records, rankings, split, image_embed, text_embed):
    """The page of evaluate.py --report: the table, curves, a sample of queries, the worst misses.

    records, rankings: of each checkpoint; image_embed (I, D), text_embed (T, D): of the last one.
    """
    title, rows = tables.result_rows(records, name, split_name)
    names = ["scale", "model", "setting", *2 * ["R@1", "R@5", "R@10", "MR"]]
    above = ('<tr><th colspan="3"></th><th colspan="4">Text-to-Image</th>'
             '<th colspan="4">Image-to-Text</th></tr>')
    parts = [html_table(names, [list(map(text, row)) for row in rows], above),
             *paragraphs(tables.notes(records, name, split_name)),
             '<h2>Curves</h2><div class="charts">', recall_chart(records, rankings),
             *training_charts(records), "</div>"]

    whose = f" ({text(records[-1]['ckpt'])})" if len(records) > 1 else ""
    hint = (f"The {BEST} best candidates with their cosine similarity. Correct ones are framed; "
            f"when none is among the {BEST}, the best correct one follows.")
    captions_of_image = rankings[-1]["image_to_text"].correct
    for way, ranking in rankings[-1].items():
        by_rank = ranking.ranks.argsort(descending=True, stable=True).tolist()
        counted = [q for q in by_rank if ranking.ranks[q] >= 0]
        for what, chosen in sample_and_worst(counted, ranking.ranks > 0).items():
            examples = []
            for q in chosen:
                if way == "text_to_image":
                    found = top_candidates(image_embed @ text_embed[q], ranking.correct[q])
                    example = text_and_images(split.texts[q], found, split, captions_of_image)
                else:
                    found = top_candidates(text_embed @ image_embed[q], ranking.correct[q])
                    lines = [text(split.image_ids[q]), correct_rank(found)]
                    read = functools.partial(split.image, q)
                    example = image_and_texts(read, lines, found, split.texts)
                examples.append(example)
            parts += section(f"{WAYS[way]}: {what}{whose}", hint, examples)
    write_page(path, title, parts)


def write_classification(path, title, notes, records, names, paths, labels, probabilities):
    """The page of tools/classify.py --report: tables, a sample of images, the worst misses.

    names: of C classes; paths: of I images; labels: I class numbers; probabilities(i) -> (C,) of
    image i, by the last checkpoint.
    """
    last = records[-1]
    rows = [list(map(text, tables.class_row(record))) for record in records]
    parts = [html_table(tables.CLASS_COLUMNS, rows), *paragraphs(notes)]
    whose = f" ({text(last['ckpt'])})" if len(records) > 1 else ""
    if last["confused"]:
        rows = [[chinese(c["class"]), chinese(c["taken_for"]), f"{c['times']:,} of {c['of']:,}"]
                for c in last["confused"]]
        parts += [f"<h2>Most often confused{whose}: at most 20 pairs</h2>",
                  html_table(["class", "taken for", "images"], rows)]
    lowest = sorted(last["per_class"], key=lambda c: c["top-1"])[:20]
    rows = [[chinese(c["class"]), f"{c['top-1']:.1f}", f"{c['images']:,}"] for c in lowest]
    parts += [f"<h2>Classes with the lowest top-1{whose}: at most 20</h2>",
              html_table(["class", "top-1", "images"], rows)]

    of_correct, missed = [], []
    for i, label in enumerate(labels):
        p = probabilities(i)                                                    # (C,)
        of_correct.append(p[label].item())
        missed.append(p.argmax() != label)
    hint = f"The {BEST} most probable classes. The correct one is framed, whatever its rank."
    worst_first = np.argsort(of_correct, kind="stable").tolist()
    for what, chosen in sample_and_worst(worst_first, missed).items():
        examples = []
        for i in chosen:
            found = top_candidates(100 * probabilities(i), [labels[i]])
            lines = [chinese(names[labels[i]]), text(Path(paths[i]).name)]
            image = functools.partial(image_at, paths, i)
            examples.append(image_and_texts(image, lines, found, names, "{:.1f} %"))
        parts += section(f"Images: {what}{whose}", hint, examples)
    write_page(path, title, [*parts, '<div class="charts">', *training_charts(records), "</div>"])


def write_sheet(path, query, note, found, read, link, query_image=None):
    """The contact sheet of a search.

    found: [(file, similarity), …], best first; read(file) -> image, or raises BadInput;
    link(file) -> its address; query_image: the image that was the query.
    """
    cards = ""
    if query_image:
        cards += card(lambda: query_image, ["<b>the query</b>"], "card right", side=256)
    for place, (file, similarity) in enumerate(found, 1):
        address = f'<a href="{html.escape(link(file))}">{text(file)}</a>'
        lines = [f"<b>{place}.</b> {similarity:.3f}", address]
        cards += card(functools.partial(read, file), lines, side=256)
    write_page(path, query, [*paragraphs([note]), f'<div class="cards sheet">{cards}</div>'])
