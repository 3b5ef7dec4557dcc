"""Painted landscapes: the sets `landscapes`, `english-landscapes` and `poems` (support/painter.py has `demo`).

    write_set("poems", "data/poems")        # a folder: captions.csv and train/0000.png, …

A scene is a frozenset of elements, the things that a landscape can show. landscapes.json has
    elements     row, places and names (for captions), english, and "stamp", polygons that show it
    on_water     where one of these is, there is water
    rivals       of these a scene has at most one
    lights       elements -> the sky above, the sky at the horizon, and what darkens the land, in
                 the first row of which a scene has an element
poems.tsv has lines of classical verse, and the elements that each speaks of.

Images are painted on 256 x 256 points, x to the right, y downwards: far land ends at y = 152,
water lies from 168 to 228, trees stand at 240. An element without a stamp is painted by a
function of DRAWN: (draw, rng, x of its middle, scale s).
"""
import csv
import functools
import json
import math
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from support.painter import THINGS, Painted, outline, polygon, split_of, turned, write_folder
from support.tables import TABLE_1

HERE = Path(__file__).parent
TABLES = json.loads((HERE / "landscapes.json").read_text(encoding="utf-8"))
ELEMENTS = TABLES["elements"]


# ---- how to paint


def dot(draw, x, y, rx, ry, fill):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def shade(rng, colour, most=12):
    """A colour like this one: each channel up to `most` lighter or darker."""
    return tuple(min(255, c + rng.randint(-most, most)) for c in colour)


def stamp(draw, rng, x, s, y, smallest, at, shapes):
    """Paint an element of polygons, once or several times, looking to the left or to the right."""
    s, y, side = max(s, smallest), y + rng.uniform(-4, 4), rng.choice([-1, 1])
    for dx, dy in at:
        for colour, shape in shapes:
            points = [(side * u, v) for u, v in outline(shape)]
            polygon(draw, x + side * s * dx, y + s * dy, s, shade(rng, colour, 5), points)


def crown(draw, rng, x, y, rx, ry, n, radius, colour):
    """n leaves or blossoms, evenly over an ellipse."""
    for _ in range(n):
        angle, out = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
        u, v = x + rx * out * math.cos(angle), y + ry * out * math.sin(angle)
        dot(draw, u, v, radius, radius, shade(rng, colour, 22))


def branches(draw, rng, x, y, length, angle, width, colour):
    """A bare tree that forks -> the ends of its twigs."""
    end = x + length * math.sin(angle), y - length * math.cos(angle)
    draw.line([(x, y), end], fill=colour, width=round(width))
    if length < 14:
        return [end]
    tips = []
    for turn in (-0.5, 0.45):
        shorter, bent = length * rng.uniform(0.62, 0.76), angle + turn + rng.uniform(-0.2, 0.2)
        tips += branches(draw, rng, *end, shorter, bent, max(2, width * 0.62), colour)
    return tips


# ---- the elements that are no stamps


def mountains(draw, rng, x, s, colour, snow=None):
    """Two pale ones behind a higher one; with `snow`, their upper halves in this colour."""
    behind = [(-0.5, rng.uniform(55, 75), 40), (0.5, rng.uniform(50, 70), 25)]
    for dx, height, pale in (*behind, (rng.uniform(-0.12, 0.12), rng.uniform(76, 88), 0)):
        middle, half, top = x + 125 * s * dx, 85 * s, 152 - height * (0.4 + 0.6 * s)
        fill = tuple(min(255, c + pale) for c in shade(rng, colour, 8))
        left, peak, right = (-half * 0.22, 0.8 * top + 30), (0, top), (half * 0.2, 0.78 * top + 33)
        polygon(draw, middle, 0, 1, fill, [
            (-half, 152), (-half * 0.5, 0.45 * top + 84), left, peak, right,
            (half * 0.55, 0.4 * top + 91), (half, 152)])
        if snow:
            foot = top + 0.5 * (152 - top)
            edge = [(0.47, 0), (0.25, -12), (0.08, 6), (-0.12, -12), (-0.3, 4), (-0.45, -4)]
            zigzag = [(half * u, foot + v) for u, v in edge]
            polygon(draw, middle, 0, 1, snow, [peak, right, *zigzag, left])


def setting_sun(draw, rng, x, s):
    dot(draw, x, 138, 42, 42, (255, 150, 90, 90))
    dot(draw, x, 138, 30, 30, shade(rng, (222, 50, 35), 8))


