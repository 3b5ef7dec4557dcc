"""Painted data sets, for a first try without a download.

A scene, the frozenset of what an image shows, is drawn at random, then said in words, then painted.
This file has the scenes of `demo`, coloured things in the quarters of an image; tools/landscapes.py
has those of the other sets. All randomness comes from the random.Random that is passed (`rng`). The
same seed paints the same image for ever, so the order of the calls of `rng` must not change.
"""
import colorsys
import csv
import json
import math
import os
import random
from collections import namedtuple
from pathlib import Path

from PIL import Image, ImageDraw

from support import system
from support.captions import hashed_split
from support.system import BadInput, filled_beside

# What makes a painted set. sizes: {split: number of images}; draw(rng) -> a drawing: a scene, or
# what has one; scene(drawing) -> its scene; describe(drawing, rng or None) -> its caption;
# paint(scene, rng) -> the image; split_of(drawing) -> the split to which it belongs for ever
Painted = namedtuple("Painted", "sizes draw scene describe paint split_of")


def write_folder(folder, name, painted):
    """Paint a data set into a folder, once. Raises BadInput when something else is there."""
    with filled_beside(folder) as part:
        if (folder / "captions.csv").exists():              # of an earlier call, or another process
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{folder}: something else is there; name another folder, or move it")
        size = sum(painted.sizes.values())
        print(f"{folder}: painting {size:,} images, once", flush=True)
        rows = [["image", "caption", "split"]]
        with system.progress(f"{folder}: images painted", size) as progress:
            for split in painted.sizes:
                (part / split).mkdir()
                for i, (scene, caption) in enumerate(random_pairs(name, split, painted)):
                    image = painted.paint(scene, random.Random(f"{name} {split} {i}"))
                    image.save(part / split / f"{i:04}.png", compress_level=1)          # fast
                    rows.append([f"{split}/{i:04}.png", caption, split])
                    progress.update()
        with open(part / "captions.csv", "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows(rows)
        os.replace(part, folder)


def random_pairs(name, split, painted):
    """-> (scene, caption) of each image of a split.

    In `train` no two scenes are equal. In the others no scene contains another one, so each
    caption is true of one image only.
    """
    rng, pairs, seen = random.Random(f"{name} {split}"), [], set()
    while len(pairs) < painted.sizes[split]:
        drawing = painted.draw(rng)
        if painted.split_of(drawing) != split:
            continue
        scene = painted.scene(drawing)
        if split == "train":
            alike = scene in seen
        else:
            alike = any(scene <= other or other <= scene for other in seen)
        if not alike:
            seen.add(scene)
            pairs.append((scene, painted.describe(drawing, rng if split == "train" else None)))
    return pairs


# ---- shapes: lists of points (x, y) in the square -1..1, y downwards


def outline(shape):
    """A shape of a table, its points or {"oval": [x, y, radius, radius]} -> its points."""
    if isinstance(shape, list):
        return shape
    x, y, rx, ry = shape["oval"]
    angles = [2 * math.pi * k / 24 for k in range(25)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def turned(points, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return [(u * cos - v * sin, u * sin + v * cos) for u, v in points]


def polygon(draw, x, y, s, fill, points):
    """Paint a polygon around (x, y), s times as large as its points say."""
    draw.polygon([(x + s * u, y + s * v) for u, v in points], fill=tuple(fill))


# ---- the demo: coloured things in the quarters of an image

# counts: where that many things stand. colours: hue, saturation, value. things: noun -> {"measure":
# its measure word, "shapes": [(fill, shape), …]}; fill null: the thing's colour
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PLACES, COUNTS = TABLES["places"], TABLES["counts"]
COLOURS, THINGS = TABLES["colours"], TABLES["things"]


def random_scene(rng):
    """One to three statements (place, count, colour, thing), in different quarters."""
    places = rng.sample(list(PLACES), rng.choice([1, 2, 2, 3]))
    nouns = [list(COUNTS), list(COLOURS), list(THINGS)]
    return frozenset((place, *map(rng.choice, nouns)) for place in places)


def describe(scene, rng=None):
    """A caption with every statement of the scene; with `rng`, in random order and wordings."""
    parts = []
    for place, count, colour, thing in sorted(scene):
        what = f"{count}{THINGS[thing]['measure']}{colour}的{thing}"
        wordings = [f"{place}有{what}", f"{what}在{place}", f"{place}画着{what}", f"{place}是{what}"]
        parts.append(rng.choice(wordings) if rng else wordings[0])
    if rng:
        rng.shuffle(parts)
    return "，".join(parts)


def paint(scene, rng, size=128):
    """An image of the scene. What the caption does not say is random: exact place, shade, tilt."""
    paper = rng.random(), rng.uniform(0, 0.15), rng.uniform(0.85, 1)
    image = Image.new("RGB", (size, size), rgb(*paper))
    draw = ImageDraw.Draw(image)
    for place, count, colour, thing in sorted(scene):
        hue, saturation, value = COLOURS[colour]
        hue = (hue + rng.uniform(-0.02, 0.02)) % 1
        if saturation:                                      # black stays black
            saturation = min(1, saturation + rng.uniform(-0.08, 0.08))
        own = rgb(hue, saturation, min(1, value + rng.uniform(-0.08, 0.08)))
        middle = [size / 2 + side * size / 4 + rng.uniform(-0.03, 0.03) * size
                  for side in PLACES[place]]
        radius = size * (0.19 if count == "一" else 0.1) * rng.uniform(0.8, 1.1)
        for dx, dy in COUNTS[count]:
            x, y = middle[0] + dx * size * 0.22, middle[1] + dy * size * 0.22
            angle = math.radians(rng.uniform(-12, 12))
            for fill, shape in THINGS[thing]["shapes"]:
                polygon(draw, x, y, radius, fill or own, turned(outline(shape), angle))
    return image


def rgb(*hsv):
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(*hsv))


DEMO = Painted({"train": 4000, "valid": 300, "test": 500}, random_scene, frozenset, describe,
               paint, lambda scene: hashed_split(describe(scene)))
