"""Painted landscapes: the sets `landscapes`, `english-landscapes` and `poems`, see SETS.

A scene is a frozenset of elements, the things that a landscape can show. landscapes.json has
    elements     row, places and names (for captions), english, and what paints it: methods of
                 Brush with their arguments
    on_water     where one of these is, there is water
    rivals       of these a scene has at most one
    lights       elements -> the sky above, at the horizon, and what darkens the land; the first
                 row counts that has an element of the scene
poems.tsv has lines of classical verse, and the elements that each speaks of.
"""
import csv
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from support.captions import hashed_split
from support.painter import THINGS, Painted, outline, polygon, turned
from support.tables import TABLE_1

HERE = Path(__file__).parent
TABLES = json.loads((HERE / "landscapes.json").read_text(encoding="utf-8"))
ELEMENTS = TABLES["elements"]


class Brush:
    """Paints elements; x is the middle of one, s its scale.

    The image has 256 x 256 points, x to the right, y downwards: far land ends at y = 152, water
    lies from 168 to 228, trees stand at 240.
    """

    def __init__(self, image, rng):
        self.draw = ImageDraw.Draw(image, "RGBA")           # a colour's fourth number: opacity
        self.rng, self.uniform = rng, rng.uniform

    def polygon(self, x, y, s, fill, points):
        polygon(self.draw, x, y, s, fill, points)

    def dot(self, x, y, rx, ry, fill):
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def shade(self, colour, most=12):
        """A colour like this one: each channel up to `most` lighter or darker."""
        return tuple(min(255, c + self.rng.randint(-most, most)) for c in colour)

    def stamp(self, x, s, y, smallest, at, shapes):
        """Polygons, once or several times, looking left or right; shapes: (colour, shape)."""
        s, y, side = max(s, smallest), y + self.uniform(-4, 4), self.rng.choice([-1, 1])
        for dx, dy in at:
            for colour, shape in shapes:
                points = [(side * u, v) for u, v in outline(shape)]
                self.polygon(x + side * s * dx, y + s * dy, s, self.shade(colour, 5), points)

    def scatter(self, x, s, shapes, n=1, step=0, across=None, top=0, down=None, size=None):
        """n copies at random places; shapes: (colour, how far it varies, shape)."""
        for k in range(n):
            u = step * k + self.uniform(*across) if across else x
            v = top + self.uniform(*down) if down else top
            r = self.uniform(*size) if size else 1
            fill = ()
            for colour, most, shape in shapes:
                if most is None:                                # it is added to the last one
                    fill = tuple(a + b for a, b in zip(fill, colour))
                else:
                    fill = self.shade(colour, most) if most else tuple(colour)
                if "dot" in shape:
                    dx, dy, rx, ry = shape["dot"]
                    self.dot(u + dx, v + dy, rx, ry, fill)
                elif "line" in shape:
                    ends = [(u + dx, v + dy) for dx, dy in shape["line"]]
                    self.draw.line(ends, fill=fill, width=shape["width"])
                else:
                    self.polygon(u, v, r, fill, shape)

    def crown(self, x, y, rx, ry, n, radius, colour):
        """n leaves or blossoms, evenly over an ellipse."""
        for _ in range(n):
            angle, out = self.uniform(0, 2 * math.pi), math.sqrt(self.rng.random())
            u, v = x + rx * out * math.cos(angle), y + ry * out * math.sin(angle)
            self.dot(u, v, radius, radius, self.shade(colour, 22))

    def branches(self, x, y, length, angle, width, colour):
        """A bare tree that forks -> the ends of its twigs."""
        end = x + length * math.sin(angle), y - length * math.cos(angle)
        self.draw.line([(x, y), end], fill=colour, width=round(width))
        if length < 14:
            return [end]
        tips = []
        for turn in (-0.5, 0.45):
            shorter = length * self.uniform(0.62, 0.76)
            bent = angle + turn + self.uniform(-0.2, 0.2)
            tips += self.branches(*end, shorter, bent, max(2, width * 0.62), colour)
        return tips

    def mountains(self, x, s, colour, snow=None, edge=()):
        """Two pale ones behind a higher one; with `snow`, in this colour above a zigzag edge."""
        behind = [(-0.5, self.uniform(55, 75), 40), (0.5, self.uniform(50, 70), 25)]
        for dx, height, pale in (*behind, (self.uniform(-0.12, 0.12), self.uniform(76, 88), 0)):
            middle, half, top = x + 125 * s * dx, 85 * s, 152 - height * (0.4 + 0.6 * s)
            fill = tuple(min(255, c + pale) for c in self.shade(colour, 8))
            left, right = (-half * 0.22, 0.8 * top + 30), (half * 0.2, 0.78 * top + 33)
            self.polygon(middle, 0, 1, fill, [
                (-half, 152), (-half * 0.5, 0.45 * top + 84), left, (0, top), right,
                (half * 0.55, 0.4 * top + 91), (half, 152)])
            if snow:
                foot = top + 0.5 * (152 - top)
                zigzag = [(half * u, foot + v) for u, v in edge]
                self.polygon(middle, 0, 1, snow, [(0, top), right, *zigzag, left])

    def dunes(self, x, s, crests):
        for y, colour in crests:
            phase, steep = self.uniform(0, 6), self.uniform(0.018, 0.028)
            crest = [(u, y + 11 * abs(math.sin(steep * u + phase)) - 14) for u in range(0, 264, 8)]
            self.draw.polygon([(0, 256), *crest, (256, 256)], fill=self.shade(colour, 6))
            self.draw.line(crest, fill=(186, 140, 72), width=2)

    def water(self, x, s):
        colour = self.shade((112, 168, 198), 10)
        bank = [(u, 228 + 5 * math.sin(0.03 * u + self.uniform(0, 0.3)))
                for u in range(256, -8, -8)]
        self.draw.polygon([(0, 168), (256, 168), *bank], fill=colour)
        for y in range(176, 224, 9):
            for _ in range(3):
                u, length = self.uniform(-10, 240), self.uniform(18, 44)
                wave = [(u, y), (u + length / 3, y - 2), (u + length * 2 / 3, y + 1),
                        (u + length, y - 1)]
                self.draw.line(wave, fill=(205, 229, 238), width=2)

    def pine(self, x, s):
        lean = self.uniform(-16, 16)
        self.polygon(x, 238, s, (88, 62, 45), [(-6, 0), (lean - 3, -130), (lean + 3, -130), (7, 0)])
        for k, (width, y) in enumerate(((44, -62), (50, -84), (38, -106), (26, -126), (13, -142))):
            side = self.uniform(4, 12) * (-1) ** k
            middle = x + s * (side + lean * -y / 130)
            needles = [(-width, 9), (-width * 0.6, -5), (0, -12), (width * 0.6, -5), (width, 9),
                       (0, 5)]
            self.polygon(middle, 238 + s * y, s, self.shade((32, 84, 62), 8), needles)

    def willow(self, x, s):
        self.polygon(x, 238, s, (96, 76, 52), [(-7, 0), (-4, -80), (5, -80), (8, 0)])
        self.crown(x, 238 - 112 * s, 36 * s, 22 * s, 26, 12 * s, (132, 178, 78))
        for k in range(21):
            u = (k - 10) * 5.2
            top, length = -124 + 0.02 * u * u, self.uniform(66, 96)
            bends = (0.7, 0), (1, 26), (1.12, length)
            twig = [(x + s * u * out, 238 + s * (top + down)) for out, down in bends]
            self.draw.line(twig, fill=self.shade((122, 170, 66), 18), width=2)

    def plum(self, x, s):
        for u, v in self.branches(x, 240, 52 * s, self.uniform(-0.3, 0.3), 9 * s, (52, 42, 42)):
            if self.rng.random() < 0.75:
                self.dot(u, v, 5, 5, self.shade((205, 25, 60), 14))
                self.dot(u, v, 1.5, 1.5, (250, 220, 120))

    def leafy(self, x, s, colour):
        self.branches(x, 240, 46 * s, self.uniform(-0.1, 0.1), 9 * s, (86, 62, 50))
        self.crown(x, 240 - 93 * s, 47 * s, 37 * s, 90, 7.5 * s, colour)
        for _ in range(9):
            u, v = x + s * self.uniform(-50, 50), 242 + self.uniform(-8, 8)
            self.dot(u, v, 3.5, 2.5, self.shade(colour, 22))

    def bamboo(self, x, s):
        for dx in (-36, -18, 0, 17, 35):
            height, lean = self.uniform(125, 165), self.uniform(-6, 6)
            colour = self.shade((92, 150, 72), 12)
            for k in range(7):
                stem = [(x + s * (dx + lean * up), 240 - s * height * up)
                        for up in (k / 7, (k + 0.86) / 7)]
                self.draw.line(stem, fill=colour, width=max(3, round(6 * s)))
            for _ in range(9):
                up, side = self.uniform(0.45, 1), self.rng.choice([-1, 1])
                u, v = x + s * (dx + lean * up), 240 - s * height * up
                leaf = [(0, 0), (side * 10, -3), (side * 23, 9), (side * 9, 5)]
                self.polygon(u, v, s, self.shade((48, 112, 56), 14), leaf)

    def crows(self, x, s, wings):
        s, ink = max(s, 0.75), (22, 22, 26)
        angle = self.uniform(-0.15, 0.15)
        tips = sorted(self.branches(x, 240, 52 * s, angle, 11 * s, (74, 62, 54)))
        for u, v in (tips[1], tips[len(tips) // 2], tips[-2]):
            self.dot(u, v - 5, 10, 6, ink)
            self.dot(u + 9, v - 11, 5, 5, ink)
            self.polygon(u, v - 5, 1, ink, wings)

    def smoke(self, x, s):
        sway = self.uniform(0, 6)
        for k in range(37):
            u = x + 0.1 * k * math.sin(0.2 * k + sway) + self.uniform(-0.17, 0.17) * k
            self.dot(u, 178 - 4 * k, 3 + 0.25 * k, 4 + 0.15 * k, self.shade((168, 168, 174), 10))

    def grass(self, x, s):
        for _ in range(230):
            u, v = self.uniform(0, 256), self.uniform(232, 258)
            blade = [(u, v), (u + self.uniform(-6, 6), v - self.uniform(12, 24))]
            self.draw.line(blade, fill=self.shade((92, 158, 58), 26), width=3)

    def new_moon(self, x, s):
        y, angle = self.uniform(30, 36), self.uniform(-0.5, 0.1)
        self.polygon(x, y, 25, (255, 246, 206), turned(THINGS["月亮"]["shapes"][0][1], angle))

    def snow(self, x, s):
        for k in range(110):
            r = self.uniform(2, 4.2)
            u, v = 256 * (k % 11 + self.rng.random()) / 11, 256 * (k // 11 + self.rng.random()) / 10
            self.dot(u, v, r, r, (255, 255, 255))

    def rain(self, x, s):
        slant = self.rng.choice([-1, 1]) * self.uniform(5, 11)
        for k in range(120):
            u = 256 * (k % 12 + self.rng.random()) / 12
            v = 256 * (k // 12 + self.rng.random()) / 10 - 10
            self.draw.line([(u, v), (u + slant, v + 22)], fill=(240, 246, 254, 235), width=3)


# ---- scenes and their captions

# row -> how many elements may share the width of the image there. Rows are painted in this order:
# what shines by night, the birds and the weather come after the evening has darkened the rest.
ROWS = {"far": 2, "ground": 9, "water": 9, "things": 4, "near": 2, "sky": 2, "weather": 9}


def with_water(elements):
    """-> a scene: the elements, and the water that some of them need."""
    scene = frozenset(elements)
    return scene | {"水"} if scene & set(TABLES["on_water"].split()) else scene


def goes_together(scene):
    """Whether a scene can be painted: no rivals, and not too many elements in a row."""
    rows = [ELEMENTS[element]["row"] for element in scene]
    return (all(len(scene & set(rivals.split())) <= 1 for rivals in TABLES["rivals"])
            and all(rows.count(row) <= most for row, most in ROWS.items()))


def random_landscape(rng):
    """A scene of two to five elements."""
    while True:
        scene = with_water(rng.sample(list(ELEMENTS), rng.randint(2, 5)))
        if len(scene) <= 5 and goes_together(scene):
            return scene


def describe_landscape(scene, rng=None):
    """A caption that names every element; with `rng`, in random order and wordings."""
    parts = []
    for element in sorted(scene):
        places, names = ELEMENTS[element]["places"], ELEMENTS[element]["names"]
        place, name = (rng.choice(places), rng.choice(names)) if rng else (places[0], names[0])
        wordings = [f"{place}有{name}", f"{name}在{place}", f"{place}是{name}"]
        parts.append(rng.choice(wordings) if rng else wordings[0])
    if rng:
        rng.shuffle(parts)
    return "，".join(parts)


def describe_in_english(scene, rng=None):
    """A caption that names every element; with `rng`, in random order."""
    names = [ELEMENTS[element]["english"] for element in sorted(scene)]
    if rng:
        rng.shuffle(names)
    return " and ".join(", ".join(names).rsplit(", ", 1))


def split_of_landscape(scene):
    return hashed_split(describe_landscape(scene))


def paint_landscape(scene, rng, size=128):
    """An image of the scene. What its caption does not say is random: places, sizes, shades."""
    above, horizon, tint = next(light for elements, *light in TABLES["lights"]
                                if not elements or scene & set(elements.split()))
    above, y = np.array(above), np.minimum(np.arange(256), 151)[:, None, None]
    sky = np.round(above + (horizon - above) * y / 151)                 # (256, 1, 3)
    image = Image.fromarray(sky.astype(np.uint8).repeat(256, axis=1))
    brush = Brush(image, rng)
    aside = dict(zip(("far", "things"), rng.sample([-40, 40], 2)))
    for row in ROWS:
        if row == "ground":
            earth = brush.shade((238, 242, 246) if "雪" in scene else (206, 206, 164), 6)
            land = [(0, 152), (64, 149), (150, 152), (256, 150), (256, 256), (0, 256)]
            brush.draw.polygon(land, fill=earth)
        if row == "sky":                                    # all land is painted: now it gets dark
            image = ImageChops.multiply(image, Image.new("RGB", image.size, tuple(tint)))
            brush = Brush(image, rng)
        here = [name for name in ELEMENTS if name in scene and ELEMENTS[name]["row"] == row]
        for name, place in zip(here, rng.sample(range(len(here)), len(here))):
            x = 256 * (place + 0.5 + rng.uniform(-0.15, 0.15)) / len(here)
            if len(here) == 1:                              # not in front of what is far
                x += aside.get(row, 0)
            s = (1, 0.88, 0.72, 0.6)[len(here) - 1] * rng.uniform(0.92, 1.08)
            for method, arguments in ELEMENTS[name]["paint"]:
                getattr(brush, method)(x, s, **arguments)
    return image.resize((size, size), Image.BOX)


# ---- poems: two lines of verse

with open(HERE / "poems.tsv", encoding="utf-8", newline="") as f:
    POEMS = list(csv.DictReader(f, delimiter="\t"))         # verse, poet, elements
POET = {row["verse"]: row["poet"] for row in POEMS}
SCENE = {row["verse"]: with_water(row["elements"].split()) for row in POEMS}


def random_poem(rng):
    """Two lines of different poets (a cento) with three to six elements that go together."""
    while True:
        pair = tuple(rng.sample(list(POET), 2))
        scene = scene_of_poem(pair)
        if POET[pair[0]] != POET[pair[1]] and 3 <= len(scene) <= 6 and goes_together(scene):
            return pair


def scene_of_poem(pair):
    """All that the two lines speak of."""
    return SCENE[pair[0]] | SCENE[pair[1]]


def poem_caption(pair, rng=None):
    """The two lines; `rng` changes nothing."""
    return "，".join(pair)


def split_of_poem(pair):
    """In either order. Lines of test poems stand in train too, with other partners."""
    return hashed_split("，".join(sorted(pair)), 4)


SIZES = {"train": 2000, "valid": 300, "test": 500}
SETS = {
    "landscapes": Painted(SIZES, random_landscape, frozenset, describe_landscape, paint_landscape,
                          split_of_landscape),
    "english-landscapes": Painted(SIZES | {"train": 4000}, random_landscape, frozenset,
                                  describe_in_english, paint_landscape, split_of_landscape),
    "poems": Painted(TABLE_1["ap-id"], random_poem, scene_of_poem, poem_caption, paint_landscape,
                     split_of_poem),
}
