"""Pages for a browser: what an evaluation found, with images to look at; and the contact sheet of a search.

    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html
    python search.py --ckpt runs/own/best.pt --images /path/to/folder "海边的日落" --html found.html

Each page is one file that needs nothing else, neither network nor scripts. Whatever comes from the data is escaped: a caption
<script> stays text. Curves are inline SVG. A page follows the browser's light or dark mode, and takes its fonts from the system.
"""
import base64
import html
import io
import json
import math
from pathlib import Path

import numpy as np
import torch

from support import system

SAMPLE, BEST = 8, 5                                                             # queries shown of each kind; candidates shown of each query
LONGEST = 160                                                                   # characters shown of a text
WAYS = {"text_to_image": "Text-to-Image", "image_to_text": "Image-to-Text"}
STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1c2128; --soft: #646c77; --line: #d9dee4; --band: #f4f6f8; --right: #15803d;
  --c0: #1d5fbf; --c1: #c2570c; --c2: #15803d; --c3: #8a3ffc; --c4: #b3261e; --c5: #5b6470; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e4e8ed; --soft: #9aa4b0; --line: #343b44; --band: #1d2228; --right: #4ade80;
  --c0: #6ea8ff; --c1: #ffa25c; --c2: #4ade80; --c3: #c4a1ff; --c4: #ff8a80; --c5: #b4bcc6; } }

* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); font-size: .875rem; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td:nth-child(2) { white-space: normal; min-width: 9rem; }
td.n, th.n { text-align: right; }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; }
thead th[colspan] { text-align: center; }
tr.measured td { background: var(--band); font-weight: 600; }
td small { color: var(--soft); font-weight: 400; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem; }
.charts figure { margin: .5rem 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2.25; stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; font-size: .875rem; color: var(--soft); }
.key i { display: inline-block; width: 1.4em; border-top: 3px solid; margin-right: .4em; vertical-align: middle; }

.ask { margin: 0; padding: .9rem 0; border-bottom: 1px solid var(--line); }
.ask > figcaption { font-weight: 600; margin-bottom: .5rem; }
.ask > figcaption small { font-weight: 400; color: var(--soft); margin-left: .5em; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; }
.card { margin: 0; width: 8.25rem; padding: .3rem; border: 3px solid transparent; border-radius: 6px;
  font-size: .8125rem; line-height: 1.35; color: var(--soft); }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--band); border-radius: 3px; margin-bottom: .25rem; }
.card a { color: inherit; }
.card b { color: var(--ink); font-weight: 600; }
.right { border-color: var(--right); }
.right b { color: var(--right); }
.sheet .card { width: 13rem; }
.later { position: relative; margin-left: 1.1rem; }
.later::before { content: "…"; position: absolute; left: -1.35rem; top: 3.2rem; font-size: 1.3rem; color: var(--soft); }

