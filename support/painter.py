"""What the painted data sets show, and what their captions say: pure drawing.

A data set that needs no download is made here: what a image shows is drawn at random first, then said in words, then painted, so a
caption is true of its image. Three kinds: scenes of coloured things in the quarters of a image (`demo`), Chinese landscapes with plain
captions, and landscapes that show what two lines of classical verse speak of (`poems`). Each kind has four functions, which data.py's
table `PAINTED` puts together: random_… draws what a image shows, describe… (or poem_caption) says it, paint… paints it, split_of_… tells
to which split it belongs.

A scene is the frozenset of what a image shows. Whatever is random comes from the random.Random that is passed (`rng`), so the same seed
paints the same image for ever; therefore the order of its calls must not change.

Reading: the first section is the whole idea in a hundred lines. The two sections on landscapes are tables, and one small function for each
thing that is painted: read `paint_landscape` at the end, and of the others as many as you like.
"""
import colorsys
import functools
import hashlib
import math
from typing import Callable, NamedTuple

from PIL import Image, ImageChops, ImageDraw


# ---------------------------------------------------------------------------------------------------------------- coloured things


def _circle(r=1.0, x=0.0, y=0.0, start=0.0, end=2 * math.pi, n=24):
    return [(x + r * math.cos(start + (end - start) * k / n), y + r * math.sin(start + (end - start) * k / n)) for k in range(n + 1)]


def _crescent():
    inner = [(0.45 + 0.85 * math.cos(a), 0.85 * math.sin(a)) for a in (math.pi * (0.42 + 1.16 * k / 16) for k in range(17))]
    return _circle(1.0, 0, 0, math.pi * 0.35, math.pi * 1.65) + inner[::-1]


def _heart():
    t = [2 * math.pi * k / 32 for k in range(32)]
    return [(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16) for a in t]


_STAR = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate([1, 0.42] * 5)]
_BROWN, _YELLOW, _PALE = (110, 75, 45), (250, 215, 70), (250, 250, 250)

# noun -> (measure word, [(fill, polygon), …] in the square -1..1 with y downwards; fill None is the object's own colour)
THINGS = {
    "圆形": ("个", [(None, _circle())]),
    "方块": ("个", [(None, [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])]),
    "三角形": ("个", [(None, [(0, -1), (1, 0.85), (-1, 0.85)])]),
    "十字": ("个", [(None, [(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]), (None, [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)])]),
    "星星": ("颗", [(None, _STAR)]),
    "爱心": ("颗", [(None, _heart())]),
    "月亮": ("弯", [(None, _crescent())]),
    "花": ("朵", [(None, _circle(0.45, 0.55 * math.cos(a), 0.55 * math.sin(a))) for a in (2 * math.pi * k / 5 for k in range(5))] + [(_YELLOW, _circle(0.32))]),
    "树": ("棵", [(_BROWN, [(-0.15, 0.2), (0.15, 0.2), (0.15, 1), (-0.15, 1)]), (None, _circle(0.65, 0, -0.3))]),
    "房子": ("座", [(None, [(-0.75, -0.1), (0.75, -0.1), (0.75, 1), (-0.75, 1)]), (_BROWN, [(0, -1), (1, -0.1), (-1, -0.1)]), (_PALE, [(-0.2, 0.4), (0.2, 0.4), (0.2, 1), (-0.2, 1)])]),
    "小船": ("只", [(None, [(-1, 0.35), (1, 0.35), (0.6, 0.95), (-0.6, 0.95)]), (_BROWN, [(-0.06, -1), (0.06, -1), (0.06, 0.35), (-0.06, 0.35)]), (_PALE, [(0.1, -0.95), (0.8, 0.2), (0.1, 0.2)])]),
    "鱼": ("条", [(None, [(0.75 * x - 0.2, 0.5 * y) for x, y in _circle()]), (None, [(0.35, 0), (1, -0.55), (1, 0.55)]), (_PALE, _circle(0.12, -0.6, -0.12))]),
    "雨伞": ("把", [(None, _circle(1, 0, 0.1, math.pi, 2 * math.pi)), (_BROWN, [(-0.07, 0.1), (0.07, 0.1), (0.07, 1), (-0.07, 1)])]),
    "旗子": ("面", [(_BROWN, [(-0.9, -1), (-0.72, -1), (-0.72, 1), (-0.9, 1)]), (None, [(-0.72, -1), (1, -1), (1, 0.15), (-0.72, 0.15)])]),
}
COLOURS = {"红色": (0.0, 0.85, 0.9), "橙色": (0.08, 0.9, 1.0), "黄色": (0.15, 0.85, 0.95), "绿色": (0.35, 0.8, 0.65),
           "蓝色": (0.6, 0.85, 0.9), "紫色": (0.77, 0.7, 0.7), "粉色": (0.93, 0.35, 1.0), "黑色": (0.0, 0.0, 0.15)}       # hue, saturation, value
PLACES = {"左上角": (-1, -1), "右上角": (1, -1), "左下角": (-1, 1), "右下角": (1, 1)}
COUNTS = {1: "一", 2: "两", 3: "三"}
LAYOUTS = {1: [(0, 0)], 2: [(-0.5, 0), (0.5, 0)], 3: [(-0.5, 0.45), (0.5, 0.45), (0, -0.45)]}       # where 1, 2, 3 things stand


def random_scene(rng):
    """A scene is a set of statements (place, count, colour, thing), one to three of them, in different quarters of the image."""
    places = rng.sample(list(PLACES), rng.choice([1, 2, 2, 3]))
    return frozenset((p, rng.choice(list(COUNTS)), rng.choice(list(COLOURS)), rng.choice(list(THINGS))) for p in places)


def describe(scene, rng=None):
    """A caption that makes every statement of the scene. With `rng`, in random order and one of several wordings each."""
    parts = []
    for place, count, colour, thing in sorted(scene):
        objects = f"{COUNTS[count]}{THINGS[thing][0]}{colour}的{thing}"
        wordings = [f"{place}有{objects}", f"{objects}在{place}", f"{place}画着{objects}", f"{place}是{objects}"]
        parts.append(rng.choice(wordings) if rng else wordings[0])
    if rng:
        rng.shuffle(parts)
    return "，".join(parts)


