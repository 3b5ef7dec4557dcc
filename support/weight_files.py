"""support.weight_files"""
import json
import os
import pickle
import warnings
import zipfile

import torch

from support.system import BadInput


def open_file(path, mapped=True):
    """The dictionary in a file, whatever wrote it. Executes nothing from it. BadInput when it is damaged or no dictionary."""
    if not path.is_file():
        raise BadInput(f"{path}: neither a file nor a folder")                  # a pipe would be waited for
    try:
        with open(path, "rb") as f:
            start = f.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():                                           # torch.load itself checks no checksums
                    raise zipfile.BadZipFile("a checksum is wrong")
                scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
                # what is compressed cannot be used in place
                mapped &= all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
                content = read_torchscript(archive) if scripted else torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        elif start[8:] == b"{":                                                 # after the length of its JSON, see read_safetensors
            content = read_safetensors(path)
        else:                                                                   # the format of torch before 1.6: BERTs of that time
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                                 # about odd pickles, which fail anyway
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # many kinds for a damaged file
        # "global": of torch's weights-only unpickler, and of ours
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise BadInput(f"{path}: it holds more than tensors and plain values, and reading that could run code: refused") from None
        reason = (str(error).splitlines() or [""])[0][:120]
        raise BadInput(f"{path}: not a readable checkpoint: truncated, damaged, or something else "
                       f"({type(error).__name__}: {reason})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a table of named tensors")
    return content


def open_folder(path):
    """The tensors of a Hugging Face folder: one file, or shards listed in an index.

    They are read into memory: a quarter of them, queries, keys and values, is joined afterwards, and would be there twice if it
    stayed in the files' pages, too.
    """
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    file = next((path / name for name in names if (path / name).exists()), None)
    if file is None:
        hint = f", perhaps {path / 'best.pt'}" if (path / "best.pt").exists() else ""
        raise BadInput(f"{path}: a folder without {' or '.join(names[::2])}; name the file{hint}")
    if file.suffix != ".json":
        return open_file(file, mapped=False)
    shard_of, tensors = read_json(file).get("weight_map"), {}
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) and name == os.path.basename(name) for name in shard_of.values()):
        raise BadInput(f"{file}: its weight_map does not map tensors to files of the folder")
    for name in sorted(set(shard_of.values())):
        if not (path / name).is_file():
            raise BadInput(f"{path / name}: missing, but listed in {file.name}")
        shard = open_file(path / name, mapped=False)
        wrong = sorted(map(str, shard.keys() ^ {key for key, where in shard_of.items() if where == name}))
        if wrong:
            how = "not listed for it in" if wrong[0] in shard else "missing, but listed in"
            raise BadInput(f"{path / name}: {wrong[0]} is {how} {file.name}")
        tensors |= shard
    return tensors


def read_json(path):
    """The object in a JSON file, as a dictionary; BadInput when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object")
    return content


# https://huggingface.co/docs/safetensors: 8 bytes n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the numbers
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """-> {name: tensor}. Raises when the bytes are not exactly those that the header announces."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            x = torch.empty(entry["shape"], dtype=SAFETENSORS[entry["dtype"]])
            if entry["data_offsets"] != [end, end + x.nbytes]:
                raise ValueError(f"{name} does not lie where the header says")
            end += f.readinto(x.view(-1).view(torch.uint8).numpy()) if x.nbytes else 0
            if end != entry["data_offsets"][1]:
                raise ValueError("the file ends too early")
            tensors[name] = x
        if f.read(1):
            raise ValueError("the file goes on after its last tensor")
    return tensors


def write_safetensors(f, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end := end + x.numel() * x.itemsize]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                             # so that the numbers begin at a multiple of 8
    f.write(len(text).to_bytes(8, "little") + text)
    for x in tensors.values():
        f.write(x.contiguous().view(-1).view(torch.uint8).numpy())


def read_torchscript(archive):
    """The tensors of a TorchScript archive, without the code in it -> {name: tensor}.

    data.pkl describes nested modules; numbers lie in data/0, data/1, …
    """
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
    dtypes = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
              "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}

    class ScriptModule:
        """Stands for every module, whose class would come from the archive's own code."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("__torch__"):
                return ScriptModule
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if module.startswith("torch.jit._pickle"):
                return lambda value, *_: value                                  # lists of numbers and the like, which are no weights
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, shape, stride, *_: torch.as_strided(storage, shape, stride, offset)
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            raise pickle.UnpicklingError(f"global {module}.{name}")

        def persistent_load(self, reference):
            _, dtype, name, _, count = reference                                # "storage", type, file, device, length
            if not count:
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{name}")), dtype=dtype, count=count)

    tensors, waiting, seen = {}, [("", Unpickler(archive.open(f"{root}/data.pkl")).load())], set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen:
            raise ValueError("a module contains itself")
        seen.add(id(module))
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                tensors[prefix + name] = value
            elif isinstance(value, ScriptModule):
                waiting.append((f"{prefix}{name}.", value))
    return tensors
