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
from torch.utils.data import DataLoader

from support import system
from support.system import BadInput

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ORIENTATION = 0x0112                                                            # the EXIF tag that tells how to turn a image; 1: upright


@contextlib.contextmanager
def refused_as(name):
    """Whatever goes wrong inside, in reading, decoding or resizing a image, becomes BadInput with its name."""
    try:
        yield
        return
    except UnidentifiedImageError:
        reason = "not a image in a format that Pillow reads"
    except Exception as error:                                                  # some forty decoders, each with its own kinds of error
        reason = str(error)
    raise BadInput(f"{name} cannot be read ({reason}); replace or remove it")


def open_image(encoded):
    """Bytes of a image file -> a PIL image of which only the header has been read."""
    if not encoded:
        raise ValueError("it is empty")
    with warnings.catch_warnings():
        # From 89 million pixels on: a small file can ask for all the memory there is.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(encoded))


def decoded(read, name):
    """read() -> bytes of a image file -> the image, RGB. Raises BadInput with its name when it cannot be read."""
    with refused_as(name):
        image = open_image(read())
        image.load()
        return to_rgb(image)


def image_at(paths, i, folder=""):
    """Image i of some paths, relative to a folder. (A function of the module, so that it can be sent to workers on every system.)"""
    return decoded(Path(folder, paths[i]).read_bytes, system.printable(paths[i]))


def to_rgb(image):
    """Any PIL image -> RGB as a person sees it: turned as its EXIF tag says, transparent parts on white, 16-bit grey scaled to 8.
    RGB images stay bit for bit."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# CLIP's statistics of its training images, per RGB channel, of values in 0..1
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Transform:
    """The evaluation transform, for a model to hand out with its weights: a PIL image -> (3, R, R) float32."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return normalize(to_uint8(image, self.size).float() / 255)


def to_uint8(image, size):
    """The pixels of evaluation: a PIL image -> (3, size, size) uint8, bicubic with antialias, the whole image, no crop."""
    image = to_rgb(image)                                                   # first: to resize palette indices mixes unrelated colours
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(pixels):
    """(…, 3, R, R) in 0..1 -> what the vision tower expects: (pixels - mean) / std of each channel."""
    mean, std = statistics_on(pixels.device)
    return (pixels - mean) / std


@functools.lru_cache(maxsize=16)
def statistics_on(device):
    """CLIP_MEAN and CLIP_STD, (3, 1, 1) each: sent to a device once, for a copy would wait until it is idle."""
    return [torch.tensor(channels, device=device).view(3, 1, 1) for channels in (CLIP_MEAN, CLIP_STD)]


def training_pixels(image, size, name):
    """The pixels of training: the bytes of a image file, or a PIL image, painted -> (3, size, size) uint8. Raises BadInput with
    its name when it cannot be read.

    Evaluation's figures are compared with those of other programs, so its pixels are Pillow's, bit for bit. Training has no such
    duty, but often waits for its images: so it takes faster ways, to pixels that differ by less than anyone sees (of 255, on
    photos: 0.005 on average and 2 at most; decoded at a reduced scale 0.1 to 0.8, and 7).
    """
    if isinstance(image, Image.Image):
        return to_uint8(image, size)
    with refused_as(name):
        encoded, image = image, open_image(image)
        whole = image.size
        # A large JPEG is decoded at 1/2, 1/4 or 1/8, a part of the work; each side stays twice as long as needed.
        image.draft(None, (2 * size, 2 * size))
        pixels = None
        if image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == whole:     # not to be reduced
            if image.getexif().get(ORIENTATION, 1) == 1:
                pixels = jpeg_pixels(encoded)
        if pixels is None:                                                      # every other kind of image
            image.load()
            pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)                   # (3, H, W)
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
ENDINGS = {f".{kind}" for kind in (*IMAGE_TYPES, "jpe", "jfif", "avif", "jp2", "ppm", "pgm", "ico", "tga", "heic", "heif")}


def image_files(folder):
    """Every image under a folder, at any depth, known by the ending of its name -> paths relative to the folder, sorted; and
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


def reader_loader(dataset, workers, **options):
    """A DataLoader whose workers end with this process; it raises RuntimeError when they are stuck.

    options: as DataLoader takes them.
    """
    return DataLoader(dataset, num_workers=workers, worker_init_fn=system.reader_start(),
                      timeout=system.READER_SECONDS if workers else 0, **options)