def paint(scene, rng, size=128):
    """Draw a scene; what its caption does not say (exact place, size, tilt, shade, background) is random."""
    background = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.15), rng.uniform(0.85, 1)))
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    for place, count, colour, thing in sorted(scene):
        hue, saturation, value = COLOURS[colour]
        jitter = lambda x, most: min(1.0, max(0.0, x + rng.uniform(-most, most)))
        hue = (hue + rng.uniform(-0.02, 0.02)) % 1
        saturation = jitter(saturation, 0.08) if saturation else 0              # black stays without a colour
        own = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, jitter(value, 0.08)))
        quarter_x, quarter_y = (size / 2 + sign * size / 4 + rng.uniform(-0.03, 0.03) * size for sign in PLACES[place])
        radius = size * (0.19 if count == 1 else 0.1) * rng.uniform(0.8, 1.1)
        for dx, dy in LAYOUTS[count]:
            x, y, angle = quarter_x + dx * size * 0.22, quarter_y + dy * size * 0.22, math.radians(rng.uniform(-12, 12))
            for fill, points in THINGS[thing][1]:
                _shape(draw, x, y, radius, fill or own, *_turn(points, angle))
    return image


def _shape(draw, x, y, s, fill, *points):
    """A polygon around (x, y), s times as large as its points say."""
    draw.polygon([(x + s * u, y + s * v) for u, v in points], fill=fill)


def _turn(points, angle):
    return [(u * math.cos(angle) - v * math.sin(angle), u * math.sin(angle) + v * math.cos(angle)) for u, v in points]


def split_of_scene(scene):
    """Every scene belongs to one split for ever, so a test scene is never trained on."""
    return _split_of(describe(scene), 10)


def _split_of(text, parts):
    """By the text's hash, of all `parts` one is valid, one is test, the others are train."""
    return {0: "valid", 1: "test"}.get(hashlib.md5(text.encode()).digest()[0] % parts, "train")


# ---------------------------------------------------------------------------------------------------------------- landscapes: how to paint

# An element is something that a landscape can show. Those in STAMPS are some polygons, printed once or several times; the others have a
# function below: (draw, rng, x: its middle, s: its scale, …). All on 256 x 256 points, x to the right, y downwards; far
# land ends at y = 152, water lies from 168 to 228, trees stand at 240.
def _oval(x, y, rx, ry):
    return [(x + rx * u, y + ry * v) for u, v in _circle()]


def _roof(half, y, height):
    """Of a hall or a pagoda, its corners turned up."""
    eaves = [(-half - 9, y - 5), (-half, y), (half, y), (half + 9, y - 5)]
    return eaves + [(half * 0.6, y - height * 0.6), (half * 0.45, y - height), (-half * 0.45, y - height), (-half * 0.6, y - height * 0.6)]


def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _arc(r):
    return [(1.2 * r * math.cos(math.pi * k / 14), -0.75 * r * math.sin(math.pi * k / 14)) for k in range(15)]


_INK, _WHITE, _RED, _ROOF, _STONE = (26, 26, 32), (251, 251, 250), (178, 44, 36), (64, 66, 76), (140, 136, 130)
_HULL = [((84, 54, 36), [(-44, -12), (-30, -5), (30, -5), (44, -12), (33, 8), (-33, 8)]), ((80, 128, 156), _box(-36, 10, 36, 13))]