def dunes(draw, rng, x, s):
    draw.polygon([(0, 150), (256, 150), (256, 256), (0, 256)], fill=(226, 190, 120))
    colours = (214, 172, 100), (235, 203, 135), (205, 160, 88), (232, 196, 124)
    for y, colour in zip((150, 172, 200, 222), colours):
        phase, steep = rng.uniform(0, 6), rng.uniform(0.018, 0.028)
        crest = [(u, y + 11 * abs(math.sin(steep * u + phase)) - 14) for u in range(0, 264, 8)]
        draw.polygon([(0, 256), *crest, (256, 256)], fill=shade(rng, colour, 6))
        draw.line(crest, fill=(186, 140, 72), width=2)


def water(draw, rng, x, s):
    colour = shade(rng, (112, 168, 198), 10)
    bank = [(u, 228 + 5 * math.sin(0.03 * u + rng.uniform(0, 0.3))) for u in range(256, -8, -8)]
    draw.polygon([(0, 168), (256, 168), *bank], fill=colour)
    for y in range(176, 224, 9):
        for _ in range(3):
            u, length = rng.uniform(-10, 240), rng.uniform(18, 44)
            wave = [(u, y), (u + length / 3, y - 2), (u + length * 2 / 3, y + 1), (u + length, y - 1)]
            draw.line(wave, fill=(205, 229, 238), width=2)


def pine(draw, rng, x, s):
    lean = rng.uniform(-16, 16)
    trunk = [(-6, 0), (lean - 3, -130), (lean + 3, -130), (7, 0)]
    polygon(draw, x, 238, s, (88, 62, 45), trunk)
    for k, (width, y) in enumerate(((44, -62), (50, -84), (38, -106), (26, -126), (13, -142))):
        side = rng.uniform(4, 12) * (-1) ** k
        middle = x + s * (side + lean * -y / 130)
        needles = [(-width, 9), (-width * 0.6, -5), (0, -12), (width * 0.6, -5), (width, 9), (0, 5)]
        polygon(draw, middle, 238 + s * y, s, shade(rng, (32, 84, 62), 8), needles)


def willow(draw, rng, x, s):
    polygon(draw, x, 238, s, (96, 76, 52), [(-7, 0), (-4, -80), (5, -80), (8, 0)])
    crown(draw, rng, x, 238 - 112 * s, 36 * s, 22 * s, 26, 12 * s, (132, 178, 78))
    for k in range(21):
        u = (k - 10) * 5.2
        top, length = -124 + 0.02 * u * u, rng.uniform(66, 96)
        bends = (0.7, 0), (1, 26), (1.12, length)
        twig = [(x + s * u * out, 238 + s * (top + down)) for out, down in bends]
        draw.line(twig, fill=shade(rng, (122, 170, 66), 18), width=2)


def plum(draw, rng, x, s):
    angle = rng.uniform(-0.3, 0.3)
    for u, v in branches(draw, rng, x, 240, 52 * s, angle, 9 * s, (52, 42, 42)):
        if rng.random() < 0.75:
            dot(draw, u, v, 5, 5, shade(rng, (205, 25, 60), 14))
            dot(draw, u, v, 1.5, 1.5, (250, 220, 120))


def leafy(draw, rng, x, s, colour):
    branches(draw, rng, x, 240, 46 * s, rng.uniform(-0.1, 0.1), 9 * s, (86, 62, 50))
    crown(draw, rng, x, 240 - 93 * s, 47 * s, 37 * s, 90, 7.5 * s, colour)
    for _ in range(9):
        u, v = x + s * rng.uniform(-50, 50), 242 + rng.uniform(-8, 8)
        dot(draw, u, v, 3.5, 2.5, shade(rng, colour, 22))


def bamboo(draw, rng, x, s):
    for dx in (-36, -18, 0, 17, 35):
        height, lean = rng.uniform(125, 165), rng.uniform(-6, 6)
        colour = shade(rng, (92, 150, 72), 12)

        def at(up):                                         # 0 at the ground, 1 at the top
            return x + s * (dx + lean * up), 240 - s * height * up

        for k in range(7):
            stem = [at(k / 7), at((k + 0.86) / 7)]
            draw.line(stem, fill=colour, width=max(3, round(6 * s)))
        for _ in range(9):
            up, side = rng.uniform(0.45, 1), rng.choice([-1, 1])
            leaf = [(0, 0), (side * 10, -3), (side * 23, 9), (side * 9, 5)]
            polygon(draw, *at(up), s, shade(rng, (48, 112, 56), 14), leaf)


