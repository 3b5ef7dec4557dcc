"""What every script needs of the system it runs on: errors of one line, whole files or none, downloads, progress, memory.

    system.run(main)                                    # run a script's main: what a person can mend ends it with one line, no traceback
    raise BadInput("a.csv, line 3: …; do this")         # such a line
    system.write_text("settings.json", text)            # the old file or the whole new one, at every moment

Of the standard library alone, and nothing of ours: so every other file may use it.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import http.client
import json
import os
import re
import select
import signal
import sys
import time
import unicodedata
import urllib.request
import warnings
from pathlib import Path

from tqdm import tqdm


class BadInput(Exception):
    """Something a person can mend. The message is one line: what is wrong, where, and what to do. The scripts print it and exit with 1.

    A DataLoader wraps a worker's exception in a traceback and hands it on as the new message: of that, only its last line is kept.
    """

    def __init__(self, message):
        if message.startswith("Caught BadInput in DataLoader worker"):
            message = message.strip().splitlines()[-1].removeprefix("support.system.BadInput: ")
        super().__init__(" ".join(message.splitlines()))


# ---------------------------------------------------------------------------------------------------------------- files


def write(path, fill, shown=None, part=".part"):
    """At every moment `path` is the old file or the whole new one.

    fill(f) writes it beside its place, under its name + `part`; it is flushed to the disk, then renamed. `shown`: its name in a
    message. Of processes that write the same file at the same time each needs a `part` of its own. A link stays, what it points
    to is written; into a device or a pipe (/dev/stdout) it is written directly. BadInput when it cannot be written.
    """
    if is_device(path):
        with open(path, "wb") as f:
            return fill(f)
    shown, path = shown or path, Path(path).resolve()
    part = path.with_name(path.name + part)
    try:
        part.unlink(missing_ok=True)                                            # of a killed run; or a link, whose target is not ours
        with open(part, "xb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                                    # RuntimeError: torch.save says so that the disk is full
        with contextlib.suppress(OSError):
            part.unlink()                                                       # a full disk needs the room
        raise BadInput(f"{shown}: cannot be written ({error.__context__ or error}); nothing there was changed") from None


def is_locked(file):
    """Whether this process holds the lock on an open file, now; False for None. It is held until the process ends or closes the file.

    Not flock: readers would inherit the lock, and may outlive a process that is killed.
    """
    try:
        return file is not None and fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    except (BlockingIOError, PermissionError):                                  # another process holds it: systems say it in two ways
        return False


def write_text(path, text, **options):
    # names of files need not be text
    write(path, lambda f: f.write(text.encode(errors="backslashreplace")), **options)


def is_device(path):
    """Whether it is there and neither a file nor a folder: /dev/null, /dev/stdout, a pipe, …"""
    return Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir()


def check_place(flag, path):
    """Refuse, before the work, a file name that could not be written after it."""
    if path is not None and (not path or Path(path).is_dir() or not (is_device(path) or os.access(Path(path).resolve().parent, os.W_OK))):
        raise BadInput(f"{flag} {path!r}: name a file in a folder that is there and can be written to")


def cache_folder():
    """Where downloads and indexes are kept."""
    return Path(os.environ.get("CE_CLIP_CACHE") or Path.home() / ".cache/ce-clip")


def utf8_lines(path):
    """(number from 1, text) of every line. Raises BadInput for one that is not UTF-8."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            coding = "utf-8-sig" if number == 1 else "utf-8"                    # spreadsheets put a byte-order mark first
            try:
                yield number, line.decode(coding)
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}, line {number}: not UTF-8 ({error.reason}); "
                               "save the file as UTF-8 (in a spreadsheet: CSV UTF-8)") from None


# ---------------------------------------------------------------------------------------------------------------- a terminal


def printable(text):
    """A text on one line of a terminal: line ends and other control characters, which names of files may hold, as \\n, \\x1b, …"""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in str(text))


def progress(what, total):
    """A tqdm bar with the time left, on stderr; silent where that is no terminal, and in all processes but the first."""
    quiet = True if int(os.environ.get("RANK", 0)) else None                    # None: tqdm looks whether stderr is a terminal
    return tqdm(total=total, desc=what, disable=quiet, leave=False, delay=2, unit_scale=True)


# ---------------------------------------------------------------------------------------------------------------- from the web