# element -> (y, smallest scale, [(dx, dy) of each one of it, …], [(fill, polygon), …])
STAMPS = {
    "朝阳": (104, 1, [(0, 0)], [((255, 205, 70), [(r * math.cos(math.pi * k / 6 + a), r * math.sin(math.pi * k / 6 + a)) for r, a in ((30, -0.12), (50, 0), (30, 0.12))]) for k in range(12)]
           + [((255, 168, 40), _oval(0, 0, 25, 25))]),
    "瀑布": (150, 0.7, [(0, 0)], [((92, 108, 104), [(-75, 9), (-58, -70), (-36, -108), (-6, -96), (20, -112), (52, -74), (72, 9)]),
                                ((114, 130, 124), [(-75, 9), (-58, -70), (-36, -108), (-22, -60), (-26, 9)]), (_WHITE, [(-7, -97), (8, -102), (13, -40), (20, 8), (-16, 8), (-10, -40)]),
                                ((170, 200, 215), [(0, -94), (3, -94), (5, 0), (1, 0)])] + [(_WHITE, _oval(x, 0, 11, 8)) for x in (-18, -6, 8, 22)]),
    "茅屋": (182, 0, [(0, 0)], [((222, 204, 168), _box(-36, -28, 36, 0)), ((92, 66, 46), _box(-9, -21, 9, 0)),
                              ((178, 134, 64), [(-50, -22), (-30, -52), (-22, -58), (22, -58), (30, -52), (50, -22)])]
           + [((140, 100, 46), [(x * 0.6, -55), (x * 0.6 + 2, -55), (x + 2, -23), (x, -23)]) for x in range(-40, 41, 10)]),
    "楼阁": (182, 0, [(0, 0)], [part for y, half in ((0, 42), (-42, 32)) for part in
                              [((236, 220, 190), _box(5 - half, y - 26, half - 5, y))] + [(_RED, _box(x * (half - 8) - 3, y - 26, x * (half - 8) + 3, y)) for x in (-1, -0.33, 0.33, 1)]
                              + [(_ROOF, _roof(half, y - 24, 20))]]),
    "塔": (182, 0, [(0, 0)], [part for y, half in ((0, 25), (-22, 21), (-44, 18), (-66, 14), (-88, 11)) for part in
                             (((198, 122, 86), _box(3 - half, y - 18, half - 3, y)), ((70, 44, 40), _box(-4, y - 12, 4, y - 2)), ((84, 60, 56), _roof(half, y - 15, 9)))]
          + [((84, 60, 56), _box(-2, -132, 2, -108))]),
    "城墙": (184, 0.7, [(0, 0)], [(_STONE, [(-66, 0), (-62, -42), (62, -42), (66, 0)])] + [(_STONE, _box(x, -52, x + 11, -40)) for x in range(-62, 62, 18)]
           + [((112, 108, 102), _box(-63, y, 63, y + 2)) for y in (-28, -14)] + [((56, 50, 46), _box(-12, -14, 12, 0)), ((56, 50, 46), _oval(0, -14, 12, 12))]
           + [(_RED, _box(-22, -60, 22, -42)), (_ROOF, _roof(28, -58, 16))]),
    "桥": (206, 0.75, [(0, 0)], [((156, 148, 138), _arc(62) + _arc(36)[::-1]), ((96, 86, 78), [(x, y - 4) for x, y in _arc(62)] + [(x, y - 9) for x, y in _arc(62)[::-1]])]),
    "小船": (202, 0.72, [(0, 0)], [((152, 120, 76), [(-18, -5), (-17, -20), (-9, -27), (9, -27), (17, -20), (18, -5)])] + _HULL),
    "帆船": (206, 0.72, [(0, 0)], [((84, 54, 36), _box(-2, -92, 2, 0)), ((248, 234, 200), [(3, -88), (40, -62), (36, -14), (3, -14)]),
                                 ((238, 218, 174), [(-4, -76), (-26, -50), (-24, -14), (-4, -14)])]
           + [((196, 164, 112), _box(3, y, 37, y + 2)) for y in (-32, -48, -62)] + _HULL),
    "渔翁": (206, 0.75, [(0, 0)], _HULL + [((122, 102, 56), [(-24, -5), (-17, -34), (1, -34), (8, -5)]), ((214, 178, 92), [(-27, -32), (-8, -49), (11, -32)]),
                                         ((60, 44, 30), [(0, -19), (0, -22), (54, -53), (54, -50)]), ((60, 44, 30), _box(53, -53, 55, 6))]),
    "鸭子": (200, 0.8, [(-32, -6), (2, 8), (34, -8)], [(_WHITE, [(-18, -8), (12, -5), (12, 6), (-10, 6)]), (_WHITE, _oval(0, 0, 13, 7)), (_WHITE, _box(6, -11, 13, 0)),
                                                     (_WHITE, _oval(11, -11, 6, 6)), ((238, 140, 30), [(15, -13), (26, -9), (15, -7)])]),
    "马": (240, 0.85, [(0, 0)], [((124, 72, 42), [(x - 5, -38), (x + 5, -38), (foot + 3, 0), (foot - 3, 0)]) for x, foot in ((-29, -34), (-21, -19), (17, 16), (25, 32))]
          + [((48, 32, 26), [(-30, -54), (-42, -49), (-45, -18), (-37, -27), (-33, -43)]), ((124, 72, 42), _oval(0, -45, 32, 15)),
             ((124, 72, 42), [(16, -47), (29, -38), (44, -74), (40, -90), (31, -85)]), ((124, 72, 42), [(34, -90), (38, -90), (58, -70), (55, -63), (41, -72)]),
             ((48, 32, 26), [(40, -94), (34, -90), (15, -58), (20, -54), (36, -78)])]),
    "白云": (48, 0, [(-36, -8), (36, 14)], [(_WHITE, _oval(1.3 * x, y, 1.25 * r, r)) for x, y, r in ((-24, 3, 11), (-10, -4, 15), (8, -7, 17), (24, 2, 12))]),
    "大雁": (46, 0.7, [(20 * k, 11 * abs(k)) for k in range(-3, 4)], [(_INK, [(-13, -8), (-6, -11), (0, -4), (6, -11), (13, -8), (6, -5), (0, 5), (-6, -5)])]),
    "白鹭": (54, 0.75, [(26 * k, -8 * k) for k in range(-2, 3)], [(_WHITE, [(-14, 2), (-2, -4), (8, -3), (17, -7), (9, 2), (-3, 5)]), ((226, 232, 238), [(-5, -2), (-9, -17), (5, -3)]),
                                                               (_INK, [(-8, 1), (-20, 3), (-20, 5), (-8, 3)]), ((226, 150, 40), [(16, -8), (23, -6), (16, -5)])]),
    "燕子": (58, 0.9, [(-32, 0), (6, 24), (36, -12)], [(_INK, [(12, -2), (3, 4), (-9, 1), (-25, 9), (-13, 0), (-26, -5), (-6, -4), (5, -5)]), (_INK, [(6, -2), (-11, -22), (-3, -1)]),
                                                    (_INK, [(5, 1), (2, 20), (-5, 1)]), ((196, 60, 40), _oval(9, 1, 3, 3))]),
    "黄鹂": (66, 0.85, [(-24, -8), (24, 10)], [((250, 206, 20), _oval(0, 0, 14, 9)), ((250, 206, 20), _oval(12, -6, 7, 7)), ((250, 206, 20), [(-10, -3), (-27, 4), (-10, 5)]),
                                             (_INK, [(4, -4), (-14, -16), (-8, 1)]), ((206, 80, 30), [(18, -9), (26, -6), (18, -3)])]),
}


def _stamp(draw, rng, x, s, y, smallest, spots, parts):
    """Print an element of STAMPS, looking to the left or to the right."""
    s, y, side = max(s, smallest), y + rng.uniform(-4, 4), rng.choice([-1, 1])
    for dx, dy in spots:
        for colour, points in parts:
            _shape(draw, x + side * s * dx, y + s * dy, s, _shade(rng, colour, 5), *((side * u, v) for u, v in points))


def _dot(draw, x, y, rx, ry, fill):
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def _shade(rng, colour, most=12):
    """A colour like this one: each channel up to `most` lighter or darker."""
    return tuple(min(255, c + rng.randint(-most, most)) for c in colour)


def _crown(draw, rng, x, y, rx, ry, n, radius, colour):
    """n leaves or blossoms, evenly over an ellipse."""
    for _ in range(n):
        angle, out = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
        _dot(draw, x + rx * out * math.cos(angle), y + ry * out * math.sin(angle), radius, radius, _shade(rng, colour, 22))


def _branches(draw, rng, x, y, length, angle, width, colour, tips):
    """A bare tree that forks; -> tips, the ends of its twigs."""
    end = x + length * math.sin(angle), y - length * math.cos(angle)
    draw.line([(x, y), end], fill=colour, width=round(width))
    if length < 14:
        tips.append(end)
        return tips
    for turn in (-0.5, 0.45):
        shorter, bent = length * rng.uniform(0.62, 0.76), angle + turn + rng.uniform(-0.2, 0.2)
        _branches(draw, rng, *end, shorter, bent, max(2, width * 0.62), colour, tips)
    return tips


