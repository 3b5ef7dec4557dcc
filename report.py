"""Pages for a browser: what an evaluation found, with pictures to look at; and the contact sheet of a search. Each is one file that needs nothing else, neither network nor scripts.

    python evaluate.py --ckpt runs/own/best.pt --data /path/to/folder --report report.html
    python search.py --ckpt runs/own/best.pt --images /path/to/folder "海边的日落" --html found.html

Whatever comes from the data is escaped: a caption <script> stays text. Curves are inline SVG. A page follows the browser's light or dark mode, and takes its fonts from the system.
"""
import base64
import html
import io
import json
import math
from pathlib import Path

import numpy as np
import torch

import data

SAMPLE, BEST = 8, 5                                                             # queries shown of each kind; candidates shown of each query
LONGEST = 160                                                                   # characters shown of a text
WAYS = {"text_to_image": "Text-to-Image", "image_to_text": "Image-to-Text"}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --soft: #646c77; --line: #d9dee4; --band: #f4f6f8; --right: #15803d; --c0: #1d5fbf; --c1: #c2570c; --c2: #15803d; --c3: #8a3ffc; --c4: #b3261e; --c5: #5b6470; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ed; --soft: #9aa4b0; --line: #343b44; --band: #1d2228; --right: #4ade80; --c0: #6ea8ff; --c1: #ffa25c; --c2: #4ade80; --c3: #c4a1ff; --c4: #ff8a80; --c5: #b4bcc6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; } p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .875rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } td, th { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.n, th.n { text-align: right; } thead th { color: var(--soft); font-weight: 600; font-size: .875rem; } thead th[colspan] { text-align: center; } tr.measured td { background: var(--band); font-weight: 600; } td small { color: var(--soft); font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem; } .charts figure { margin: .5rem 0; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2.25; stroke-linejoin: round; } .key { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; font-size: .875rem; color: var(--soft); }
.key i { display: inline-block; width: 1.4em; border-top: 3px solid; margin-right: .4em; vertical-align: middle; }
.ask { margin: 0; padding: .9rem 0; border-bottom: 1px solid var(--line); } .ask > figcaption { font-weight: 600; margin-bottom: .5rem; } .ask > figcaption small { font-weight: 400; color: var(--soft); margin-left: .5em; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; } .card { margin: 0; width: 8.25rem; padding: .3rem; border: 3px solid transparent; border-radius: 6px; font-size: .8125rem; line-height: 1.35; color: var(--soft); }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--band); border-radius: 3px; margin-bottom: .25rem; } .card a { color: inherit; } .card b { color: var(--ink); font-weight: 600; } .right { border-color: var(--right); } .right b { color: var(--right); }

.sheet .card { width: 13rem; } .later { position: relative; margin-left: 1.1rem; } .later::before { content: "…"; position: absolute; left: -1.35rem; top: 3.2rem; font-size: 1.3rem; color: var(--soft); }
.pair { display: grid; grid-template-columns: 8.25rem 1fr; gap: 1rem; align-items: start; } .pair ol { margin: 0; padding: 0; list-style: none; } .pair li { display: flex; gap: .75rem; padding: .15rem .5rem; border: 2px solid transparent; border-radius: 6px; }
.pair li.right { border-color: var(--right); } .pair li b { flex: none; min-width: 3.4rem; font-weight: 600; font-variant-numeric: tabular-nums; } .pair li span { flex: 1; } .pair li small { color: var(--soft); }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } table { font-size: .8125rem; } td, th { padding: .25rem .35rem; } td:nth-child(2) { white-space: normal; min-width: 9rem; } .card { width: calc(33.3% - .45rem); }
 .pair { grid-template-columns: 5.5rem 1fr; } .pair .card { width: 100%; } .later { margin-left: 0; } .later::before { content: none; } }
