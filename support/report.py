"""Pages for a browser: of evaluate.py and tools.classify (--report) and of tools.search (--html).

A page is one file: it needs no network and no scripts. All text of the data is escaped: a caption
<script> stays text. Curves are inline SVG. The page follows the browser's light or dark mode.
"""
import base64
import html
import io
import math
from collections import namedtuple
from pathlib import Path
from string import Template

import numpy as np

from support import system, tables
from support.images import image_at
from support.run import read_log

SAMPLE = 8                                                      # queries of each kind on a page
BEST = 5                                                        # candidates shown of each query
LONGEST = 160                                                   # characters shown of a text
WAYS = {"text_to_image": "Text-to-Image", "image_to_text": "Image-to-Text"}


def text(x):
    """Any text as HTML, cut to LONGEST characters."""
    x = system.printable(x)                                     # a file name may not be UTF-8
    return html.escape(x if len(x) <= LONGEST else x[:LONGEST] + "…")


def chinese(x):
    return f'<bdi lang="zh">{text(x)}</bdi>'                # keeps text from right to left inside


def write_page(path, title, parts):
    """Write a page whole, or raise BadInput. parts: pieces of HTML."""
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    system.write_text(path, page.substitute(title=text(title), parts="\n".join(parts)))


def card(image, lines, classes="card", side=176):
    """A PIL image, as a JPEG inside the page, and below it lines of HTML."""
    file, small = io.BytesIO(), image.copy()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=80)
    encoded = base64.b64encode(file.getvalue()).decode()
    return (f'<figure class="{classes}"><img src="data:image/jpeg;base64,{encoded}" alt="">'
            f'<figcaption>{"<br>".join(lines)}</figcaption></figure>')


def html_table(rows, above=""):
    """rows: lists of HTML cells, the names of columns first; above: a row of <th> above them."""
    names, *rows = rows
    kinds = [' class="n"' if cell.strip()[:1].isdigit() else "" for cell in rows[0]]    # numbers
    head = "".join(f"<th{kind}>{name.strip()}</th>" for kind, name in zip(kinds, names))
    body = ""
    for row in rows:
        measured = any(cell.startswith("&gt; ") for cell in row)
        body += '<tr class="measured">' if measured else "<tr>"
        body += "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
    return (f'<div class="wide"><table><thead>{above}<tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def paragraphs(lines):
    return [f'<p class="soft">{html.escape(system.printable(line))}</p>' for line in lines]


# ---- charts


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * k for k in range(first, last + 1)]