.pair { display: grid; grid-template-columns: 8.25rem 1fr; gap: 1rem; align-items: start; }
.pair ol { margin: 0; padding: 0; list-style: none; }
.pair li { display: flex; gap: .75rem; padding: .15rem .5rem; border: 2px solid transparent; border-radius: 6px; }
.pair li.right { border-color: var(--right); }
.pair li b { flex: none; min-width: 3.4rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.pair li span { flex: 1; }
.pair li small { color: var(--soft); }

@media (max-width: 40rem) {
  body { padding: 1rem .8rem 3rem; }
  table { font-size: .8125rem; }
  td, th { padding: .25rem .35rem; }
  .card { width: calc(33.3% - .45rem); }
  .pair { grid-template-columns: 5.5rem 1fr; }
  .pair .card { width: 100%; }
  .later { margin-left: 0; }
  .later::before { content: none; }
}
"""


# ---------------------------------------------------------------------------------------------------------------- parts of a page


def text(x):
    """Any text as HTML, cut to a length that a page can bear."""
    x = str(x).encode(errors="backslashreplace").decode()                       # a file's name need not be text
    return html.escape(x if len(x) <= LONGEST else x[:LONGEST] + "…")


def write_page(path, title, parts):
    """Write a page, whole or not at all. `parts`: pieces of HTML. BadInput when it cannot be written."""
    page = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style>",
        f"<body><h1>{text(title)}</h1>",
        *parts,
        "</body></html>",
    ]
    system.write_text(path, "\n".join(page) + "\n")


def thumbnail(image, side=176):
    """A PIL image as the address of an <img>: a JPEG inside the page."""
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def card(read, lines, right=False, later=False, side=176):
    """The image that read() gives, with lines of HTML under it. Should it have become unreadable, the reason stands in its place.

    Framed when it is a right answer; after a gap when it came later than its neighbour.
    """
    try:
        image = f'<img src="{thumbnail(read(), side)}" alt="">'
    except system.BadInput as error:
        image = f"<p>{text(error)}</p>"
    classes = "card" + " right" * right + " later" * later
    return f'<figure class="{classes}">{image}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def answer(score, label, right, place):
    """A text that was found for a image, as an item of a list; its place is told when it is not one of the best."""
    late = f"<small>place {place + 1:,}</small>" * (place >= BEST)
    return f'<li{" class=right" * right}><b>{score}{" ✓" * right}</b><span lang="zh">{text(label)}</span>{late}</li>'


def html_table(head, rows, measured):
    """A table. head: rows of <th> cells; rows: tuples of cells, HTML already; `measured`: whether each row stands out.

    A cell that begins with a digit is set to the right.
    """
    cell = lambda x: f'<td class="n">{x}</td>' if x[:1].isdigit() else f"<td>{x}</td>"
    thead = "".join(f"<tr>{row}</tr>" for row in head)
    body = "".join(f'<tr{" class=measured" * is_ours}>{"".join(map(cell, row))}</tr>' for row, is_ours in zip(rows, measured))
    return f'<div class="wide"><table><thead>{thead}</thead><tbody>{body}</tbody></table></div>'


def paragraphs(lines):
    return [f'<p class="soft">{html.escape(line)}</p>' for line in lines]


def section(title, chosen, hint):
    """A heading (HTML), and under it a hint at what is shown; or that there is nothing."""
    return [f"<h2>{title}</h2>", f'<p class="soft">{hint}</p>' if chosen else "<p>There are none.</p>"]


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, lines, x_name, log_x=False, low=None, high=None):
    """A line chart. lines: {name: [(x, y), …]}, two by two in one colour, the second one dashed.

    low, high: the ends of the y axis (default: those of the data).
    """
    thinned = lambda points: points[: -1 : max(1, len(points) // 400)] + points[-1:]                # a screen shows no more
    lines = {name: thinned(points) for name, points in lines.items() if points}
    xs, ys = zip(*(point for points in lines.values() for point in points))
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    low, high = min(ys) if low is None else low, 1.05 * max(ys) if high is None else high
    high = high if high > low else low + 1

    # from (x, y) to pixels: `left` and `bottom` are the room for the numbers of the axes
    scale = math.log if log_x else float
    W, H, left, bottom = 560, 300, 46, 40
    across = lambda x: left + (scale(x) - scale(x0)) / (scale(x1) - scale(x0)) * (W - left - 14)
    down = lambda y: H - bottom - (y - low) / (high - low) * (H - bottom - 10)

    out = []
    for y in ticks(low, high):
        v = down(y)
        out.append(f'<line class="grid" x1="{left}" x2="{W - 14}" y1="{v:.1f}" y2="{v:.1f}"/>'
                   f'<text x="{left - 7}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in [k for k in (1, 2, 5, 10, 20, 50, 100) if x0 <= k <= x1] if log_x else ticks(x0, x1):
        out.append(f'<text x="{across(x):.1f}" y="{H - bottom + 18}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(W + left) / 2}" y="{H - 4}" text-anchor="middle">{text(x_name)}</text>')
    keys = []
    for n, (name, points) in enumerate(lines.items()):
        colour, (dash, border) = f"var(--c{n // 2 % 6})", ("7 4", "dashed") if n % 2 else ("none", "solid")
        where = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        out.append(f'<polyline points="{where}" style="stroke: {colour}; stroke-dasharray: {dash}"><title>{text(name)}</title></polyline>')
        keys.append(f'<span><i style="border-color: {colour}; border-top-style: {border}"></i>{text(name)}</span>')
    return (f'<figure><figcaption>{text(title)}</figcaption>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{text(title)}">{"".join(out)}</svg>'
            f'<div class="key">{"".join(keys)}</div></figure>')


def charts(pieces):
    return [f'<div class="charts">{"".join(pieces)}</div>'] if pieces else []


# ---------------------------------------------------------------------------------------------------------------- retrieval


def recall_curves(records, ranked):
    """{name of a line: [(K, recall at K in percent), …]} for K up to 100: of each checkpoint, in both directions."""
    curves = {}
    for record, some in zip(records, ranked):
        for way, name in WAYS.items():
            ranks = some[way].ranks[some[way].ranks >= 0]                       # (A,): of the queries that have an answer
            at_k = [(k, 100 * (ranks < k).double().mean().item()) for k in range(1, min(100, some[way].candidates) + 1)]
            curves[f"{name}, {record['ckpt']}" if len(records) > 1 else name] = at_k
    return curves


def write_retrieval(path, title, rows, notes, records, ranked, split, image_embed, text_embed):
    """The page of `evaluate.py --data … --report`: the table, curves, a random sample of queries and the worst misses.

    rows: (scale, model, setting, the cells of both directions); records, ranked: one for each checkpoint;
    image_embed (I, D), text_embed (T, D): those of the last one.
    """
    measures = "".join(f'<th class="n">{name}</th>' for name in ("R@1", "R@5", "R@10", "MR") * 2)
    head = ['<th colspan="3"></th><th colspan="4">Text-to-Image</th><th colspan="4">Image-to-Text</th>',
            f"<th>scale</th><th>model</th><th>setting</th>{measures}"]
    figures = [(text(scale), text(model), text(setting), *to_image, *to_text) for scale, model, setting, (to_image, to_text) in rows]
    parts = [html_table(head, figures, [model.startswith("> ") for _, model, *_ in rows]), *paragraphs(notes), "<h2>Curves</h2>"]
    recall = chart("Recall@K (%)", recall_curves(records, ranked), "K, the number of answers looked at", log_x=True, low=0, high=100)
    parts += charts([recall, *training_curves(records)])

    ranked, whose = ranked[-1], f" ({text(records[-1]['ckpt'])})" if len(records) > 1 else ""
    captions_of_image = ranked["image_to_text"].correct
    ways = (("text_to_image", text_embed, image_embed, caption_asks), ("image_to_text", image_embed, text_embed, image_asks))
    for way, queries, candidates, draw in ways:
        order = ranked[way].ranks.argsort(descending=True, stable=True).tolist()                    # the worst first
        asked = [q for q in order if ranked[way].ranks[q] >= 0]
        sample = np.random.default_rng(0).permutation(asked)[:SAMPLE].tolist()
        worst = [q for q in asked[:SAMPLE] if ranked[way].ranks[q] > 0]
        hint = ("The five best answers with their cosine similarity. Right answers are framed; "
                "when none is among the five, the best-placed right one follows.")
        for name, chosen in ((f"a random sample of {len(sample)} queries", sample), ("the worst misses", worst)):
            parts += section(f"{WAYS[way]}: {name}{whose}", chosen, hint)
            parts += [draw(split, captions_of_image, q, *answers(queries[q], candidates, ranked[way].correct[q])) for q in chosen]
    write_page(path, title, parts)


def answers(query, candidates, correct):
    """What is shown of one query: the best candidates, and the best-placed right one where it is not among them.

    query (D,), candidates (C, D), correct: candidate indices -> [(place, candidate, similarity, whether right), …], and the place
    of the first right one. Places count from 0.
    """
    similarity, order = (candidates @ query).cpu().sort(descending=True, stable=True)
    order, right = order.tolist(), set(correct)
    first = next(place for place, c in enumerate(order) if c in right)
    places = [*range(min(BEST, len(order)))] + [first] * (first >= BEST)
    return [(place, order[place], similarity[place].item(), order[place] in right) for place in places], first


def caption_asks(split, captions_of_image, t, best, right_place):
    """A caption and the images it found, each with the first of its own captions."""
    cards = []
    for place, i, similarity, right in best:
        own = split.texts[captions_of_image[i][0]] if captions_of_image[i] else ""
        score = f"<b>{similarity:.3f}{' ✓' * right}</b>" + f" place {place + 1:,}" * (place >= BEST)
        lines = [score, f'<span lang="zh" title="{text(split.image_ids[i])}">{text(own)}</span>']
        cards.append(card(lambda: split.image(i), lines, right, later=place >= BEST))
    caption = f'<span lang="zh">{text(split.texts[t])}</span><small>right at place {right_place + 1:,}</small>'
    return f'<figure class="ask"><figcaption>{caption}</figcaption><div class="cards">{"".join(cards)}</div></figure>'


def image_asks(split, captions_of_image, i, best, right_place):
    """A image and the captions it found."""
    items = [answer(f"{similarity:.3f}", split.texts[t], right, place) for place, t, similarity, right in best]
    image = card(lambda: split.image(i), [text(split.image_ids[i]), f"right at place {right_place + 1:,}"])
    return f'<div class="ask pair">{image}<ol>{"".join(items)}</ol></div>'


def point(step, y):
    """A point of a curve; ValueError for one that no chart can hold."""
    if not math.isfinite(y) or not math.isfinite(step):
        raise ValueError("not a number")
    return step, y


def training_curves(records):
    """Charts of the runs that wrote these checkpoints, where their metrics.jsonl lies beside them."""
    pieces = []
    for folder in dict.fromkeys(Path(record["ckpt"]).parent for record in records if Path(record["ckpt"]).is_file()):
        loss, valid = [], {"Text-to-Image R@1": [], "Image-to-Text R@1": [], "mean recall": []}
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            try:
                record = json.loads(line)
                if "average" in record:                                         # of the start and the end: no point of the curve
                    continue
                if "valid" in record:
                    recall, step = record["valid"], record["step"]
                    shown = (recall["text_to_image"]["R@1"], recall["image_to_text"]["R@1"], record["score"])
                    for name, y in zip(valid, shown):
                        valid[name].append(point(step, y))
                elif record["loss"] is not None:
                    loss.append(point(record["step"], record["loss"]))
            # a line that a crash has cut, or that is none of ours
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
        pieces += [chart(f"{folder}: training loss", {"loss": loss}, "step", low=0)] if len(loss) > 1 else []
        pieces += [chart(f"{folder}: recall on the valid split (%)", valid, "step", low=0)] if len(valid["mean recall"]) > 1 else []
    return pieces


# ---------------------------------------------------------------------------------------------------------------- classification


def write_classification(path, title, notes, records, names, read, labels, probabilities):
    """The page of `evaluate.py --classify … --report`: the table, confused classes, a random sample of images and the worst misses.

    names: C texts; labels: I class indices; read(i) -> image i; probabilities(i) -> (C,) of image i by the last checkpoint.
    """
    last, whose = records[-1], f" ({text(records[-1]['ckpt'])})" if len(records) > 1 else ""
    rows = []
    for r in records:
        low, high = r["top-1_interval"]
        top_1 = f"{r['top-1']:.1f} <small>±{(high - low) / 2:.1f}</small>"
        rows.append((text(f"> {r['model']} ({r['ckpt']})"), top_1, f"{r['top-5']:.1f}", f"{r['mean_per_class']:.1f}"))
    head = ["<th>model</th>" + "".join(f'<th class="n">{name}</th>' for name in ("top-1", "top-5", "mean per class"))]
    parts = [html_table(head, rows, [True] * len(rows)), *paragraphs(notes)]

    zh = lambda name: f'<span lang="zh">{text(name)}</span>'
    if last["confused"]:
        rows = [(zh(c["class"]), zh(c["taken_for"]), f"{c['times']:,} of {c['of']:,}") for c in last["confused"]]
        head = ['<th>class</th><th>taken for</th><th class="n">images</th>']
        parts += [f"<h2>Most often confused{whose}: at most 20 pairs</h2>", html_table(head, rows, [False] * len(rows))]
    weakest = sorted(last["per_class"], key=lambda c: c["top-1"])[:20]
    rows = [(zh(c["class"]), f"{c['top-1']:.1f}", f"{c['images']:,}") for c in weakest]
    head = ['<th>class</th><th class="n">top-1</th><th class="n">images</th>']
    parts += [f"<h2>Classes recognised least{whose}: at most 20</h2>", html_table(head, rows, [False] * len(rows))]

    of_right = torch.tensor([probabilities(i)[label].item() for i, label in enumerate(labels)])     # (I,)
    sample = np.random.default_rng(0).permutation(len(labels))[:SAMPLE].tolist()
    worst = [i for i in of_right.argsort(stable=True)[:SAMPLE].tolist() if probabilities(i).argmax() != labels[i]]
    hint = "The five most probable classes; the right one is framed, and follows when it is not among them."
    for name, chosen in ((f"A random sample of {len(sample)} images", sample),
                         ("The worst misses: least probability for the right class", worst)):
        parts += section(f"{name}{whose}", chosen, hint)
        for i in chosen:
            p, order = probabilities(i).sort(descending=True, stable=True)
            right = order.tolist().index(labels[i])
            places = [*range(min(BEST, len(names)))] + [right] * (right >= BEST)
            items = [answer(f"{100 * p[place]:.1f} %", names[order[place]], place == right, place) for place in places]
            image = card(lambda: read(i), [zh(names[labels[i]]), text(Path(last["predictions"][i]["image"]).name)])
            parts.append(f'<div class="ask pair">{image}<ol>{"".join(items)}</ol></div>')
    write_page(path, title, [*parts, *charts(training_curves(records))])


# ---------------------------------------------------------------------------------------------------------------- search


def write_sheet(path, query, note, found, read, link, asked=None):
    """The contact sheet of a search.

    found: [(file, similarity), …], best first; read(file) -> image, or raises BadInput; link(file) -> its address;
    asked: the image that was the query.
    """
    cards = [card(lambda: asked, ["<b>the query</b>"], right=True, side=256)] if asked else []
    for place, (file, similarity) in enumerate(found, 1):
        lines = [f"<b>{place}.</b> {similarity:.3f}", f'<a href="{html.escape(link(file))}">{text(file)}</a>']
        cards.append(card(lambda: read(file), lines, side=256))
    write_page(path, query, [*paragraphs([note]), f'<div class="cards sheet">{"".join(cards)}</div>'])
