"""Files of weights -> named tensors. No code of a file ever runs.

open_file reads .pt, .bin, .safetensors and TorchScript; open_folder a folder of Hugging Face.
A small file can ask for much memory, so what it announces is compared with its size.
"""
import io
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from types import SimpleNamespace

import torch

from support.system import BadInput, sha256_of

MOST_TEXT = 2**23                                       # bytes of a pickle, of JSON
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)        # so files of torch before 1.6 begin


def open_file(path, mapped=True):
    """The dictionary in a file, whatever wrote it. BadInput when it is damaged or no dictionary.

    `mapped`: the tensors of a .pt file stay in its pages (mmap). FILE.sha256, a line of sha256sum
    beside the file, is verified.
    """
    if not os.path.isfile(path):
        raise BadInput(f"{path}: missing, or not a file")       # reading a pipe would wait
    most = 4 * path.stat().st_size + 2**26              # bytes; tensors may share their numbers
    sums = path.with_name(f"{path.name}.sha256")
    if sums.is_file():
        with open(sums, errors="replace") as f:
            told = f.read(100).lower()
        if sha256_of(path) not in told:
            raise BadInput(f"{path}: its SHA-256 is not that in {sums.name}; get the file again")
    try:
        content = read_any(path, mapped, most, sums)
        check_memory(content, most)
    except pickle.UnpicklingError as error:             # of torch's weights-only unpickler or ours
        name = re.search(r"GLOBAL ([\w.]{1,80})|$", str(error))[1] or "a pickle"
        raise BadInput(f"{path}: not only tensors ({name}); it could run code: refused") from None
    except Exception as error:                          # damage comes in many kinds
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else "
                       f"({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: it holds a {type(content).__name__}, not named tensors")
    return content


