"""support.images"""
import contextlib
import functools
import importlib.util
import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from support import system
from support.system import BadInput

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ORIENTATION = 0x0112                                                            # the EXIF tag that tells how to turn a picture; 1: upright


@contextlib.contextmanager
def refused_as(name):
    """Whatever goes wrong inside, in reading, decoding or resizing a picture, becomes BadInput with its name."""
    try:
        yield
        return
    except UnidentifiedImageError:
        reason = "not a picture in a format that Pillow reads"
    except Exception as error:                                                  # some forty decoders, each with its own kinds of error
        reason = str(error)
    raise BadInput(f"{name} cannot be read ({reason}); replace or remove it")


def open_picture(encoded):
    """Bytes of a picture file -> a PIL picture of which only the header has been read."""
    if not encoded:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        # From 89 million pixels on: a small file can ask for all the memory there is.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(encoded))


def decoded(read, name):
    """read() -> bytes of a picture file -> the picture, RGB. Raises BadInput with its name when it cannot be read."""
    with refused_as(name):
        picture = open_picture(read())
        picture.load()
        return to_rgb(picture)


def picture_at(paths, i, folder=""):
    """Picture i of some paths, relative to a folder. (A function of the module, so that it can be sent to workers on every system.)"""
    return decoded(Path(folder, paths[i]).read_bytes, system.printable(paths[i]))


def to_rgb(picture):
    """Any PIL picture -> RGB as a person sees it: turned as its EXIF tag says, transparent parts on white, 16-bit grey scaled to 8.
    RGB pictures stay bit for bit."""
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


# CLIP's statistics of its training pictures, per RGB channel, of values in 0..1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Transform:
    """The evaluation transform, for a model to hand out with its weights: a PIL picture -> (3, R, R) float32."""

    def __init__(self, size):
        self.size = size

    def __call__(self, picture):
        return normalize(to_uint8(picture, self.size).float() / 255)


def to_uint8(picture, size):
    """The pixels of evaluation: a PIL picture -> (3, size, size) uint8, bicubic with antialias, the whole picture, no crop."""
    picture = to_rgb(picture)                                                   # first: to resize palette indices mixes unrelated colours
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def normalize(pixels):
    """(…, 3, R, R) in 0..1 -> what the vision tower expects: (pixels - mean) / std of each channel."""
    mean, std = statistics_on(pixels.device)
    return (pixels - mean) / std


@functools.lru_cache(maxsize=16)
def statistics_on(device):
    """CLIP_MEAN and CLIP_STD, (3, 1, 1) each: sent to a device once, for a copy would wait until it is idle."""
    return [torch.tensor(channels, device=device).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD)]


def training_pixels(picture, size, name):
    """The pixels of training: the bytes of a picture file, or a PIL picture, painted -> (3, size, size) uint8. Raises BadInput with
    its name when it cannot be read.

    Evaluation's figures are compared with those of other programs, so its pixels are Pillow's, bit for bit. Training has no such
    duty, but often waits for its pictures: so it takes faster ways, to pixels that differ by less than anyone sees (of 255, on
    photos: 0.005 on average and 2 at most; decoded at a reduced scale 0.1 to 0.8, and 7).
    """
    if isinstance(picture, Image.Image):
        return to_uint8(picture, size)
    with refused_as(name):
        encoded, picture = picture, open_picture(picture)
        whole = picture.size
        # A large JPEG is decoded at 1/2, 1/4 or 1/8, a part of the work; each side stays twice as long as needed.
        picture.draft(None, (2 * size, 2 * size))
        pixels = None
        if picture.format == "JPEG" and picture.mode in ("RGB", "L") and picture.size == whole:     # not to be reduced
            if picture.getexif().get(ORIENTATION, 1) == 1:
                pixels = jpeg_pixels(encoded)
        if pixels is None:                                                      # every other kind of picture
            picture.load()
            pixels = torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)                   # (3, H, W)
        return resized(pixels, size)


def resized(pixels, size):
    """What `to_uint8` does, by torch, which takes a third of the time where the processor has AVX2:
    (3, H, W) uint8 that lie in memory as (H, W, 3) -> (3, size, size)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return to_uint8(Image.fromarray(pixels.permute(1, 2, 0).numpy()), size)
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def jpeg_pixels(encoded):
    """An RGB or grey JPEG -> (3, H, W) uint8, Pillow's bits in less time. None where torchvision cannot: then Pillow decodes it, or
    says what is wrong with the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # torch: that bytes are not to be written to; they are not
        try:
            return jpeg_decoder()(torch.frombuffer(encoded, dtype=torch.uint8))
        except Exception:
            return None


@functools.cache
def jpeg_decoder():
    """torchvision's decode_jpeg, or where that is missing or broken a function that decodes nothing.

    Of torchvision only this library is loaded: importing the package would cost each worker three seconds and 90 MB, and its
    function of that name only warns (from 0.29 on, that it will go) before it calls this one.
    """
    try:
        (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
        torch.ops.load_library(next(Path(folder).glob("image*.so")))            # image.so, from 0.29 on image_stable.so
        return functools.partial(torch.ops.image.decode_jpeg, mode=3)           # 3: ImageReadMode.RGB
    except Exception:                                                           # not there, made for another torch, …
        return lambda _: None


# Pillow alone cannot read heic and heif: better counted than passed over.
ENDINGS = {f".{kind}" for kind in (*PICTURES, "jpe", "jfif", "avif", "jp2", "ppm", "pgm", "ico", "tga", "heic", "heif")}


def picture_files(folder):
    """Every picture under a folder, at any depth, known by the ending of its name -> paths relative to the folder, sorted; and
    {folder: reason} of those in it that cannot be read.

    What is hidden (.trash, ._cat.jpg) is left out, and so are folders that are links.
    """
    found, unread = [], {}
    note = lambda error: unread.update({os.path.relpath(error.filename, folder): error.strerror})
    for where, folders, files in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]     # in place: os.walk goes into these
        names = [name for name in files if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS]
        paths = [os.path.join(where, name) for name in names]
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]          # a pipe would be waited for
    return sorted(found), unread
