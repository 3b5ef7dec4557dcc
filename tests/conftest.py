import base64
import hashlib
import http.server
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import checkpoint
import train
from model import CONFIGS
from support import system
from support.system import BadInput
from tools import bench
import peers

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: for `make test-all` alone: full-size models, kills by the dozen, memory at size")


def png(colour=(200, 30, 30), size=(20, 12), seed=None):
    """Bytes of a small PNG: of one colour, or noise."""
    image = Image.new("RGB", size, colour)
    if seed is not None:
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def jpeg(seed=0):
    """Bytes of a small JPEG of noise."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png(size=(40, 30), seed=seed))).save(out, "JPEG")
    return out.getvalue()


def bomb(side=10_000):
    """A PNG of a few bytes that says it has side x side pixels."""
    chunk = lambda kind, content: struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def write_tar(path, files):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tsv_split(folder, split, images=12, captions_per_image=1, start=1):
    """A split in the Chinese-CLIP layout: image ids start…, caption k of image i says so."""
    folder.mkdir(exist_ok=True, parents=True)
    rows, texts = [], []
    for i in range(start, start + images):
        rows.append(f"{i}\t{base64.b64encode(png(seed=i)).decode()}\n")
        texts += [{"text_id": 10 * i + k, "text": f"第{i}张图片，说法{k}", "image_ids": [i]} for k in range(captions_per_image)]
    (folder / f"{split}_imgs.tsv").write_text("".join(rows))
    (folder / f"{split}_texts.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")


@pytest.fixture
def tsv_folder(tmp_path):
    folder = tmp_path / "little"
    for split, start in (("train", 1), ("valid", 101), ("test", 201)):
        write_tsv_split(folder, split, start=start)
    return folder


@pytest.fixture
def small_sizes(monkeypatch):
    """Widths of the small models of peers.py: shapes do not tell heads, the table of sizes does."""
    monkeypatch.setitem(CONFIGS, "small-vit", peers.VIT)
    monkeypatch.setitem(CONFIGS, "small-resnet", peers.RESNET)


@pytest.fixture
def small_bench(small_sizes, tmp_path, monkeypatch):
    """bench.py --model small-vit, with --peer too: its sizes in files as cn_clip has them, in this process, and without the seconds for the largest matrix product."""
    cfg = CONFIGS["small-vit"]
    (tmp_path / "vision.json").write_text(json.dumps(dict(embed_dim=cfg.embed_dim, image_resolution=cfg.image_size, vision_layers=cfg.vision_layers, vision_width=cfg.vision_width,
                                                          vision_patch_size=cfg.patch_size)))
    (tmp_path / "text.json").write_text(json.dumps(dict(
        vocab_size=cfg.vocab_size, text_attention_probs_dropout_prob=0.1, text_hidden_act="gelu", text_hidden_dropout_prob=0.1, text_hidden_size=cfg.text_width, text_initializer_range=0.02,
        text_intermediate_size=4 * cfg.text_width, text_max_position_embeddings=cfg.text_positions, text_num_attention_heads=cfg.text_heads, text_num_hidden_layers=cfg.text_layers,
        text_type_vocab_size=2)))
    monkeypatch.setitem(checkpoint.PEER_NAMES, "small-vit", (str(tmp_path / "vision"), str(tmp_path / "text")))
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "peak", lambda device, dtype: 1e9)
    monkeypatch.setattr("support.processes.bf16_is_fast", lambda device: False)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images with real Chinese text, if there is one."""
    folder = os.environ.get("CE_CLIP_REAL_DATA")
    if not folder:
        pytest.skip("CE_CLIP_REAL_DATA is not set: no real images to test on")
    return Path(folder)


@pytest.fixture
def called(monkeypatch, capsys):
    """module.main() with these arguments, in this process (a tenth of the time of `script`) -> what it prints (stdout)."""
    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out
    return run


@pytest.fixture
def stopped(called):
    """The one line with which module.main() refuses these arguments."""
    def run(module, *args):
        with pytest.raises(BadInput) as caught:
            called(module, *args)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    return run


@pytest.fixture
def trained(monkeypatch):
    """train.py with these arguments, in this process (a tenth of the time of `script`)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        train.main()
    return run


@pytest.fixture
def stops(trained):
    """The message with which train.py stops on these arguments."""
    def run(*arguments):
        with pytest.raises(BadInput) as caught:
            trained(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)
    return run


class Hub(http.server.BaseHTTPRequestHandler):
    """A little Hugging Face hub with one file, server.file: sizes, hashes and ranges; it cuts connections when told to."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        hub, name = self.server, self.path.rpartition("/")[2]
        if "/resolve/" not in self.path:                                        # what huggingface_hub asks beside files
            return self.head(404)
        span = self.headers.get("Range")
        hub.asked.append((self.command, self.path, span))
        if name != hub.file:
            return self.head(404, **{"X-Error-Code": "EntryNotFound"})
        first, size = int(span.removeprefix("bytes=").rstrip("-")) if span else 0, len(hub.content)
        more = {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if span else {}
        announced = str(hub.announced or size)
        self.head(hub.status or (206 if span else 200), **{"Content-Length": str(size - first), "ETag": f'"{hub.tag or hashlib.sha256(hub.content).hexdigest()}"',
                                           "X-Repo-Commit": "c" * 40, "X-Linked-Size": announced, **more, **hub.lies.get(self.command, {})})
        if send:
            body = (hub.other or hub.content)[first:]
            self.wfile.write(body[: hub.cuts.pop(0)] if hub.cuts else body)
            self.wfile.flush()
            hub.pause.wait(60)

    def head(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The little hub, for this process and for those that it starts; the hub's cache is tmp_path/hub."""
    from huggingface_hub import constants
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.file, server.content = "clip_cn_rn50.pt", random.Random(0).randbytes(300_000)
        server.tag, server.asked, server.cuts, server.announced = None, [], [], None
        server.lies, server.status, server.other = {}, None, None               # headers {"HEAD" or "GET": {name: value}}, status, content
        server.pause = threading.Event()
        server.pause.set()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()     # looks every 0.02 s whether it is to end
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)                     # read from the environment when it was imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("CE_CLIP_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(system.time, "sleep", lambda _: None)
        yield server
        server.shutdown()


@pytest.fixture
def one_thread():
    """One thread, as `script` has: another number of threads rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def script(*args, processes=1, ok=True, env=None):
    """Run one of the scripts as a person would; -> its output (stdout and stderr)."""
    command = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*command, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def refused(*args):
    """Run a script that must fail: non-zero exit, one line on stderr, no traceback; -> that line."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def ready(pixels, ids, seed=0):
    """A micro-batch for train.train_step whose images are prepared already."""
    return SimpleNamespace(images=lambda device: pixels, ids=ids, seed=seed)


def _process(rank, function, world, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)                                                                 # as system.run does


def on_processes(function, world, folder, *args):
    """function(rank, world, *args) in `world` processes of one gloo group -> the list of what they returned."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_process, (function, world, str(folder), args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