"""


# ---------------------------------------------------------------------------------------------------------------- parts of a page


def text(x):
    """Any text as HTML, cut to a length that a page can bear."""
    x = str(x).encode(errors="backslashreplace").decode()                       # a file's name need not be text
    return html.escape(x if len(x) <= LONGEST else x[:LONGEST] + "…")


def write_page(path, title, parts):
    """Write a page, whole or not at all. `parts`: pieces of HTML."""
    page = ["<!doctype html>", '<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">', f"<title>{text(title)}</title><style>{STYLE}</style>",
            f"<body><h1>{text(title)}</h1>", *parts, "</body></html>"]
    data.write_text(path, "\n".join(page) + "\n")


def thumbnail(picture, side=176):
    """A PIL picture as the address of an <img>: a JPEG inside the page."""
    picture = picture.copy()
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def card(source, lines, right=False, later=False):
    """A picture with lines of HTML under it; framed when it is a right answer, after a gap when it came later than its neighbour."""
    names = "card" + " right" * right + " later" * later
    return f'<figure class="{names}"><img src="{source}" alt=""><figcaption>{"<br>".join(lines)}</figcaption></figure>'


def html_table(head, rows, measured):
    """head: rows of HTML cells; rows: tuples of texts, numbers already formatted, of which `measured` ones stand out; a cell that begins with a digit is set to the right."""
    cell = lambda x: f'<td class="n">{x}</td>' if x[:1].isdigit() else f"<td>{x}</td>"
    body = "".join(f'<tr{" class=measured" * is_ours}>{"".join(map(cell, row))}</tr>' for row, is_ours in zip(rows, measured))
    return f'<div class="wide"><table><thead>{"".join(f"<tr>{row}</tr>" for row in head)}</thead><tbody>{body}</tbody></table></div>'


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= 5)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, lines, x_name, log_x=False, low=None, high=None):
    """A line chart. lines: {name: [(x, y), …]}; low, high: the ends of the y axis (default: those of the data)."""
    lines = {name: points[:: max(1, len(points) // 400)] for name, points in lines.items() if points}
    xs, ys = zip(*(point for points in lines.values() for point in points))
    x0, x1, low, high = min(xs), max(xs), min(ys) if low is None else low, max(ys) if high is None else high
    x1, high = (x1 if x1 > x0 else x0 + 1), (high if high > low else low + 1)
    scale = math.log if log_x else float
    W, H, left, bottom = 560, 300, 46, 40
    at = lambda x, y: (left + (scale(x) - scale(x0)) / (scale(x1) - scale(x0)) * (W - left - 14), H - bottom - (y - low) / (high - low) * (H - bottom - 10))
    out = []
    for y in ticks(low, high):
        _, v = at(x0, y)
        out.append(f'<line class="grid" x1="{left}" x2="{W - 14}" y1="{v:.1f}" y2="{v:.1f}"/><text x="{left - 7}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in [k for k in (1, 2, 5, 10, 20, 50, 100) if x0 <= k <= x1] if log_x else ticks(x0, x1):
        u, _ = at(x, low)
        out.append(f'<text x="{u:.1f}" y="{H - bottom + 18}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(W + left) / 2}" y="{H - 4}" text-anchor="middle">{text(x_name)}</text>')
    keys = []
    for n, (name, points) in enumerate(lines.items()):
        colour, (dash, border) = f"var(--c{n % 6})", ("7 4", "dashed") if n % 2 else ("none", "solid")
        where = " ".join(f"{u:.1f},{v:.1f}" for u, v in (at(*point) for point in points))
        out.append(f'<polyline points="{where}" style="stroke: {colour}; stroke-dasharray: {dash}"><title>{text(name)}</title></polyline>')
        keys.append(f'<span><i style="border-color: {colour}; border-top-style: {border}"></i>{text(name)}</span>')
    return f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {W} {H}" role="img" aria-label="{text(title)}">{"".join(out)}</svg><div class="key">{"".join(keys)}</div></figure>'


def charts(pieces):
    return [f'<div class="charts">{"".join(pieces)}</div>'] if pieces else []


# ---------------------------------------------------------------------------------------------------------------- retrieval


def write_retrieval(path, title, rows, notes, records, ranks, split, embeds, found):
    """The page of `evaluate.py --data … --report`. rows: those of the table; records, ranks: one for each checkpoint; embeds, found: embeddings and ranks of the last one."""
    figures = []
    for scale, model, setting, recalls, half in rows:
        cells = [text(scale), text(model), text(setting)]
        for way in (0, 1):
            three = recalls[3 * way : 3 * way + 3]
            first, *rest = [f"{x:.1f}" for x in (*three, sum(three) / 3)]
            cells += [first + (f" <small>±{half[way]:.1f}</small>" if half else ""), *rest]
        figures.append(cells)
    head = ['<th colspan="3"></th><th colspan="4">Text-to-Image</th><th colspan="4">Image-to-Text</th>',
            "<th>scale</th><th>model</th><th>setting</th>" + "".join(f'<th class="n">{name}</th>' for name in ("R@1", "R@5", "R@10", "MR") * 2)]
    parts = [html_table(head, figures, [half is not None for *_, half in rows]), *(f'<p class="soft">{text_of_note}</p>' for text_of_note in map(html.escape, notes))]
    curves = {}
    for record, some in zip(records, ranks):
        for way, name in WAYS.items():
            asked = some[way][some[way] >= 0]
            last = min(100, len(split.image_ids) if way == "text_to_image" else len(split.texts))
            curves[f"{name}, {record['ckpt']}" if len(records) > 1 else name] = [(k, 100 * (asked < k).double().mean().item()) for k in range(1, last + 1)]
    parts += ["<h2>Curves</h2>", *charts([chart("Recall@K (%)", curves, "K, the number of answers looked at", log_x=True, low=0, high=100), *training_curves(records)])]

    image_embed, text_embed = embeds
    captions_of = found["image_to_text"][1]
    whose = f" ({text(records[-1]['ckpt'])})" if len(records) > 1 else ""
    shown = [("text_to_image", text_embed, image_embed, lambda *asked: captions_ask(split, captions_of, *asked)), ("image_to_text", image_embed, text_embed, lambda *asked: pictures_ask(split, captions_of, *asked))]
    for way, queries, candidates, draw in shown:
        order = torch.argsort(ranks[-1][way], descending=True, stable=True).tolist()
        asked = [q for q in order if ranks[-1][way][q] >= 0]
        sample = np.random.default_rng(0).permutation(asked)[:SAMPLE].tolist()
        worst = [q for q in asked[:SAMPLE] if ranks[-1][way][q] > 0]
        for name, chosen in ((f"{WAYS[way]}: a random sample of {len(sample)} queries", sample), (f"{WAYS[way]}: the worst misses", worst)):
            parts.append(f"<h2>{name}{whose}</h2>")
            parts.append('<p class="soft">The five best answers with their cosine similarity. Right answers are framed; when none is among the five, the best-placed right one follows.</p>' if chosen else "<p>There are none.</p>")
            parts += [draw(q, *answers(queries[q], candidates, found[way][1][q])) for q in chosen]
    write_page(path, title, parts)


def answers(query, candidates, correct):
    """The best candidates of one query, and the best-placed right one where it is not among them -> [(place, candidate, similarity, whether right)], and the place of the first right one."""
    similarity, order = (candidates @ query).cpu().sort(descending=True, stable=True)
    order, right = order.tolist(), set(correct)
    first = next(place for place, c in enumerate(order) if c in right)
    places = [*range(min(BEST, len(order)))] + [first] * (first >= BEST)
    return [(place, order[place], similarity[place].item(), order[place] in right) for place in places], first


def captions_ask(split, captions_of, t, best, first):
    """A caption and the pictures it found."""
    cards = []
    for place, i, similarity, right in best:
        own = split.texts[captions_of[i][0]] if captions_of[i] else ""
        cards.append(card(thumbnail(split.picture(i)), [f"<b>{similarity:.3f}{' ✓' * right}</b>" + f" place {place + 1:,}" * (place >= BEST), f'<span lang="zh">{text(own)}</span>'], right, later=place >= BEST))
    return f'<figure class="ask"><figcaption><span lang="zh">{text(split.texts[t])}</span><small>right at place {first + 1:,}</small></figcaption><div class="cards">{"".join(cards)}</div></figure>'


def pictures_ask(split, captions_of, i, best, first):
    """A picture and the captions it found."""
    lines = []
    for place, t, similarity, right in best:
        lines.append(f'<li{" class=right" * right}><b>{similarity:.3f}{" ✓" * right}</b><span lang="zh">{text(split.texts[t])}</span>' + f"<small>place {place + 1:,}</small>" * (place >= BEST) + "</li>")
    picture = card(thumbnail(split.picture(i)), [text(split.image_ids[i]), f"right at place {first + 1:,}"])
    return f'<div class="ask pair">{picture}<ol>{"".join(lines)}</ol></div>'


def training_curves(records):
    """Charts of the runs that wrote these checkpoints, where their metrics.jsonl lies beside them."""
    pieces = []
    for folder in dict.fromkeys(Path(record["ckpt"]).parent for record in records):
        loss, valid = [], {"Text-to-Image R@1": [], "Image-to-Text R@1": [], "mean recall": []}
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            try:
                record = json.loads(line)
                if "valid" in record:
                    for name, y in zip(valid, (record["valid"]["text_to_image"]["R@1"], record["valid"]["image_to_text"]["R@1"], record["score"])):
                        valid[name].append((record["step"], float(y)))
                elif record["loss"] is not None:
                    loss.append((record["step"], float(record["loss"])))
            except (ValueError, KeyError, TypeError):                           # a line that a crash has cut
                continue
        pieces += [chart(f"{folder}: training loss", {"loss": loss}, "step", low=0)] if loss else []
        pieces += [chart(f"{folder}: recall on the valid split (%)", valid, "step", low=0)] if valid["mean recall"] else []
    return pieces


# ---------------------------------------------------------------------------------------------------------------- classification


def write_classification(path, title, records, names, read, labels, image_embed, class_embed, scale):
    """The page of `evaluate.py --classify … --report`; pictures and probabilities are those of the last checkpoint."""
    head = ["<th>model</th>" + "".join(f'<th class="n">{name}</th>' for name in ("top-1", "top-5", "mean per class"))]
    rows = [(text(f"{r['model']} ({r['ckpt']})"), f"{r['top-1']:.1f} <small>±{(r['top-1_interval'][1] - r['top-1_interval'][0]) / 2:.1f}</small>", f"{r['top-5']:.1f}", f"{r['mean_per_class']:.1f}") for r in records]
    last = records[-1]
    parts = [html_table(head, rows, [True] * len(rows)), f'<p class="soft">{last["pictures"]:,} pictures, {last["classes"]:,} classes, towers in {last["precision"]}. Guessing gives top-1 of {last["chance_top-1"]:.1f}. '
             "±: half of the interval that holds 95 % of the top-1 when the pictures are resampled (bootstrap, 1,000 draws).</p>", *charts(training_curves(records))]
    if last["confused"]:
        rows = [(f'<span lang="zh">{text(c["class"])}</span>', f'<span lang="zh">{text(c["taken_for"])}</span>', f"{c['times']:,} of {c['of']:,}") for c in last["confused"]]
        parts += ["<h2>Most often confused</h2>", html_table(['<th>class</th><th>taken for</th><th class="n">pictures</th>'], rows, [False] * len(rows))]
    weakest = sorted(last["per_class"], key=lambda c: c["top-1"])[:20]
    rows = [(f'<span lang="zh">{text(c["class"])}</span>', f"{c['top-1']:.1f}", f"{c['pictures']:,}") for c in weakest]
    parts += ["<h2>Classes recognised least</h2>", html_table(['<th>class</th><th class="n">top-1</th><th class="n">pictures</th>'], rows, [False] * len(rows))]

    order = np.random.default_rng(0).permutation(len(labels))
    probabilities = lambda i: (scale * image_embed[i] @ class_embed.T).softmax(dim=0)
    of_right = torch.cat([(scale * some @ class_embed.T).softmax(dim=1) for some in image_embed.split(1024)])[range(len(labels)), labels]
    for name, chosen in ((f"A random sample of {min(SAMPLE, len(labels))} pictures", order[:SAMPLE].tolist()), ("The worst misses: least probability for the right class", of_right.argsort(stable=True)[:SAMPLE].tolist())):
        parts += [f"<h2>{name}</h2>", '<p class="soft">The five most probable classes; the right one is framed, and follows when it is not among them.</p>']
        for i in chosen:
            p, best = probabilities(i).sort(descending=True, stable=True)
            place = best.tolist().index(labels[i])
            lines = [f'<li{" class=right" * (best[k] == labels[i]).item()}><b>{100 * p[k]:.1f} %</b><span lang="zh">{text(names[best[k]])}</span>' + f"<small>place {k + 1:,}</small>" * (k >= BEST) + "</li>"
                     for k in [*range(min(BEST, len(names)))] + [place] * (place >= BEST)]
            parts.append(f'<div class="ask pair">{card(thumbnail(read(i)), [f"<span lang=zh>{text(names[labels[i]])}</span>"])}<ol>{"".join(lines)}</ol></div>')
    write_page(path, f"{title}: zero-shot classification (%)", parts)


# ---------------------------------------------------------------------------------------------------------------- search


def write_sheet(path, query, found, read, link):
    """The contact sheet of a search. found: [(file, similarity), …], best first; read(file) -> picture, or raises BadInput; link(file) -> its address."""
    cards = []
    for place, (file, similarity) in enumerate(found, 1):
        lines = [f"<b>{place}.</b> {similarity:.3f}", f'<a href="{html.escape(link(file))}">{text(file)}</a>']
        try:
            cards.append(card(thumbnail(read(file), 256), lines))
        except data.BadInput as error:                                          # it has gone, or changed, since it was indexed
            cards.append(f'<figure class="card"><figcaption>{"<br>".join([*lines, text(error)])}</figcaption></figure>')
    write_page(path, query, [f'<div class="cards sheet">{"".join(cards)}</div>'])