def chart(title, curves, x_name, log_x=False, high=None):
    """A line chart, inline SVG. curves: {name: [(x, y), …]}; y goes from 0 to `high`."""
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
        style = f'class="curve{n % 2}" style="color: var(--c{n // 2 % 6})"'      # 1 is dashed
        shown = curve[: -1 : max(1, len(curve) // 400)] + curve[-1:]        # enough for a screen
        points = " ".join(f"{across(x)},{down(y)}" for x, y in shown)
        svg.append(f'<polyline {style} points="{points}"><title>{text(name)}</title></polyline>')
        keys.append(f'<span><i {style}></i>{text(name)}</span>')
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
        lines = read_log(folder / "metrics.jsonl")
        loss = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
        # "average": of averaged weights, which are no point of the curve
        valid = [x for x in lines if "valid" in x and "average" not in x]
        curves = {f"{name} R@1": [(x["step"], x["valid"][way]["R@1"]) for x in valid]
                  for way, name in WAYS.items()}
        curves["mean recall"] = [(x["step"], x["score"]) for x in valid]
        if len(loss) > 1:
            charts.append(chart(f"{folder}: training loss", {"loss": loss}, "step"))
        if len(valid) > 1:
            charts.append(chart(f"{folder}: recall on the valid split (%)", curves, "step"))
    return charts


# ---- examples


Found = namedtuple("Found", "rank candidate score is_correct")   # what a page shows of a query


def top_candidates(scores, correct):
    """The BEST candidates, and the best correct one: [Found]. scores (C,), correct: not empty."""
    scores, order = scores.cpu().sort(descending=True, stable=True)
    is_correct = np.isin(order, correct).tolist()
    best_correct = is_correct.index(True)                       # its rank
    ranks = list(range(min(BEST, len(order))))
    if best_correct >= BEST:
        ranks.append(best_correct)
    return [Found(r, order[r].item(), scores[r].item(), is_correct[r]) for r in ranks]


def score_of(found, shown="{:.3f}"):
    """The score of one Found, a mark if it is correct, its rank if it is not among the BEST."""
    mark = " ✓" if found.is_correct else ""
    late = f" rank {found.rank + 1:,}" if found.rank >= BEST else ""
    return f"<b>{shown.format(found.score)}{mark}{late}</b>"


def image_and_texts(image, lines, found, texts, shown="{:.3f}"):
    """An image with lines of HTML below it, and the texts found for it: captions or classes."""
    items = ""
    for f in found:
        frame = ' class="right"' if f.is_correct else ""
        items += f"<li{frame}>{score_of(f, shown)}{chinese(texts[f.candidate])}</li>"
    return f'<div class="query pair">{card(image, lines)}<ol>{items}</ol></div>'


def examples(title, queries, misses, show):
    """A random sample of the queries, and the worst misses (worst first); show(q) -> HTML."""
    sample = np.random.default_rng(0).permutation(queries)[:SAMPLE].tolist()
    worst = misses[:SAMPLE]
    return [f"<h2>{title}: a random sample of {len(sample)}</h2>", *map(show, sample),
            f"<h2>{title}: the {len(worst)} worst misses</h2>", *map(show, worst)]


# ---- pages


def write_retrieval(path, name, split_name, records, rankings, split, image_embed, text_embed):
    """The page of evaluate.py --report: the table, curves, a sample of queries, the worst misses.

    records, rankings: of each checkpoint; image_embed (I, D), text_embed (T, D): of the last one.
    """
    title, rows = tables.result_rows(records, name, split_name)
    above = ('<tr><th colspan="3"></th><th colspan="4">Text-to-Image</th>'
             '<th colspan="4">Image-to-Text</th></tr>')
    parts = [html_table([list(map(text, row)) for row in rows], above),
             *paragraphs(tables.notes(records, name, split_name)),
             '<h2>Curves</h2><div class="charts">', recall_chart(records, rankings),
             *training_charts(records), "</div>"]

    to_image, to_text = rankings[-1]["text_to_image"], rankings[-1]["image_to_text"]

    def show_caption(t):
        cards = ""
        for f in top_candidates(image_embed @ text_embed[t], to_image.correct[t]):
            own = [chinese(split.texts[first]) for first in to_text.correct[f.candidate][:1]]
            classes = "card right" if f.is_correct else "card"
            cards += card(split.image(f.candidate), [score_of(f), *own], classes)
        return (f'<figure class="query"><figcaption>{chinese(split.texts[t])}</figcaption>'
                f'<div class="cards">{cards}</div></figure>')

    def show_image(i):
        found = top_candidates(text_embed @ image_embed[i], to_text.correct[i])
        return image_and_texts(split.image(i), [text(split.image_ids[i])], found, split.texts)

    parts += paragraphs([
        f"Below are the {BEST} best candidates of some queries, by {records[-1]['ckpt']}, with "
        "their cosine similarity. Correct ones are framed; when none is among the best, the best "
        "correct one follows with its rank."])
    for way, show in (("text_to_image", show_caption), ("image_to_text", show_image)):
        ranks = rankings[-1][way].ranks
        worst_first = ranks.argsort(descending=True, stable=True).tolist()
        counted = [q for q in worst_first if ranks[q] >= 0]
        parts += examples(WAYS[way], counted, [q for q in counted if ranks[q] > 0], show)
    write_page(path, title, parts)


def write_classification(path, title, rows, notes, records, names, paths, labels, probabilities):
    """The page of tools/classify.py --report: tables, a sample of images, the worst misses.

    rows: of the table; names: of C classes; paths: of I images; labels: I class numbers;
    probabilities(i) -> (C,) of image i, by the last checkpoint.
    """
    last = records[-1]
    parts = [html_table([list(map(text, row)) for row in rows]),
             *paragraphs([*notes, f"Below are results of {last['ckpt']}."])]
    if last["confused"]:
        rows = [["class", "taken for", "images"]]
        rows += [[chinese(c["class"]), chinese(c["taken_for"]), f"{c['times']:,} of {c['of']:,}"]
                 for c in last["confused"]]
        parts += ["<h2>Most often confused: at most 20 pairs</h2>", html_table(rows)]
    lowest = sorted(last["per_class"], key=lambda c: c["top-1"])[:20]
    rows = [["class", "top-1", "images"]]
    rows += [[chinese(c["class"]), f"{c['top-1']:.1f}", f"{c['images']:,}"] for c in lowest]
    parts += ["<h2>Classes with the lowest top-1: at most 20</h2>", html_table(rows)]

    def show(i):
        found = top_candidates(100 * probabilities(i), [labels[i]])
        lines = [chinese(names[labels[i]]), text(Path(paths[i]).name)]
        return image_and_texts(image_at(paths, i), lines, found, names, "{:.1f} %")

    parts += paragraphs([f"The {BEST} most probable classes of images; the correct one is framed."])
    of_correct = [probabilities(i)[label].item() for i, label in enumerate(labels)]
    worst_first = np.argsort(of_correct, kind="stable").tolist()
    misses = [i for i in worst_first if probabilities(i).argmax() != labels[i]]
    parts += examples("Images", worst_first, misses, show)
    write_page(path, title, [*parts, '<div class="charts">', *training_charts(records), "</div>"])


def write_sheet(path, query, note, folder, found, query_image=None):
    """The contact sheet of a search. found: [(file in the folder, similarity), …], best first."""
    cards = ""
    if query_image:
        cards += card(query_image, ["<b>the query</b>"], "card right", side=256)
    for place, (file, similarity) in enumerate(found, 1):
        address = html.escape((folder / file).resolve().as_uri())
        lines = [f"<b>{place}.</b> {similarity:.3f}", f'<a href="{address}">{text(file)}</a>']
        cards += card(image_at([file], 0, folder), lines, side=256)
    write_page(path, query, [*paragraphs([note]), f'<div class="cards sheet">{cards}</div>'])