def read_any(path, mapped, most, sums):
    """What a file holds; its content tells its format. Raises anything for a damaged one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries, names = archive.infolist(), archive.namelist()
            if sum(entry.file_size for entry in entries) > most:
                raise zipfile.BadZipFile("it unpacks to far more than its size")
            if len({name.lower() for name in names}) < len(names):      # torch takes A for a
                raise zipfile.BadZipFile("it has two entries of a name")
            if archive.testzip():                       # torch.load does not verify checksums
                raise zipfile.BadZipFile("a checksum is wrong")
            for name in names:
                if name.lower().endswith("/data.pkl"):
                    check_pickles(archive.open(name).read(MOST_TEXT), 1)
            for name in names:
                if name.endswith("/constants.pkl"):
                    return read_torchscript(archive, name.removesuffix("constants.pkl"))
            # compressed bytes cannot be used in place
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and stored)
    with open(path, "rb") as f:
        start = f.read(MOST_TEXT)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return read_safetensors(path)
    if not start.startswith(LEGACY):
        kind = pickle.UnpicklingError if start.startswith(b"\x80") else ValueError
        raise kind("no file of weights begins like this")
    check_pickles(start, 5)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not sums.is_file():
        warnings.warn(f"{path}: this old format has no checksum; compare its SHA-256 with that of "
                      f"the source, and keep that as {sums.name}, which is verified")
    return content


def check_pickles(content, count):
    """Look through `count` pickles without making anything. Raises when one is odd, or cut."""
    f = io.BytesIO(content)
    for _ in range(count):
        for code, value, place in pickletools.genops(f):
            newer = code.proto > 2                      # torch writes protocol 2
            buffer = code.name == "GLOBAL" and value.endswith(" bytearray")     # bytearray(10**10)
            table = "PUT" in code.name and int(value) > place       # PUT 10**9 makes one as long
            if newer or buffer or table:
                raise pickle.UnpicklingError(f"{code.name} {str(value)[-9:]}")


def check_memory(content, most):
    """ValueError: a tensor has no plain numbers of its own, or all take more than `most` bytes."""
    todo, count, total = [("", content)], 0, 0
    while todo:
        name, x = todo.pop()
        count += 1
        if count + len(todo) > 2**22:                   # a list can hold itself, or another twice
            raise ValueError("it holds millions of values")
        if isinstance(x, dict):
            getattr(x, "__dict__", {}).clear()          # an attribute could hide a method, keys
            todo += dict.items(x)
        elif isinstance(x, (list, tuple)):
            todo += [(name, y) for y in x]
        elif torch.is_tensor(x):
            vars(x).clear()                             # or isfinite
            odd = x.layout != torch.strided or x.is_nested or x.is_meta or x.is_neg() or x.is_conj()
            if odd or x.untyped_storage().nbytes() < x.nbytes:
                raise ValueError(f"{str(name)[:99]} is sparse, nested, meta, negated or expanded")
            total += x.nbytes
    if total > most:
        raise ValueError(f"its tensors would take {total:,} bytes, far more than the file's")


def open_folder(path):
    """The tensors of a Hugging Face folder: one file, or shards that an index lists."""
    names = ("model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
        hint = f", perhaps {path / 'best.pt'}" if (path / "best.pt").exists() else ""
        raise BadInput(f"{path}: a folder without {names[0]} or {names[2]}; name the file{hint}")
    # Not mapped: to_ours joins queries, keys and values, which would take memory twice.
    if file.suffix != ".json":
        return open_file(file, mapped=False)
    shard_of = read_json(file).get("weight_map")        # {name of a tensor: name of a file}
    if not isinstance(shard_of, dict) or any("/" in str(name) for name in shard_of.values()):
        raise BadInput(f"{file}: its weight_map does not map tensors to files of the folder")
    tensors, listed = {}, {}
    for key, name in shard_of.items():
        listed.setdefault(str(name), set()).add(key)
    for name, keys in sorted(listed.items()):
        shard = open_file(path / name, mapped=False)
        wrong = min(map(str, shard.keys() ^ keys), default="")[:100]
        if wrong:
            raise BadInput(f"{path / name}: not the tensors that {file.name} lists: {wrong}")
        tensors |= shard
    return tensors


def read_json(path):
    """The object in a JSON file, as a dictionary; BadInput when it holds none."""
    if not path.is_file() or path.stat().st_size > MOST_TEXT:
        raise BadInput(f"{path}: not a file, or larger than {MOST_TEXT:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object")
    return content


# ---- safetensors (https://huggingface.co/docs/safetensors)
#
# 8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the numbers.
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path):
    """-> {name: tensor}. Raises unless the bytes are exactly those that the header announces."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(min(length, MOST_TEXT)))
        if not isinstance(header, dict) or length > MOST_TEXT:
            raise ValueError(f"its header is no object, or has over {MOST_TEXT:,} bytes")
        header.pop("__metadata__", None)
        tensors, end, size = {}, 0, path.stat().st_size - 8 - length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            # meta: without memory, until the file is known to have as many bytes
            x = torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]], device="meta")
            if entry["data_offsets"] != [end, end + x.nbytes] or end + x.nbytes > size:
                raise ValueError(f"{name[:100]} does not lie where the header says")
            x = torch.empty_like(x, device="cpu")
            if x.nbytes and f.readinto(x.view(-1).view(torch.uint8).numpy()) != x.nbytes:
                raise ValueError("the file ends too early")
            end += x.nbytes
            tensors[name] = x
        if f.read(1):
            raise ValueError("the file goes on after its last tensor")
    return tensors


def write_safetensors(f, tensors):
    """Write {name: tensor} into an open file."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    for name, x in tensors.items():
        offsets = [end, end + x.nbytes]
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # the numbers begin at a multiple of 8
    f.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        f.write(x.contiguous().view(-1).view(torch.uint8).numpy())


def read_torchscript(archive, root):
    """The tensors of a TorchScript archive, without the code in it -> {name: tensor}.

    In the folder `root`, data.pkl describes nested modules; the numbers lie in data/0, data/1, …
    """
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return SimpleNamespace                  # for a class in the archive's own code
            kind = getattr(torch, name.removesuffix("Storage").lower(), None)   # torch.half, …
            if module == "torch" and isinstance(kind, torch.dtype):
                return kind
            if module.startswith("torch.jit._pickle"):
                return lambda value, *_: value          # lists of numbers, which are no weights
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda x, offset, shape, stride, *_: x.as_strided(shape, stride, offset)
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

        def persistent_load(self, reference):
            _, dtype, name, _, count = reference        # "storage", type, file, device, length
            if not count:
                return torch.empty(0, dtype=dtype)
            if (name, dtype) not in storages:
                content = bytearray(archive.read(f"{root}data/{name}"))
                storages[name, dtype] = torch.frombuffer(content, dtype=dtype)
            return storages[name, dtype]

    tensors, storages = {}, {}
    todo = [("", Unpickler(archive.open(f"{root}data.pkl")).load())]
    while todo:
        prefix, module = todo.pop()
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                tensors[prefix + name] = value
            elif isinstance(value, SimpleNamespace):
                todo.append((f"{prefix}{name}.", value))
        vars(module).clear()            # a module in itself would take for ever
    return tensors
