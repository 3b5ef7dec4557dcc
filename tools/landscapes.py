"""Painted landscapes: the sets `landscapes`, `english-landscapes` and `poems`.

    write_set("poems", "data/poems")        # a folder: captions.csv and train/0000.png, …

A scene is a frozenset of elements, the things that a landscape can show. landscapes.json has
    elements     row, places and names (for captions), english; what paints it: a "stamp" of
                 polygons, or "paint", a method of Brush and its arguments
    on_water     where one of these is, there is water
    rivals       of these a scene has at most one
    lights       elements -> the sky above, the sky at the horizon, and what darkens the land, in
                 the first row of which a scene has an element
poems.tsv has lines of classical verse, and the elements that each speaks of.
"""
import csv
import functools
import json
import math
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from support.captions import hashed_split
from support.painter import THINGS, Painted, outline, polygon, turned, write_folder
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
        """Print the polygons of an element once or several times, looking left or right."""
        s, y, side = max(s, smallest), y + self.uniform(-4, 4), self.rng.choice([-1, 1])
        for dx, dy in at:
            for colour, shape in shapes:
                points = [(side * u, v) for u, v in outline(shape)]
                self.polygon(x + side * s * dx, y + s * dy, s, self.shade(colour, 5), points)

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

    # ---- the elements that have no stamp

    def mountains(self, x, s, colour, snow=None):
        """Two pale ones behind a higher one; with `snow`, their upper halves in this colour."""
        behind = [(-0.5, self.uniform(55, 75), 40), (0.5, self.uniform(50, 70), 25)]
        for dx, height, pale in (*behind, (self.uniform(-0.12, 0.12), self.uniform(76, 88), 0)):
            middle, half, top = x + 125 * s * dx, 85 * s, 152 - height * (0.4 + 0.6 * s)
            fill = tuple(min(255, c + pale) for c in self.shade(colour, 8))
            left, right = (-half * 0.22, 0.8 * top + 30), (half * 0.2, 0.78 * top + 33)
            peak = (0, top)
            self.polygon(middle, 0, 1, fill, [
                (-half, 152), (-half * 0.5, 0.45 * top + 84), left, peak, right,
                (half * 0.55, 0.4 * top + 91), (half, 152)])
            if snow:
                foot = top + 0.5 * (152 - top)
                edge = [(0.47, 0), (0.25, -12), (0.08, 6), (-0.12, -12), (-0.3, 4), (-0.45, -4)]
                zigzag = [(half * u, foot + v) for u, v in edge]
                self.polygon(middle, 0, 1, snow, [peak, right, *zigzag, left])

    def setting_sun(self, x, s):
        self.dot(x, 138, 42, 42, (255, 150, 90, 90))
        self.dot(x, 138, 30, 30, self.shade((222, 50, 35), 8))

    def dunes(self, x, s):
        self.draw.polygon([(0, 150), (256, 150), (256, 256), (0, 256)], fill=(226, 190, 120))
        colours = (214, 172, 100), (235, 203, 135), (205, 160, 88), (232, 196, 124)
        for y, colour in zip((150, 172, 200, 222), colours):
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
                crest, trough = (u + length / 3, y - 2), (u + length * 2 / 3, y + 1)
                wave = [(u, y), crest, trough, (u + length, y - 1)]
                self.draw.line(wave, fill=(205, 229, 238), width=2)

    def pine(self, x, s):
        lean = self.uniform(-16, 16)
        trunk = [(-6, 0), (lean - 3, -130), (lean + 3, -130), (7, 0)]
        self.polygon(x, 238, s, (88, 62, 45), trunk)
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
        angle = self.uniform(-0.3, 0.3)
        for u, v in self.branches(x, 240, 52 * s, angle, 9 * s, (52, 42, 42)):
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

            def at(up):                                         # 0 at the ground, 1 at the top
                return x + s * (dx + lean * up), 240 - s * height * up

            for k in range(7):
                stem = [at(k / 7), at((k + 0.86) / 7)]
                self.draw.line(stem, fill=colour, width=max(3, round(6 * s)))
            for _ in range(9):
                up, side = self.uniform(0.45, 1), self.rng.choice([-1, 1])
                leaf = [(0, 0), (side * 10, -3), (side * 23, 9), (side * 9, 5)]
                self.polygon(*at(up), s, self.shade((48, 112, 56), 14), leaf)

    def crows(self, x, s):
        s, ink = max(s, 0.75), (22, 22, 26)
        angle = self.uniform(-0.15, 0.15)
        tips = sorted(self.branches(x, 240, 52 * s, angle, 11 * s, (74, 62, 54)))
        wings = [(-6, -3), (-21, 7), (-6, 5), (13, -3), (19, -5), (13, -8)]
        for u, v in (tips[1], tips[len(tips) // 2], tips[-2]):
            self.dot(u, v - 5, 10, 6, ink)
            self.dot(u + 9, v - 11, 5, 5, ink)
            self.polygon(u, v - 5, 1, ink, wings)

    def smoke(self, x, s):
        sway = self.uniform(0, 6)
        for k in range(37):
            u = x + 0.1 * k * math.sin(0.2 * k + sway) + self.uniform(-0.17, 0.17) * k
            self.dot(u, 178 - 4 * k, 3 + 0.25 * k, 4 + 0.15 * k, self.shade((168, 168, 174), 10))

    def lotus(self, x, s):
        for k in range(10):
            u, v = 26 * k + self.uniform(-8, 20), self.uniform(196, 222)
            self.dot(u, v, 21, 9, self.shade((56, 132, 84), 12))
        for k in range(5):
            u, v = 52 * k + self.uniform(10, 40), self.uniform(180, 206)
            self.draw.line([(u, v), (u, v + 20)], fill=(60, 120, 70), width=3)
            for tip in (-15, 15, -8, 8, 0):
                top = -19 + abs(tip) // 2
                petal = [(-4, 2), (tip - 3, -10), (tip, top), (tip + 3, -10), (4, 2)]
                self.polygon(u, v, 1, self.shade((240, 112 + 3 * (15 - abs(tip)), 158), 8), petal)

    def grass(self, x, s):
        for _ in range(230):
            u, v = self.uniform(0, 256), self.uniform(232, 258)
            blade = [(u, v), (u + self.uniform(-6, 6), v - self.uniform(12, 24))]
            self.draw.line(blade, fill=self.shade((92, 158, 58), 26), width=3)

    def chrysanthemums(self, x, s):
        for k in range(9):
            u, v = 28 * k + self.uniform(6, 26), self.uniform(222, 240)
            self.draw.line([(u, v), (u, 256)], fill=(70, 110, 50), width=3)
            for a in [math.pi * j / 5 for j in range(10)]:
                petal = self.shade((246, 190, 22), 9)
                self.dot(u + 8 * math.cos(a), v + 8 * math.sin(a), 4.5, 4.5, petal)
            self.dot(u, v, 5, 5, (212, 130, 14))

    def stones(self, x, s):
        whole = [(-1.2, 0.2), (-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (1.1, -0.5), (1.3, 0.2)]
        lit = [(-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (0.1, -0.7), (-0.5, -0.4)]
        for k in range(4):
            u, r = 64 * k + self.uniform(12, 52), self.uniform(19, 30)
            grey = self.shade((126, 128, 130), 12)
            self.polygon(u, 250, r, grey, whole)
            self.polygon(u, 250, r, tuple(c + 40 for c in grey), lit)

    def full_moon(self, x, s):
        y = self.uniform(30, 36)
        self.dot(x, y, 33, 33, (255, 246, 200, 50))
        self.dot(x, y, 24, 24, (255, 246, 206))

    def new_moon(self, x, s):
        y, angle = self.uniform(30, 36), self.uniform(-0.5, 0.1)
        (_, crescent), = THINGS["月亮"]["shapes"]
        self.polygon(x, y, 25, (255, 246, 206), turned(crescent, angle))

    def stars(self, x, s):
        angles = [math.pi * k / 4 for k in range(8)]
        star = [(r * math.sin(a), r * math.cos(a)) for a, r in zip(angles, [1, 0.32] * 4)]
        for k in range(14):
            u, v = (k % 7) * 38 + self.uniform(2, 30), (k // 7) * 42 + self.uniform(8, 34)
            self.polygon(u, v, self.uniform(5, 8), (255, 250, 225), star)

    def fires(self, x, s):
        for k in range(3):
            u, v = 85 * k + self.uniform(20, 66), self.uniform(184, 200)
            self.dot(u, v, 20, 17, (255, 150, 40, 90))
            self.polygon(u, v, 1, (40, 30, 28), [(-18, 7), (18, 7), (12, 15), (-12, 15)])
            self.polygon(u, v, 1, (255, 120, 20), [(-7, 6), (-6, -4), (0, -15), (6, -4), (7, 6)])
            self.dot(u, v + 1, 4, 5, (255, 240, 150))
            self.draw.line([(u, v + 18), (u, v + 32)], fill=(255, 150, 40, 150), width=5)

    def mist(self, x, s):
        for y in (112, 136, 160):
            for k in range(9):
                u, v = 32 * k + self.uniform(-14, 14), y + self.uniform(-5, 5)
                self.dot(u, v, 34, 9, (244, 246, 246, 130))

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

# Elements of a row share the width of the image. Rows are painted in this order: what shines by
# night, the birds and the weather come after the evening has darkened everything else.
ROWS = ("far", "ground", "water", "things", "near", "sky", "weather")


def with_water(elements):
    """-> a scene: the elements, and the water that some of them need."""
    scene = frozenset(elements)
    return scene | {"水"} if scene & set(TABLES["on_water"].split()) else scene


def goes_together(scene):
    """Whether a scene can be painted: no rivals, and not too many elements in a row."""
    rows = [ELEMENTS[element]["row"] for element in scene]
    most = {"things": 4, "sky": 2, "far": 2, "near": 2}
    return (all(len(scene & set(rivals.split())) <= 1 for rivals in TABLES["rivals"])
            and all(rows.count(row) <= n for row, n in most.items()))


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
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def split_of_landscape(scene):
    return hashed_split(describe_landscape(scene))


@functools.cache
def sky(above, horizon):
    """From one colour to another, on 256 x 256 points."""
    column = Image.new("RGB", (1, 256))
    column.putdata([tuple(round(a + (b - a) * min(y, 151) / 151) for a, b in zip(above, horizon))
                    for y in range(256)])
    return column.resize((256, 256), Image.NEAREST)


def paint_landscape(scene, rng, size=128):
    """An image of the scene. What its caption does not say is random: places, sizes, shades."""
    above, horizon, tint = next(light for elements, *light in TABLES["lights"]
                                if not elements or scene & set(elements.split()))
    image = sky(tuple(above), tuple(horizon)).copy()
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
            if "stamp" in ELEMENTS[name]:
                brush.stamp(x, s, **ELEMENTS[name]["stamp"])
            else:
                method, *colours = ELEMENTS[name]["paint"]
                getattr(brush, method)(x, s, *colours)
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


def write_set(name, folder):
    """Paint one of SETS into a folder, once."""
    write_folder(folder, name, SETS[name])