def hub_url(place):
    """The address of a file of the Hugging Face hub, or of the mirror that HF_ENDPOINT names. (Proxies: https_proxy, as everywhere.)"""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise BadInput(f"HF_ENDPOINT={endpoint}: it must begin with https://")
    return f"{endpoint}/{place}"


def download(url, path, tries=5):
    """A file from the web, whole or not at all -> path. A file that is there is not asked for again.

    Its size is verified, and its SHA-256 where the server tells it (the hub does). A download that was cut goes on where it
    stopped: up to `tries` times in one call, and when called again. Of several processes that ask, one loads and the others
    wait. Raises BadInput when the file cannot be had.
    """
    path = Path(path)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(path.name + ".lock"), "w")
    except OSError as error:
        raise BadInput(f"{path.parent}: cannot be used as the folder of downloads ({error})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                                        # let go when the file is closed, or the process dies
        if path.exists():
            return path
        for attempt in range(1, tries + 1):
            try:
                place, size, tag = remote_file(url)
                version = hashlib.md5(f"{tag} {size}".encode()).hexdigest()[:8]                     # of the file: another one begins anew
                part = path.with_name(f"{path.name}.{version}.part")
                have = part.stat().st_size if part.exists() else 0
                if have < size:
                    amount = f"{(size - have) / 2**20:,.0f}" + (f" of {size / 2**20:,.0f}" if have else "")
                    print(f"downloading {url} to {path}: {amount} MiB", file=sys.stderr, flush=True)
                    fetch_rest(place, part, have, size)
            except urllib.error.HTTPError as error:
                problem, passing = error, error.code >= 500 or error.code in (408, 429)             # timeout, too many requests
            except (OSError, http.client.HTTPException) as error:               # of the network; a full disk is BadInput already
                reason = " ".join(str(getattr(error, "reason", None) or error).split())
                problem, passing = reason or type(error).__name__, True
            except ValueError as error:                                         # an address that is none
                problem, passing = error, False
            else:
                break
            if attempt == tries or not passing:
                again = "Run it again to go on from there; " * passing
                raise BadInput(f"{url}: cannot be downloaded ({problem}). {again}HF_ENDPOINT names a mirror, https_proxy a proxy; "
                               "or load the file by other means and pass its path")
            print(f"{url}: {problem}; trying again in {2**attempt} s", file=sys.stderr, flush=True)
            time.sleep(2**attempt)
        if re.fullmatch("[0-9a-f]{64}", tag) and sha256_of(part) != tag:
            part.unlink()
            raise BadInput(f"{url}: what arrived is not what the server announced (SHA-256); it was deleted. Run it again")
        os.replace(part, path)
    return path


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Redirects are not followed: urllib raises them as HTTPError, with the headers that we want."""

    def redirect_request(self, *_):
        return None


def remote_file(url):
    """-> (address, size in bytes, tag of this version: for large files of the hub their SHA-256), asked for without the file.

    The hub tells size and tag where it redirects to its storage. BadInput when the server does not tell the size.
    """
    opener = urllib.request.build_opener(_StayHere)
    for _ in range(6):
        try:
            headers = opener.open(urllib.request.Request(url, method="HEAD"), timeout=30).headers
        except urllib.error.HTTPError as error:
            headers = error.headers
            if error.code not in (301, 302, 303, 307, 308):
                raise
            if "X-Linked-Size" not in headers:                                  # moved
                url = urllib.parse.urljoin(url, headers["Location"])
                continue
        size = headers["X-Linked-Size"] or headers["Content-Length"] or "0"
        if not size.isdecimal() or not int(size):
            raise BadInput(f"{url}: the server does not say how large the file is, so it could not be verified")
        tag = headers["X-Linked-ETag"] or headers["ETag"] or ""
        return url, int(size), tag.removeprefix("W/").strip('"').lower()
    raise BadInput(f"{url}: redirected without end")


def fetch_rest(url, part, have, size):
    """Append to `part` what comes after its first `have` bytes, of `size` in all.

    Raises ConnectionError when the connection ends too early, BadInput when the disk does not take it.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206 or not (answer.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            have = 0                                                            # not what was asked for: take it as the whole file
        bar = progress(f"{part.name.rsplit('.', 2)[0]}: MiB", size / 2**20)
        with open(part, "ab" if have else "wb") as f, bar:
            while have < size and (block := answer.read1(min(2**20, size - have))):
                try:
                    f.write(block)
                    f.flush()
                except OSError as error:
                    raise BadInput(f"{part}: cannot be written ({error})") from None
                have += len(block)
                bar.update(len(block) / 2**20)
            os.fsync(f.fileno())
    if have < size:
        raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f, progress(f"{path.name}: MiB verified", os.path.getsize(path) / 2**20) as bar:
        while block := f.read(2**20):
            digest.update(block)
            bar.update(len(block) / 2**20)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- helper processes


# How long to wait for one batch: a full /dev/shm, for one, makes a reader wait for ever, without a word.
READER_SECONDS = 900


def reader_start():
    """For DataLoader's worker_init_fn: readers get a session of their own, and end with the process that they read for.

    Why: Ctrl-C and torchrun's SIGTERM go to whole process groups. Readers leave it, for the process they read for still needs them
    to finish its step. But they end with it: DataLoader's own watch misses a process that is killed while its readers start, and
    then they would stay for ever.
    """
    return functools.partial(_start_reader, os.getpid())


def _start_reader(parent, _):
    os.setsid()
    end_with(parent)


def end_with(parent, number=signal.SIGKILL):
    """This process gets a signal when its parent, a process number, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)                                      # PR_SET_PDEATHSIG
    if os.getppid() != parent:                                                  # it died before that
        os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------------------------- memory


def keep_freed_memory():
    """What is freed stays with the process and is used again. (Linux with glibc; elsewhere nothing is done.)

    Else the C library gives each large tensor back to the system and asks for the next one, whose pages the system first must
    find and clear: a quarter of the time of a training step on a CPU.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)                                                  # M_MMAP_MAX: how many tensors may have a block of their own
        library.mallopt(-1, 2**31 - 1)                                          # M_TRIM_THRESHOLD: how much may lie free at the end


def free_memory():
    """As it is without keep_freed_memory, for the benchmark: tensors of 32 MiB or more go back to the system, and twice that at the end.

    (32 MiB is a limit that the C library soon comes to by itself.)
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 65536)
        library.mallopt(-3, 2**25)                                              # M_MMAP_THRESHOLD
        library.mallopt(-1, 2**26)


# ---------------------------------------------------------------------------------------------------------------- a script


def run(main):
    """Run a script's main, then end the process: with 0, or with one line and exit status 1 for what a person can mend.

    That is BadInput, failed reads or writes, lost readers or partners, and too little memory. Warnings become one line each,
    without Python's source line. Under torchrun a mistake that all processes meet is told by the first alone.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:                                          # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    keep_freed_memory()
    # a terminal that knows no Chinese shows \u732b, and the run goes on
    sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print("warning:", " ".join(str(message).splitlines()), file=sys.stderr, flush=True)
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = stop.code
    except BrokenPipeError as error:
        status = f"error: {error}"
        (out := select.poll()).register(sys.stdout.fileno(), 0)
        if out.poll(0):                                                         # nobody reads on: | head has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
    except (BadInput, OSError) as error:
        status = f"error: {str(error).strip().splitlines()[-1]}"                # an OSError of a reader comes with a traceback before it
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            status = ("error: a process that read images was killed, perhaps for want of memory; fewer --workers need less. "
                      "A training run continues with the same command")
        elif str(error).startswith("DataLoader timed out"):
            status = (f"error: no image came from its readers within {READER_SECONDS} s: is /dev/shm full, or the disk gone? "
                      "--workers 0 does without them")
        elif "out of memory" in str(error) or "can't allocate memory" in str(error):                # of a GPU, of the CPU
            status = (f"error: there is not enough memory ({str(error).splitlines()[0][:200]}); "
                      "in training a smaller --micro-batch or --grad-checkpointing needs less")
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            status = f"error: torch.compile failed ({str(error).strip().splitlines()[0][:200]}); without --compile the run goes on"
        elif "onnection" in str(error):                                         # gloo: "Connection closed by peer", "… reset by peer", …
            status = "error: the connection to another process of this run broke; the error line of that process says why"
        else:
            raise
    if isinstance(status, str) and int(os.environ.get("RANK", 0)):
        time.sleep(3)                                                           # had the first process failed too, torchrun ends this one
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # at once: threads of torch.distributed that are still there can crash a Python that ends in the usual way
    os._exit(status or 0)


def write_json(path, content):
    if path is not None:
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        print(f"wrote {path}")