def _mountains(draw, rng, x, s, colour, snow=None):
    """Three of them: two behind, which are paler, and a higher one in front; with `snow`, their upper halves in this colour."""
    behind = [(-0.5, rng.uniform(55, 75), 40), (0.5, rng.uniform(50, 70), 25)]
    for dx, height, pale in (*behind, (rng.uniform(-0.12, 0.12), rng.uniform(76, 88), 0)):
        middle, half, top = x + 125 * s * dx, 85 * s, 152 - height * (0.4 + 0.6 * s)
        fill = tuple(min(255, c + pale) for c in _shade(rng, colour, 8))
        left_shoulder, peak, right_shoulder = (-half * 0.22, 0.8 * top + 30), (0, top), (half * 0.2, 0.78 * top + 33)
        _shape(draw, middle, 0, 1, fill, (-half, 152), (-half * 0.5, 0.45 * top + 84), left_shoulder, peak, right_shoulder,
               (half * 0.55, 0.4 * top + 91), (half, 152))
        if snow:
            foot = top + 0.5 * (152 - top)
            zigzag = [(0.47, 0), (0.25, -12), (0.08, 6), (-0.12, -12), (-0.3, 4), (-0.45, -4)]
            _shape(draw, middle, 0, 1, snow, peak, right_shoulder, *((half * u, foot + v) for u, v in zigzag), left_shoulder)


def _setting_sun(draw, rng, x, s):
    _dot(draw, x, 138, 42, 42, (255, 150, 90, 90))
    _dot(draw, x, 138, 30, 30, _shade(rng, (222, 50, 35), 8))


def _dunes(draw, rng, x, s):
    _shape(draw, 0, 0, 1, (226, 190, 120), (0, 150), (256, 150), (256, 256), (0, 256))
    for y, colour in ((150, (214, 172, 100)), (172, (235, 203, 135)), (200, (205, 160, 88)), (222, (232, 196, 124))):
        phase, steep = rng.uniform(0, 6), rng.uniform(0.018, 0.028)
        crest = [(u, y + 11 * abs(math.sin(steep * u + phase)) - 14) for u in range(0, 264, 8)]
        _shape(draw, 0, 0, 1, _shade(rng, colour, 6), (0, 256), *crest, (256, 256))
        draw.line(crest, fill=(186, 140, 72), width=2)


def _water(draw, rng, x, s):
    colour = _shade(rng, (112, 168, 198), 10)
    bank = [(u, 228 + 5 * math.sin(0.03 * u + rng.uniform(0, 0.3))) for u in range(256, -8, -8)]
    _shape(draw, 0, 0, 1, colour, (0, 168), (256, 168), *bank)
    for y in range(176, 224, 9):
        for _ in range(3):
            u, length = rng.uniform(-10, 240), rng.uniform(18, 44)
            draw.line([(u, y), (u + length / 3, y - 2), (u + length * 2 / 3, y + 1), (u + length, y - 1)], fill=(205, 229, 238), width=2)


def _pine(draw, rng, x, s):
    lean = rng.uniform(-16, 16)
    _shape(draw, x, 238, s, (88, 62, 45), (-6, 0), (lean - 3, -130), (lean + 3, -130), (7, 0))
    for k, (width, y) in enumerate(((44, -62), (50, -84), (38, -106), (26, -126), (13, -142))):
        side = rng.uniform(4, 12) * (-1) ** k
        middle = x + s * (side + lean * -y / 130)
        needles = [(-width, 9), (-width * 0.6, -5), (0, -12), (width * 0.6, -5), (width, 9), (0, 5)]
        _shape(draw, middle, 238 + s * y, s, _shade(rng, (32, 84, 62), 8), *needles)


def _willow(draw, rng, x, s):
    _shape(draw, x, 238, s, (96, 76, 52), (-7, 0), (-4, -80), (5, -80), (8, 0))
    _crown(draw, rng, x, 238 - 112 * s, 36 * s, 22 * s, 26, 12 * s, (132, 178, 78))
    for k in range(21):
        u = (k - 10) * 5.2
        top, length = -124 + 0.02 * u * u, rng.uniform(66, 96)
        twig = [(x + s * u * out, 238 + s * (top + down)) for out, down in ((0.7, 0), (1, 26), (1.12, length))]
        draw.line(twig, fill=_shade(rng, (122, 170, 66), 18), width=2)


def _plum(draw, rng, x, s):
    for u, v in _branches(draw, rng, x, 240, 52 * s, rng.uniform(-0.3, 0.3), 9 * s, (52, 42, 42), []):
        if rng.random() < 0.75:
            _dot(draw, u, v, 5, 5, _shade(rng, (205, 25, 60), 14))
            _dot(draw, u, v, 1.5, 1.5, (250, 220, 120))


def _leafy(draw, rng, x, s, colour):
    _branches(draw, rng, x, 240, 46 * s, rng.uniform(-0.1, 0.1), 9 * s, (86, 62, 50), [])
    _crown(draw, rng, x, 240 - 93 * s, 47 * s, 37 * s, 90, 7.5 * s, colour)
    for _ in range(9):
        _dot(draw, x + s * rng.uniform(-50, 50), 242 + rng.uniform(-8, 8), 3.5, 2.5, _shade(rng, colour, 22))


def _bamboo(draw, rng, x, s):
    for dx in (-36, -18, 0, 17, 35):
        height, lean, colour = rng.uniform(125, 165), rng.uniform(-6, 6), _shade(rng, (92, 150, 72), 12)
        at = lambda up: (x + s * (dx + lean * up), 240 - s * height * up)       # up: 0 at the ground, 1 at the top
        for k in range(7):
            draw.line([at(k / 7), at((k + 0.86) / 7)], fill=colour, width=max(3, round(6 * s)))
        for _ in range(9):
            up, side = rng.uniform(0.45, 1), rng.choice([-1, 1])
            _shape(draw, *at(up), s, _shade(rng, (48, 112, 56), 14), (0, 0), (side * 10, -3), (side * 23, 9), (side * 9, 5))


