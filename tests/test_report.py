"""The HTML pages: nothing of the data becomes markup, nothing comes from elsewhere, and the figures are those that were measured."""
import html.parser
import json
import re

import pytest
import torch
from conftest import png, write_tsv_split

import checkpoint
import evaluate
from model import CLIP, CONFIGS
from support import report

ATTACK = '<script>alert("1")</script> & \'<img src=x onerror=alert(2)>'


class Reader(html.parser.HTMLParser):
    """All tags of a page, in order; fails when one is not closed where it should be. `framed`: the text of each right answer."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.framed = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "line"):
            self.open.append((tag, "right" in (dict(attributes).get("class") or "").split()))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        opened, right = self.open.pop()
        assert opened == tag, (opened, tag)

    def handle_data(self, words):
        self.words.append(words)
        if any(right for _, right in self.open):
            self.framed.append(words)


@pytest.fixture
def page(called, tmp_path):
    """The report of an untrained model on 40 noise images; caption 3 would be markup, and so would the folder's name."""
    folder = tmp_path / "<b>数据&"
    write_tsv_split(folder, "test", images=40, captions_per_image=2)
    lines = (folder / "test_texts.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.dumps(json.loads(line) | {"text": ATTACK + f" {n}"}) for n, line in enumerate(lines)]
    (folder / "test_texts.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    checkpoint.save(run / "best.pt", CLIP(CONFIGS["tiny"]))
    recall = {"text_to_image": {"R@1": 1.0}, "image_to_text": {"R@1": 2.0}}
    metrics = [{"step": 0, "valid": recall, "score": 1.5}, {"step": 10, "loss": 3.5, "lr": 1}, {"step": 15, "loss": 3.0}, {"step": 20, "loss": None}, {"step": 20, "valid": recall, "score": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics) + '{"step": 30, "lo')
    called(evaluate, "--ckpt", run / "best.pt", "--data", folder, "--workers", 0, "--precision", "fp32", "--report", tmp_path / "out.html", "--json", tmp_path / "out.json")
    return (tmp_path / "out.html").read_text(encoding="utf-8"), json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"][0]


def test_report_is_whole_escaped_and_self_contained(page):
    text, _ = page
    reader = Reader(text)
    assert {tag for tag, _ in reader.tags} <= {"html", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "small", "figure", "figcaption",
                                               "svg", "line", "text", "polyline", "span", "bdi", "i", "img", "b", "br", "ol", "li"}
    assert not any(name.startswith("on") or name == "href" for _, attributes in reader.tags for name in attributes)
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for tag, attributes in reader.tags if tag == "img")
    assert not re.search(r"https?:|url\(|@import|\bsrc=[^\"]", re.sub(r"&lt;.*?&gt;", "", text))
    assert not re.search(r"\bnan\b", text) and any(ATTACK in words for words in reader.words) and "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_report_shows_what_was_measured(page):
    text, record = page
    reader = Reader(text)
    words = " ".join(reader.words)
    for way in ("text_to_image", "image_to_text"):
        assert f"{record[way]['R@1']:.1f}" in words and f"{record[way]['MR']:.1f}" in words
    assert "run: training loss" in words and "run: recall on the valid split" in words
    asked = [t for t, a in reader.tags if t == "figure" and a.get("class") == "query"]
    assert len(asked) == 16 and len([1 for t, a in reader.tags if a.get("class") == "query pair"]) == 16
    right = [a for _, a in reader.tags if "right" in (a.get("class") or "").split()]
    assert len(right) >= 32                                                     # every query shows one right answer at least
    assert len(text) < 5e6


def test_largest_page_is_under_5_megabytes(monkeypatch, tmp_path):
    """Every image that a page can show, as noise, which compresses least, and every text at its longest."""
    import io

    from PIL import Image
    image = Image.open(io.BytesIO(png(size=(600, 600), seed=0)))
    most = 2 * report.SAMPLE * (report.BEST + 1) + 2 * report.SAMPLE            # text-to-image: each with five and the right one; image-to-text: one each
    assert most * (len(report.card(image, [])) + 6 * 3 * report.LONGEST) + 4 * 2 * report.SAMPLE * report.LONGEST * 18 < 4e6


def test_notes_hold_no_markup_and_no_control_characters():
    assert report.paragraphs(["猫 taken for <b>\x1b[31m\u202e"]) == ['<p class="soft">猫 taken for &lt;b&gt;\\x1b[31m\\u202e</p>']


def test_top_candidates_are_five_and_the_best_correct_one():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3])
    found = report.top_candidates(scores, [7, 6])
    assert [(f.rank, f.candidate, f.is_correct) for f in found] == [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, False), (4, 4, False), (6, 6, True)]
    assert [report.score_of(f) for f in found[-2:]] == ["<b>0.600</b>", "<b>0.400 ✓ rank 7</b>"]
    assert [f.candidate for f in report.top_candidates(scores, [1, 7])] == [0, 1, 2, 3, 4]


def test_chart_puts_points_where_they_belong():
    drawn = report.chart("t", {"a": [(0, 0), (5, 50), (10, 100)]}, "x", high=100)
    points = [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', drawn)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and y2 < y0         # SVG counts downwards
    assert re.findall(r'text-anchor="end">([^<]+)<', drawn) == ["0", "20", "40", "60", "80", "100"]
    assert "<polyline" in report.chart("t", {"one point": [(3, 7)]}, "step")


@pytest.mark.parametrize("low, high, expected", [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1596, [0, 500, 1000, 1500]), (2.2, 5.6, [3, 4, 5])])
def test_ticks_are_round(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)
