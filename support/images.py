"""Image files -> pixels: for evaluation exactly as Pillow gives them, for training faster."""
import contextlib
import functools
import importlib.util
import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader

from support import system
from support.system import BadInput

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Endings of image files. Pillow cannot read heic and heif: they are reported.
ENDINGS = tuple(f".{kind}" for kind in (*IMAGE_TYPES, "jpe", "jfif", "avif", "jp2", "ppm", "pgm",
                                        "ico", "tga", "heic", "heif"))
# What is read, in Pillow's names. It knows more formats; EPS (PostScript) starts a program.
AVIF = ["AVIF"] if importlib.util.find_spec("PIL.AvifImagePlugin") else []      # Pillow 11.3
FORMATS = "JPEG PNG GIF BMP DIB PPM WEBP TIFF JPEG2000 ICO".split() + AVIF + ["TGA"]
ORIENTATION = 0x0112                                        # the EXIF tag; 1: upright

# CLIP's statistics of its training images, per RGB channel, of values in 0..1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@contextlib.contextmanager
def refused_as(name):
    """Any error while something is read, decoded or resized becomes BadInput with its name."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")     # thousands, none names the file
            # From 89 million pixels on: a small file can ask for all the memory there is.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except Exception as error:                              # a dozen decoders have their own
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a format that is read: JPEG, PNG, WebP, GIF, BMP, TIFF, …"
        remedy = "" if isinstance(error, FileNotFoundError) else "; replace or remove it"
        raise BadInput(f"{name} cannot be read ({reason}){remedy}") from None


def open_image(encoded):
    """The bytes of an image file -> a PIL image of which only the header is read."""
    if not encoded:
        raise ValueError("it is empty")
    # A scan of 10 bytes makes the decoder of a JPEG pass over all pixels. Usual are 1 to 13 scans.
    if encoded.startswith(b"\xff\xd8") and len(re.findall(rb"\xff\xda\0", encoded)) > 200:
        raise ValueError("a JPEG with more than 200 scans")
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if max(image.size) > 65535:                             # resizing a line takes gigabytes
        raise ValueError("a side has more than 65,535 pixels")
    return image


def decoded(read, name):
    """read() -> the bytes of an image file; -> the image, RGB. Raises BadInput with its name."""
    with refused_as(name):
        return to_rgb(open_image(read()))


def image_at(paths, i, folder=""):
    """Image i of some paths, relative to a folder. (Not a closure: it is sent to workers.)"""
    return decoded(Path(folder, paths[i]).read_bytes, system.printable(paths[i]))


def to_rgb(image):
    """Any PIL image -> RGB, turned as its EXIF tag says; transparent parts become white."""
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                          # 16-bit grey
        grey = np.clip(np.asarray(image), 0, 65535)         # uint16, or int32 of mode I
        grey //= 257                                        # in place: an image may be large
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=image)
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


# ---- the pixels of evaluation


class Transform:
    """A PIL image -> (3, R, R) float32: the transform that a model's weights go with."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return normalize(to_uint8(image, self.size).float() / 255)


def to_uint8(image, size):
    """A PIL image -> (3, size, size) uint8: the whole image, no crop, bicubic with antialias."""
    image = to_rgb(image)                                   # before: palette indices do not mix
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(pixels):
    """(…, 3, R, R) in 0..1 -> (pixels - mean) / std of each channel, for the vision tower."""
    mean, std = statistics_on(pixels.device)
    return (pixels - mean) / std


@functools.lru_cache(maxsize=16)
def statistics_on(device):
    """CLIP_MEAN and CLIP_STD, (3, 1, 1) each, copied to a device once: a copy waits for it."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)]


# ---- the pixels of training


def training_pixels(encoded, size, name):
    """The bytes of an image file -> (3, size, size) uint8. Raises BadInput with its name.

    Faster than to_uint8, whose exact pixels evaluation needs to compare with other programs. On
    photos they differ by 0.005 of 255 on average, at most 2; at a reduced scale by 0.8, at most 7.
    """
    with refused_as(name):
        image = open_image(encoded)
        whole = image.size
        # Decode a large JPEG at 1/2, 1/4 or 1/8, a part of the work; a side keeps 2 size or more.
        image.draft(None, (2 * size, 2 * size))
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == whole
        upright = image.getexif().get(ORIENTATION, 1) == 1
        pixels = jpeg_pixels(encoded) if plain and upright else None
        if pixels is None:
            pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)     # (3, H, W)
        return resized(pixels, size)


def resized(pixels, size):
    """(3, H, W), in memory (H, W, 3) -> (3, size, size). With AVX torch is three times as fast."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return to_uint8(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def jpeg_pixels(encoded):
    """An RGB or grey JPEG -> (3, H, W) uint8, as Pillow's but faster; None: torchvision cannot."""
    try:                                                    # bytearray: torch wants to write
        return jpeg_decoder()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    except Exception:                                       # Pillow decodes it, or says why not
        return None


@functools.cache
def jpeg_decoder():
    """torchvision's decode_jpeg, without importing all of it (3 s and 90 MB), or None."""
    try:
        (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
        torch.ops.load_library(next(Path(folder).glob("image*.so")))    # or image_stable.so
        return functools.partial(torch.ops.image.decode_jpeg, mode=3)   # 3: ImageReadMode.RGB
    except Exception:                                       # missing, made for another torch, …
        return None


def leads_out(root, path):
    """Whether a path leads out of the folder `root` (an os.path.realpath), by `..` or links."""
    return os.path.commonpath([root, os.path.realpath(path)]) != root


def image_files(folder):
    """The images under a folder, at any depth -> sorted relative paths, {unreadable: reason}.

    Hidden files and folders (.trash, ._cat.jpg) are left out, and so are folders that are links.
    """
    found, unread, todo = [], {}, [folder]
    for where in todo:                                      # it grows; os.walk recurses
        try:
            entries = [e for e in os.scandir(where) if not e.name.startswith(".")]
        except OSError as error:
            unread[os.path.relpath(where, folder)], entries = error.strerror, []
        todo += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
        for e in entries:
            if e.name.lower().endswith(ENDINGS) and os.path.isfile(e.path):     # not a pipe
                found.append(os.path.relpath(e.path, folder))
    return sorted(found), unread


def reader_loader(dataset, workers, timeout=900, **options):
    """A DataLoader whose workers end with this process; stuck ones raise RuntimeError."""
    start = functools.partial(system.start_reader, os.getpid())
    return DataLoader(dataset, num_workers=workers, worker_init_fn=start,
                      timeout=timeout if workers else 0, **options)