def _crows(draw, rng, x, s):
    s = max(s, 0.75)
    tips = sorted(_branches(draw, rng, x, 240, 52 * s, rng.uniform(-0.15, 0.15), 11 * s, (74, 62, 54), []))
    for u, v in (tips[1], tips[len(tips) // 2], tips[-2]):
        _dot(draw, u, v - 5, 10, 6, (22, 22, 26))
        _dot(draw, u + 9, v - 11, 5, 5, (22, 22, 26))
        _shape(draw, u, v - 5, 1, (22, 22, 26), (-6, -3), (-21, 7), (-6, 5), (13, -3), (19, -5), (13, -8))


def _smoke(draw, rng, x, s):
    sway = rng.uniform(0, 6)
    for k in range(37):
        u = x + 0.1 * k * math.sin(0.2 * k + sway) + rng.uniform(-0.17, 0.17) * k
        _dot(draw, u, 178 - 4 * k, 3 + 0.25 * k, 4 + 0.15 * k, _shade(rng, (168, 168, 174), 10))


def _lotus(draw, rng, x, s):
    for k in range(10):
        u, v = 26 * k + rng.uniform(-8, 20), rng.uniform(196, 222)
        _dot(draw, u, v, 21, 9, _shade(rng, (56, 132, 84), 12))
    for k in range(5):
        u, v = 52 * k + rng.uniform(10, 40), rng.uniform(180, 206)
        draw.line([(u, v), (u, v + 20)], fill=(60, 120, 70), width=3)
        for tip in (-15, 15, -8, 8, 0):
            petal = [(-4, 2), (tip - 3, -10), (tip, -19 + abs(tip) // 2), (tip + 3, -10), (4, 2)]
            _shape(draw, u, v, 1, _shade(rng, (240, 112 + 3 * (15 - abs(tip)), 158), 8), *petal)


def _grass(draw, rng, x, s):
    for _ in range(230):
        u, v = rng.uniform(0, 256), rng.uniform(232, 258)
        draw.line([(u, v), (u + rng.uniform(-6, 6), v - rng.uniform(12, 24))], fill=_shade(rng, (92, 158, 58), 26), width=3)


def _chrysanthemums(draw, rng, x, s):
    for k in range(9):
        u, v = 28 * k + rng.uniform(6, 26), rng.uniform(222, 240)
        draw.line([(u, v), (u, 256)], fill=(70, 110, 50), width=3)
        for j in range(10):
            a = math.pi * j / 5
            _dot(draw, u + 8 * math.cos(a), v + 8 * math.sin(a), 4.5, 4.5, _shade(rng, (246, 190, 22), 9))
        _dot(draw, u, v, 5, 5, (212, 130, 14))


def _stones(draw, rng, x, s):
    for k in range(4):
        u, r, grey = 64 * k + rng.uniform(12, 52), rng.uniform(19, 30), _shade(rng, (126, 128, 130), 12)
        _shape(draw, u, 250, r, grey, (-1.2, 0.2), (-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (1.1, -0.5), (1.3, 0.2))
        _shape(draw, u, 250, r, tuple(c + 40 for c in grey), (-1, -0.7), (-0.3, -1.3), (0.5, -1.1), (0.1, -0.7), (-0.5, -0.4))


def _full_moon(draw, rng, x, s):
    y = rng.uniform(30, 36)
    _dot(draw, x, y, 33, 33, (255, 246, 200, 50))
    _dot(draw, x, y, 24, 24, (255, 246, 206))


def _new_moon(draw, rng, x, s):
    y, angle = rng.uniform(30, 36), rng.uniform(-0.5, 0.1)
    _shape(draw, x, y, 25, (255, 246, 206), *_turn(_crescent(), angle))


def _stars(draw, rng, x, s):
    four_points = [(r * math.sin(math.pi * k / 4), r * math.cos(math.pi * k / 4)) for k, r in enumerate([1, 0.32] * 4)]
    for k in range(14):
        u, v = (k % 7) * 38 + rng.uniform(2, 30), (k // 7) * 42 + rng.uniform(8, 34)
        _shape(draw, u, v, rng.uniform(5, 8), (255, 250, 225), *four_points)


def _fires(draw, rng, x, s):
    for k in range(3):
        u, v = 85 * k + rng.uniform(20, 66), rng.uniform(184, 200)
        _dot(draw, u, v, 20, 17, (255, 150, 40, 90))
        _shape(draw, u, v, 1, (40, 30, 28), (-18, 7), (18, 7), (12, 15), (-12, 15))
        _shape(draw, u, v, 1, (255, 120, 20), (-7, 6), (-6, -4), (0, -15), (6, -4), (7, 6))
        _dot(draw, u, v + 1, 4, 5, (255, 240, 150))
        draw.line([(u, v + 18), (u, v + 32)], fill=(255, 150, 40, 150), width=5)


def _mist(draw, rng, x, s):
    for y in (112, 136, 160):
        for k in range(9):
            _dot(draw, 32 * k + rng.uniform(-14, 14), y + rng.uniform(-5, 5), 34, 9, (244, 246, 246, 130))


def _snow(draw, rng, x, s):
    for k in range(110):
        r = rng.uniform(2, 4.2)
        _dot(draw, 256 * (k % 11 + rng.random()) / 11, 256 * (k // 11 + rng.random()) / 10, r, r, (255, 255, 255))


def _rain(draw, rng, x, s):
    slant = rng.choice([-1, 1]) * rng.uniform(5, 11)
    for k in range(120):
        u, v = 256 * (k % 12 + rng.random()) / 12, 256 * (k // 12 + rng.random()) / 10 - 10
        draw.line([(u, v), (u + slant, v + 22)], fill=(240, 246, 254, 235), width=3)


# ---------------------------------------------------------------------------------------------------------------- landscapes: the elements

# The elements of a row share the width of the image. Rows are painted in this order; what shines by night, the birds and the weather come
# after the evening or the night has darkened everything else.
ROWS = ("far", "ground", "water", "things", "near", "sky", "weather")


class Element(NamedTuple):
    """Something that a landscape can show."""

    row: str
    places: list[str]                           # where a caption says it is
    names: list[str]                            # how a caption calls it
    english: str
    draw: Callable | None                       # what paints it; None: as STAMPS says


ELEMENTS = {
    "圆月": Element("sky", ["夜空中", "天上"], ["一轮圆月", "一轮满月"], "a full moon", _full_moon),
    "弯月": Element("sky", ["夜空中", "天上"], ["一弯新月", "弯弯的月亮"], "a crescent moon", _new_moon),
    "星星": Element("sky", ["夜空中", "天上"], ["许多星星", "点点繁星"], "stars", _stars),
    "白云": Element("sky", ["天空", "空中"], ["几朵白云", "白色的云"], "white clouds", None),
    "大雁": Element("sky", ["天空", "空中"], ["一群大雁", "人字形的雁群"], "wild geese", None),
    "白鹭": Element("sky", ["天空", "空中"], ["一行白鹭", "飞起的白鹭"], "egrets", None),
    "燕子": Element("sky", ["天空", "空中"], ["几只燕子", "飞舞的燕子"], "swallows", None),
    "黄鹂": Element("sky", ["天空", "空中"], ["两只黄鹂", "黄色的小鸟"], "orioles", None),
    "夕阳": Element("far", ["天边", "远处"], ["一轮夕阳", "落山的太阳"], "a setting sun", _setting_sun),
    "朝阳": Element("far", ["天边", "远处"], ["一轮朝阳", "初升的太阳"], "a rising sun", None),
    "青山": Element("far", ["远处", "远方"], ["几座青山", "青色的山"], "green mountains", lambda *place: _mountains(*place, (92, 140, 116))),
    "雪山": Element("far", ["远处", "远方"], ["几座雪山", "白雪高山"], "snow mountains",
                   lambda *place: _mountains(*place, (104, 118, 146), (250, 252, 255))),
    "瀑布": Element("far", ["远处", "远方"], ["一道瀑布", "白色的瀑布"], "a waterfall", None),
    "沙漠": Element("ground", ["地上", "近处"], ["一片沙漠", "黄色的沙丘"], "a desert", _dunes),
    "水": Element("water", ["近处", "地上"], ["一片水", "宽阔的水面"], "water", _water),
    "茅屋": Element("things", ["远处", "地上"], ["一间茅屋", "一座茅草屋"], "a hut", None),
    "楼阁": Element("things", ["远处", "地上"], ["一座楼阁", "两层的楼"], "a pavilion", None),
    "塔": Element("things", ["远处", "地上"], ["一座高塔", "一座宝塔"], "a pagoda", None),
    "城墙": Element("things", ["远处", "地上"], ["一座城楼", "灰色的城墙"], "a city wall", None),
    "烟": Element("things", ["远处", "地上"], ["一缕烟", "升起的烟"], "smoke", _smoke),
    "桥": Element("things", ["水上", "水边"], ["一座石桥", "一座拱桥"], "a stone bridge", None),
    "小船": Element("things", ["水上", "水面"], ["一只小船", "一条小船"], "a small boat", None),
    "帆船": Element("things", ["水上", "水面"], ["一只帆船", "一条挂帆的船"], "a sailing boat", None),
    "渔翁": Element("things", ["水上", "水面"], ["钓鱼的渔翁", "穿蓑衣的渔翁"], "a fisherman", None),
    "鸭子": Element("things", ["水上", "水里"], ["几只鸭子", "三只白鸭"], "ducks", None),
    "松树": Element("things", ["近处", "地上"], ["一棵松树", "高大的松树"], "a pine tree", _pine),
    "柳树": Element("things", ["近处", "地上"], ["一棵柳树", "低垂的柳树"], "a willow", _willow),
    "桃花": Element("things", ["近处", "地上"], ["一树桃花", "粉色的桃花"], "peach blossoms", lambda *place: _leafy(*place, (247, 162, 190))),
    "梅花": Element("things", ["近处", "地上"], ["一树梅花", "红色的梅花"], "plum blossoms", _plum),
    "红枫": Element("things", ["近处", "地上"], ["一棵红枫", "红叶的枫树"], "a red maple", lambda *place: _leafy(*place, (208, 62, 28))),
    "竹子": Element("things", ["近处", "地上"], ["几根竹子", "一丛绿竹"], "bamboo", _bamboo),
    "乌鸦": Element("things", ["近处", "地上"], ["枯树上的乌鸦", "枯树和乌鸦"], "crows", _crows),
    "马": Element("things", ["近处", "地上"], ["一匹马", "站着的马"], "a horse", None),
    "荷花": Element("near", ["水上", "水里"], ["几朵荷花", "荷叶和荷花"], "lotus flowers", _lotus),
    "青草": Element("near", ["近处", "地上"], ["一片青草", "绿色的草"], "green grass", _grass),
    "菊花": Element("near", ["近处", "地上"], ["几朵菊花", "黄色的菊花"], "chrysanthemums", _chrysanthemums),
    "石头": Element("near", ["近处", "地上"], ["几块石头", "灰色的石头"], "stones", _stones),
    "渔火": Element("weather", ["水上", "水面"], ["几点渔火", "点灯的渔船"], "fishing lights", _fires),
    "雾": Element("weather", ["远处", "空中"], ["一片白雾", "白色的雾"], "mist", _mist),
    "雪": Element("weather", ["空中", "天上"], ["飘落的雪花", "纷纷大雪"], "snow", _snow),
    "雨": Element("weather", ["空中", "天上"], ["落下的雨", "细细的雨丝"], "rain", _rain),
}
ON_WATER = frozenset("桥 小船 帆船 渔翁 鸭子 荷花 渔火".split())                                   # where one of these is, there is water
RIVALS = [frozenset(line.split()) for line in (                                 # of these at most one
    "圆月 弯月 夕阳 朝阳 雨", "星星 夕阳 朝阳 雨", "渔火 夕阳 朝阳", "圆月 弯月 燕子", "圆月 弯月 黄鹂", "星星 燕子",
    "雪 雨 夕阳 朝阳", "雪 荷花", "雪 燕子", "沙漠 荷花", "沙漠 青草")]

# The first of these of which a scene has something -> the sky above, the sky at the horizon, and what darkens the land.
LIGHTS = [("圆月 弯月 星星 渔火", (88, 104, 156), (176, 184, 212), (158, 166, 208)),
          ("夕阳", (196, 158, 168), (252, 196, 132), (255, 224, 204)),
          ("朝阳", (176, 202, 226), (255, 218, 190), (255, 242, 226)),
          ("雪 雨", (138, 150, 164), (196, 204, 210), (226, 230, 236)),
          ("", (118, 172, 210), (232, 240, 234), (255, 255, 255))]              # plain day


def with_water(elements):
    """-> a scene: the elements, and the water that some of them need."""
    return frozenset(elements) | ({"水"} if ON_WATER & frozenset(elements) else frozenset())


def goes_together(scene):
    """Whether a scene can be painted: no rivals, no more than four things side by side, two in the sky, two far away."""
    most = {"things": 4, "sky": 2, "far": 2, "near": 2}
    in_row = lambda row: sum(ELEMENTS[element].row == row for element in scene)
    return all(len(scene & rivals) <= 1 for rivals in RIVALS) and all(in_row(row) <= n for row, n in most.items())


# Lines of classical verse, most of them of the Tang and the Song: poet -> line -> the elements it speaks of.
POETS = {
    "陶渊明": {"采菊东篱下": "菊花", "悠然见南山": "青山", "依依墟里烟": "烟 茅屋"},
    "谢灵运": {"明月照积雪": "圆月 雪"},
    "王维": {"明月松间照": "圆月 松树", "清泉石上流": "石头 水", "大漠孤烟直": "沙漠 烟", "长河落日圆": "水 夕阳", "漠漠水田飞白鹭": "水 白鹭", "坐看云起时": "白云",
             "独坐幽篁里": "竹子", "客舍青青柳色新": "柳树 楼阁", "莲动下渔舟": "荷花 小船", "天寒红叶稀": "红枫", "系马高楼垂柳边": "马 楼阁 柳树"},
    "李白": {"孤帆远影碧空尽": "帆船", "孤帆一片日边来": "帆船 朝阳", "两岸青山相对出": "青山 水", "飞流直下三千尺": "瀑布", "长安一片月": "圆月 城墙",
             "明月出天山": "圆月 雪山", "青山横北郭": "青山 城墙", "轻舟已过万重山": "小船 青山", "峨眉山月半轮秋": "弯月 青山", "寒鸦栖复惊": "乌鸦",
             "五月天山雪": "雪山", "桃花潭水深千尺": "桃花 水", "燕山雪花大如席": "雪 青山", "危楼高百尺": "楼阁", "野竹分青霭": "竹子 雾"},
    "杜甫": {"两个黄鹂鸣翠柳": "黄鹂 柳树", "一行白鹭上青天": "白鹭", "窗含西岭千秋雪": "雪山 茅屋", "门泊东吴万里船": "帆船 茅屋", "星垂平野阔": "星星 青草",
             "山青花欲燃": "青山 桃花", "城春草木深": "城墙 青草", "清江一曲抱村流": "水 茅屋", "白沙翠竹江村暮": "水 竹子 茅屋"},
    "柳宗元": {"孤舟蓑笠翁": "渔翁", "独钓寒江雪": "渔翁 雪", "渔翁夜傍西岩宿": "渔翁 石头"},
    "刘长卿": {"天寒白屋贫": "茅屋", "风雪夜归人": "雪 茅屋", "苍苍竹林寺": "竹子 塔"},
    "白居易": {"离离原上草": "青草", "日出江花红胜火": "朝阳 水 桃花", "浅草才能没马蹄": "青草 马", "孤山寺北贾亭西": "塔 楼阁 青山", "山寺桃花始盛开": "塔 桃花",
               "松排山面千重翠": "松树 青山"},
    "张继": {"月落乌啼霜满天": "弯月 乌鸦", "江枫渔火对愁眠": "红枫 渔火", "姑苏城外寒山寺": "塔 城墙", "夜半钟声到客船": "小船 塔"},
    "杜牧": {"停车坐爱枫林晚": "红枫 夕阳", "远上寒山石径斜": "青山 石头", "千里莺啼绿映红": "黄鹂 桃花", "水村山郭酒旗风": "水 青山 城墙", "南朝四百八十寺": "塔",
             "多少楼台烟雨中": "楼阁 雨 雾", "烟笼寒水月笼沙": "雾 水 圆月", "二十四桥明月夜": "桥 圆月", "江涵秋影雁初飞": "水 大雁", "落日楼台一笛风": "夕阳 楼阁"},
    "王之涣": {"白日依山尽": "夕阳 青山", "黄河入海流": "水", "黄河远上白云间": "水 白云", "春风不度玉门关": "城墙 沙漠"},
    "王昌龄": {"青海长云暗雪山": "白云 雪山", "寒雨连江夜入吴": "雨 水", "大漠风尘日色昏": "沙漠 夕阳"},
    "岑参": {"雪上空留马行处": "雪 马", "走马西来欲到天": "马 沙漠", "梁园日暮乱飞鸦": "乌鸦 夕阳"},
    "高适": {"北风吹雁雪纷纷": "大雁 雪", "孤城落日斗兵稀": "城墙 夕阳"},
    "孟浩然": {"移舟泊烟渚": "小船 雾", "微云淡河汉": "白云 星星"},
    "韦应物": {"野渡无人舟自横": "小船"},
    "张志和": {"西塞山前白鹭飞": "青山 白鹭"},
    "贺知章": {"碧玉妆成一树高": "柳树"},
    "贾岛": {"松下问童子": "松树", "僧敲月下门": "圆月 塔"},
    "张九龄": {"海上生明月": "圆月 水"},
    "王湾": {"归雁洛阳边": "大雁", "海日生残夜": "朝阳 水"},
    "王勃": {"滕王高阁临江渚": "楼阁 水", "珠帘暮卷西山雨": "青山 雨", "画栋朝飞南浦云": "楼阁 白云"},
    "崔颢": {"烟波江上使人愁": "雾 水"},
    "李商隐": {"夕阳无限好": "夕阳", "留得枯荷听雨声": "荷花 雨", "巴山夜雨涨秋池": "青山 雨 水"},
    "温庭筠": {"鸡声茅店月": "弯月 茅屋", "人迹板桥霜": "桥", "雁飞残月天": "大雁 弯月", "江上柳如烟": "柳树 水"},
    "刘禹锡": {"朱雀桥边野草花": "桥 青草", "旧时王谢堂前燕": "燕子 楼阁", "飞入寻常百姓家": "燕子 茅屋", "九曲黄河万里沙": "水 沙漠"},
    "韩愈": {"雪拥蓝关马不前": "雪 马 城墙", "云横秦岭家何在": "白云 青山"},
    "李贺": {"大漠沙如雪": "沙漠"},
    "常建": {"清晨入古寺": "塔 朝阳", "初日照高林": "朝阳"},
    "许浑": {"溪云初起日沉阁": "白云 夕阳 楼阁", "山雨欲来风满楼": "楼阁 青山 雨"},
    "赵嘏": {"残星几点雁横塞": "星星 大雁"},
    "韦庄": {"无情最是台城柳": "柳树 城墙", "画船听雨眠": "小船 雨", "骑马倚斜桥": "马 桥"},
    "刘方平": {"更深月色半人家": "圆月 茅屋", "北斗阑干南斗斜": "星星"},
    "张旭": {"隐隐飞桥隔野烟": "桥 雾", "石矶西畔问渔船": "石头 小船"},
    "徐凝": {"一条界破青山色": "瀑布 青山"},
    "张祜": {"潮落夜江斜月里": "弯月 水", "两三星火是瓜洲": "渔火"},
    "张若虚": {"何处相思明月楼": "圆月 楼阁", "斜月沉沉藏海雾": "弯月 水 雾"},
    "孟郊": {"春风得意马蹄疾": "马"},
    "元稹": {"秋丛绕舍似陶家": "菊花 茅屋"},
    "黄巢": {"满城尽带黄金甲": "菊花 城墙"},
    "王建": {"中庭地白树栖鸦": "乌鸦 圆月"},
    "林逋": {"疏影横斜水清浅": "梅花 水", "暗香浮动月黄昏": "梅花 圆月"},
    "范仲淹": {"长烟落日孤城闭": "烟 夕阳 城墙", "山映斜阳天接水": "青山 夕阳 水"},
    "晏殊": {"似曾相识燕归来": "燕子"},
    "晏几道": {"舞低杨柳楼心月": "柳树 楼阁 圆月"},
    "翁宏": {"微雨燕双飞": "雨 燕子"},
    "欧阳修": {"月上柳梢头": "圆月 柳树", "平芜尽处是春山": "青草 青山"},
    "王安石": {"春风又绿江南岸": "水 青草", "飞来山上千寻塔": "塔 青山", "墙角数枝梅": "梅花"},
    "苏轼": {"竹外桃花三两枝": "竹子 桃花", "春江水暖鸭先知": "鸭子", "缺月挂疏桐": "弯月"},
    "李清照": {"东篱把酒黄昏后": "菊花 夕阳"},
    "陆游": {"小楼一夜听春雨": "楼阁 雨", "柳暗花明又一村": "柳树 桃花 茅屋", "楼船夜雪瓜洲渡": "帆船 雪", "铁马秋风大散关": "马 城墙"},
    "杨万里": {"接天莲叶无穷碧": "荷花", "映日荷花别样红": "荷花 朝阳"},
    "徐俯": {"春雨断桥人不渡": "雨 桥"},
    "志南": {"沾衣欲湿杏花雨": "桃花 雨"},
    "赵师秀": {"黄梅时节家家雨": "雨 茅屋"},
    "曾几": {"添得黄鹂四五声": "黄鹂"},
    "卢梅坡": {"梅雪争春未肯降": "梅花 雪"},
}

# line -> (its poet, the scene that it speaks of)
VERSES = {verse: (poet, with_water(elements.split())) for poet, verses in POETS.items() for verse, elements in verses.items()}


def random_landscape(rng):
    """A landscape is a set of two to five ELEMENTS that go together."""
    while True:
        scene = with_water(rng.sample(list(ELEMENTS), rng.randint(2, 5)))
        if len(scene) <= 5 and goes_together(scene):
            return scene


def describe_landscape(scene, rng=None):
    """A caption that names every element of the scene. With `rng`, in random order and one of several wordings each."""
    parts = []
    for element in sorted(scene):
        places, names = ELEMENTS[element].places, ELEMENTS[element].names
        place, name = (rng.choice(places), rng.choice(names)) if rng else (places[0], names[0])
        wordings = [f"{place}有{name}", f"{name}在{place}", f"{place}是{name}"]
        parts.append(rng.choice(wordings) if rng else wordings[0])
    if rng:
        rng.shuffle(parts)
    return "，".join(parts)


def describe_in_english(scene, rng=None):
    """A caption that names every element of the scene. With `rng`, in random order."""
    names = [ELEMENTS[element].english for element in sorted(scene)]
    if rng:
        rng.shuffle(names)
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


@functools.cache
def _sky(above, horizon):
    """From one colour to another, on 256 x 256 points."""
    sky = Image.new("RGB", (1, 256))
    sky.putdata([tuple(round(a + (b - a) * min(y, 151) / 151) for a, b in zip(above, horizon)) for y in range(256)])
    return sky.resize((256, 256), Image.NEAREST)


def paint_landscape(scene, rng, size=128):
    """Draw a landscape; what its caption does not say (places, sizes, shades) is random."""
    above, horizon, tint = next(light for names, *light in LIGHTS if not names or scene & set(names.split()))
    image = _sky(above, horizon).copy()
    draw = ImageDraw.Draw(image, "RGBA")                                      # a colour's fourth number: how much it hides
    aside = dict(zip(("far", "things"), rng.sample([-40, 40], 2)))              # one thing alone does not stand in front of what is far
    for row in ROWS:
        if row == "ground":
            earth = _shade(rng, (238, 242, 246) if "雪" in scene else (206, 206, 164), 6)
            _shape(draw, 0, 0, 1, earth, (0, 152), (64, 149), (150, 152), (256, 150), (256, 256), (0, 256))
        if row == "sky" and tint != (255, 255, 255):                            # all land is painted: now it gets dark, or not
            image = ImageChops.multiply(image, Image.new("RGB", image.size, tint))
            draw = ImageDraw.Draw(image, "RGBA")
        here = [element for element in ELEMENTS if element in scene and ELEMENTS[element].row == row]
        for element, place in zip(here, rng.sample(range(len(here)), len(here))):
            x = 256 * (place + 0.5 + rng.uniform(-0.15, 0.15)) / len(here) + (aside.get(row, 0) if len(here) == 1 else 0)
            s = (1, 0.88, 0.72, 0.6)[len(here) - 1] * rng.uniform(0.92, 1.08)
            if element in STAMPS:
                _stamp(draw, rng, x, s, *STAMPS[element])
            else:
                ELEMENTS[element].draw(draw, rng, x, s)
    return image.resize((size, size), Image.BOX)


def split_of_landscape(scene):
    """Every landscape belongs to one split for ever, as in split_of_scene."""
    return _split_of(describe_landscape(scene), 10)


def random_poem(rng):
    """Two lines of different poets (a cento) whose elements go together, three to six of them."""
    while True:
        pair = tuple(rng.sample(list(VERSES), 2))
        scene = scene_of_poem(pair)
        if VERSES[pair[0]][0] != VERSES[pair[1]][0] and 3 <= len(scene) <= 6 and goes_together(scene):
            return pair


def scene_of_poem(pair):
    """What the image of two verses shows: all that they speak of."""
    return VERSES[pair[0]][1] | VERSES[pair[1]][1]


def poem_caption(pair, rng=None):
    """The two lines; a poem says it in one way alone."""
    return "，".join(pair)


def split_of_poem(pair):
    """Every pair of verses belongs to one split for ever, in either order: test's lines stand in train too, with other partners."""
    return _split_of("，".join(sorted(pair)), 4)
