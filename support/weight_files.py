"""Files of weights -> named tensors. No code of a file ever runs.

open_file reads .pt, .bin, .safetensors and TorchScript; open_folder a folder of Hugging Face.
"""
import json
import pickle
import warnings
import zipfile

import torch

from support.system import BadInput


def open_file(path, mapped=True):
    """The dictionary in a file, whatever wrote it. BadInput when it is damaged or no dictionary.

    `mapped`: the tensors of a .pt file stay in its pages (mmap).
    """
    if not path.is_file():
        raise BadInput(f"{path}: missing, or not a file")       # reading a pipe would wait
    try:
        content = read_any(path, mapped)
    except Exception as error:                          # damage comes in many kinds
        # "global": torch's weights-only unpickler says so, and the one below
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise BadInput(f"{path}: not only tensors; it could run code: refused") from None
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else "
                       f"({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: it holds a {type(content).__name__}, not named tensors")
    return content


def read_any(path, mapped):
    """What a file holds; the first bytes tell its format. Raises anything for a damaged one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():                       # torch.load does not verify checksums
                raise zipfile.BadZipFile("a checksum is wrong")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(archive)
            # compressed bytes cannot be used in place
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and stored)
    with open(path, "rb") as f:
        start = f.read(9)
    if start[8:] == b"{":                               # JSON after 8 bytes: see read_safetensors
        return read_safetensors(path)
    with warnings.catch_warnings():                     # the format before torch 1.6: old BERTs
        warnings.simplefilter("ignore")                 # about odd pickles, which fail anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def open_folder(path):
    """The tensors of a Hugging Face folder: one file, or shards that an index lists.

    Not mapped: its queries, keys and values are joined later, and would take memory twice.
    """
    names = ("model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json")
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
        hint = f", perhaps {path / 'best.pt'}" if (path / "best.pt").exists() else ""
        raise BadInput(f"{path}: a folder without {names[0]} or {names[2]}; name the file{hint}")
    if file.suffix != ".json":
        return open_file(file, mapped=False)
    shard_of = read_json(file).get("weight_map")        # {name of a tensor: name of a file}
    if not isinstance(shard_of, dict) or any("/" in str(name) for name in shard_of.values()):
        raise BadInput(f"{file}: its weight_map does not map tensors to files of the folder")
    tensors = {}
    for name in sorted(set(map(str, shard_of.values()))):
        shard = open_file(path / name, mapped=False)
        listed = {key for key, where in shard_of.items() if where == name}
        wrong = sorted(map(str, shard.keys() ^ listed))
        if wrong:
            raise BadInput(f"{path / name}: not the tensors that {file.name} lists: {wrong[0]}")
        tensors |= shard
    return tensors


def read_json(path):
    """The object in a JSON file, as a dictionary; BadInput when it holds none."""
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
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            x = torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]])
            if entry["data_offsets"] != [end, end + x.nbytes]:
                raise ValueError(f"{name} does not lie where the header says")
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


# ---- TorchScript


def read_torchscript(archive):
    """The tensors of a TorchScript archive, without the code in it -> {name: tensor}.

    data.pkl describes nested modules; the numbers lie in data/0, data/1, …
    """
    names = [name for name in archive.namelist() if name.endswith("/constants.pkl")]
    root = names[0].removesuffix("/constants.pkl")
    dtypes = {
        "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool,
        "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
        "IntStorage": torch.int32, "LongStorage": torch.int64,
    }

    # These classes are local, so that a pickle cannot change what the next file is read with.
    class Module:
        """Stands for every module, whose class would come from the archive's own code."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return Module
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if module.startswith("torch.jit._pickle"):
                return lambda value, *_: value          # lists of numbers, which are no weights
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda x, offset, shape, stride, *_: x.as_strided(shape, stride, offset)
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            raise pickle.UnpicklingError(f"global {module}.{name}")

        def persistent_load(self, reference):
            _, dtype, name, _, count = reference        # "storage", type, file, device, length
            if not count:
                return torch.empty(0, dtype=dtype)
            content = bytearray(archive.read(f"{root}/data/{name}"))
            return torch.frombuffer(content, dtype=dtype, count=count)

    tensors, seen = {}, set()

    def collect(module, prefix):
        if id(module) in seen:          # shared modules could take for ever to walk
            raise ValueError("a module is contained twice")
        seen.add(id(module))
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                tensors[prefix + name] = value
            elif isinstance(value, Module):
                collect(value, f"{prefix}{name}.")

    collect(Unpickler(archive.open(f"{root}/data.pkl")).load(), "")
    return tensors