def crows(draw, rng, x, s):
    s, ink = max(s, 0.75), (22, 22, 26)
    angle = rng.uniform(-0.15, 0.15)
    tips = sorted(branches(draw, rng, x, 240, 52 * s, angle, 11 * s, (74, 62, 54)))
    wings = [(-6, -3), (-21, 7), (-6, 5), (13, -3), (19, -5), (13, -8)]
    for u, v in (tips[1], tips[len(tips) // 2], tips[-2]):
        dot(draw, u, v - 5, 10, 6, ink)
        dot(draw, u + 9, v - 11, 5, 5, ink)
        polygon(draw, u, v - 5, 1, ink, wings)


def smoke(draw, rng, x, s):
    sway = rng.uniform(0, 6)
    for k in range(37):
        u = x + 0.1 * k * math.sin(0.2 * k + sway) + rng.uniform(-0.17, 0.17) * k
        dot(draw, u, 178 - 4 * k, 3 + 0.25 * k, 4 + 0.15 * k, shade(rng, (168, 168, 174), 10))


def lotus(draw, rng, x, s):
    for k in range(10):
        u, v = 26 * k + rng.uniform(-8, 20), rng.uniform(196, 222)
        dot(draw, u, v, 21, 9, shade(rng, (56, 132, 84), 12))
    for k in range(5):
        u, v = 52 * k + rng.uniform(10, 40), rng.uniform(180, 206)
        draw.line([(u, v), (u, v + 20)], fill=(60, 120, 70), width=3)
        for tip in (-15, 15, -8, 8, 0):
            top = -19 + abs(tip) // 2
            petal = [(-4, 2), (tip - 3, -10), (tip, top), (tip + 3, -10), (4, 2)]
            polygon(draw, u, v, 1, shade(rng, (240, 112 + 3 * (15 - abs(tip)), 158), 8), petal)


def grass(draw, rng, x, s):
    for _ in range(230):
        u, v = rng.uniform(0, 256), rng.uniform(232, 258)
        blade = [(u, v), (u + rng.uniform(-6, 6), v - rng.uniform(12, 24))]
        draw.line(blade, fill=shade(rng, (92, 158, 58), 26), width=3)


def chrysanthemums(draw, rng, x, s):
    for k in range(9):
        u, v = 28 * k + rng.uniform(6, 26), rng.uniform(222, 240)
        draw.line([(u, v), (u, 256)], fill=(70, 110, 50), width=3)
        for a in [math.pi * j / 5 for j in range(10)]:
            petal = shade(rng, (246, 190, 22), 9)
            dot(draw, u + 8 * math.cos(a), v + 8 * math.sin(a), 4.5, 4.5, petal)
        dot(draw, u, v, 5, 5, (212, 130, 14))


def stones(draw, rng, x, s):
    whole = [(-1.2, 0.2), (-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (1.1, -0.5), (1.3, 0.2)]
    lit = [(-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (0.1, -0.7), (-0.5, -0.4)]
    for k in range(4):
        u, r = 64 * k + rng.uniform(12, 52), rng.uniform(19, 30)
        grey = shade(rng, (126, 128, 130), 12)
        polygon(draw, u, 250, r, grey, whole)
        polygon(draw, u, 250, r, tuple(c + 40 for c in grey), lit)


def full_moon(draw, rng, x, s):
    y = rng.uniform(30, 36)
    dot(draw, x, y, 33, 33, (255, 246, 200, 50))
    dot(draw, x, y, 24, 24, (255, 246, 206))


def new_moon(draw, rng, x, s):
    y, angle = rng.uniform(30, 36), rng.uniform(-0.5, 0.1)
    (_, crescent), = THINGS["月亮"]["shapes"]
    polygon(draw, x, y, 25, (255, 246, 206), turned(crescent, angle))


def stars(draw, rng, x, s):
    angles = [math.pi * k / 4 for k in range(8)]
    star = [(r * math.sin(a), r * math.cos(a)) for a, r in zip(angles, [1, 0.32] * 4)]
    for k in range(14):
        u, v = (k % 7) * 38 + rng.uniform(2, 30), (k // 7) * 42 + rng.uniform(8, 34)
        polygon(draw, u, v, rng.uniform(5, 8), (255, 250, 225), star)


def fires(draw, rng, x, s):
    for k in range(3):
        u, v = 85 * k + rng.uniform(20, 66), rng.uniform(184, 200)
        dot(draw, u, v, 20, 17, (255, 150, 40, 90))
        polygon(draw, u, v, 1, (40, 30, 28), [(-18, 7), (18, 7), (12, 15), (-12, 15)])
        polygon(draw, u, v, 1, (255, 120, 20), [(-7, 6), (-6, -4), (0, -15), (6, -4), (7, 6)])
        dot(draw, u, v + 1, 4, 5, (255, 240, 150))
        draw.line([(u, v + 18), (u, v + 32)], fill=(255, 150, 40, 150), width=5)


def mist(draw, rng, x, s):
    for y in (112, 136, 160):
        for k in range(9):
            u, v = 32 * k + rng.uniform(-14, 14), y + rng.uniform(-5, 5)
            dot(draw, u, v, 34, 9, (244, 246, 246, 130))


def snow(draw, rng, x, s):
    for k in range(110):
        r = rng.uniform(2, 4.2)
        u, v = 256 * (k % 11 + rng.random()) / 11, 256 * (k // 11 + rng.random()) / 10
        dot(draw, u, v, r, r, (255, 255, 255))


def rain(draw, rng, x, s):
    slant = rng.choice([-1, 1]) * rng.uniform(5, 11)
    for k in range(120):
        u, v = 256 * (k % 12 + rng.random()) / 12, 256 * (k // 12 + rng.random()) / 10 - 10
        draw.line([(u, v), (u + slant, v + 22)], fill=(240, 246, 254, 235), width=3)


DRAWN = {
    "圆月": full_moon, "弯月": new_moon, "星星": stars, "夕阳": setting_sun, "沙漠": dunes, "水": water,
    "烟": smoke, "松树": pine, "柳树": willow, "梅花": plum, "竹子": bamboo, "乌鸦": crows, "荷花": lotus,
    "青草": grass, "菊花": chrysanthemums, "石头": stones, "渔火": fires, "雾": mist, "雪": snow, "雨": rain,
    "青山": functools.partial(mountains, colour=(92, 140, 116)),
    "雪山": functools.partial(mountains, colour=(104, 118, 146), snow=(250, 252, 255)),
    "桃花": functools.partial(leafy, colour=(247, 162, 190)),
    "红枫": functools.partial(leafy, colour=(208, 62, 28)),
}


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
    return split_of(describe_landscape(scene))


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
    draw = ImageDraw.Draw(image, "RGBA")                    # a colour's fourth number: opacity
    aside = dict(zip(("far", "things"), rng.sample([-40, 40], 2)))
    for row in ROWS:
        if row == "ground":
            earth = shade(rng, (238, 242, 246) if "雪" in scene else (206, 206, 164), 6)
            land = [(0, 152), (64, 149), (150, 152), (256, 150), (256, 256), (0, 256)]
            draw.polygon(land, fill=earth)
        if row == "sky":                                    # all land is painted: now it gets dark
            image = ImageChops.multiply(image, Image.new("RGB", image.size, tuple(tint)))
            draw = ImageDraw.Draw(image, "RGBA")
        here = [name for name in ELEMENTS if name in scene and ELEMENTS[name]["row"] == row]
        for name, place in zip(here, rng.sample(range(len(here)), len(here))):
            x = 256 * (place + 0.5 + rng.uniform(-0.15, 0.15)) / len(here)
            if len(here) == 1:                              # not in front of what is far
                x += aside.get(row, 0)
            s = (1, 0.88, 0.72, 0.6)[len(here) - 1] * rng.uniform(0.92, 1.08)
            if name in DRAWN:
                DRAWN[name](draw, rng, x, s)
            else:
                stamp(draw, rng, x, s, **ELEMENTS[name]["stamp"])
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
    return split_of("，".join(sorted(pair)), 4)


SETS = {
    "landscapes": Painted({"train": 2000, "valid": 300, "test": 500}, random_landscape, frozenset,
                          describe_landscape, paint_landscape, split_of_landscape),
    "english-landscapes": Painted({"train": 4000, "valid": 300, "test": 500}, random_landscape,
                                  frozenset, describe_in_english, paint_landscape, split_of_landscape),
    "poems": Painted(TABLE_1["ap-id"], random_poem, scene_of_poem, poem_caption, paint_landscape,
                     split_of_poem),
}


def write_set(name, folder):
    """Paint one of SETS into a folder, once."""
    write_folder(folder, name, SETS[name])
