"""What every program needs of the system: run(main) runs one, and an error that the user can mend
(BadInput) is one line; files are whole or not written; locks, the hub, signals, helper processes.
"""
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm


class BadInput(Exception):
    """An error that the user can mend. Its message is one line: what, where, what to do."""

    def __init__(self, message):
        # A DataLoader's worker hands on a whole traceback as the message.
        if message.startswith("Caught BadInput in DataLoader worker"):
            message = message.strip().splitlines()[-1].removeprefix(f"{__name__}.BadInput: ")
        super().__init__(printable(" ".join(message.splitlines())))


# What a terminal obeys instead of showing it: control characters, line ends, changes of direction;
# and lone surrogates, which cannot be encoded.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text, kept=""):
    """A text on one line: line ends and other control characters become \\n, \\x1b, …"""
    return CONTROL.sub(lambda c: c[0] if c[0] in kept else repr(c[0])[1:-1], str(text))


def show_printable(stream, kept):
    """From now on a stream escapes the control characters that it is given, all but those kept."""
    write = stream.write
    stream.write = lambda text: write(printable(text, kept))


# ---- files


def write(path, fill, shown=None, part=".part"):
    """Write a file: `path` is the old file or the whole new one at every moment.

    fill(f) writes path + `part`, which is flushed to the disk and then renamed. Processes that
    write the same path at the same time need different `part`s. `shown` is the name for messages.
    A link is followed; a device or pipe (/dev/stdout) is written directly. Raises BadInput.
    """
    if is_device(path):
        with open(path, "wb") as f:
            return fill(f)
    shown, path = shown or path, Path(path).resolve()
    part = path.with_name(path.name + part)
    try:
        part.unlink(missing_ok=True)                    # of a killed run, or a link elsewhere
        with open(part, "xb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:            # torch.save raises RuntimeError: disk full
        with contextlib.suppress(OSError):
            part.unlink()
        why = error.__context__ or error                # torch.save hides what came first
        if "DataLoader" in str(why):                    # it raises anywhere when a reader dies
            raise why from None
        why = why if isinstance(why, OSError) else f"is the disk full? {why}"
        raise BadInput(f"{shown}: cannot be written ({why}); nothing there was changed") from None


def write_text(path, text, **options):
    encoded = text.encode(errors="backslashreplace")    # names of files may be no UTF-8
    write(path, lambda f: f.write(encoded), **options)


def write_json(path, content, **options):
    write_text(path, as_json(content, indent=1) + "\n", **options)


def as_json(content, **options):
    """JSON that is safe to show in a terminal: its control characters are \\uXXXX."""
    text = json.dumps(content, ensure_ascii=False, **options)
    return CONTROL.sub(lambda c: c[0] if c[0] == "\n" else f"\\u{ord(c[0]):04x}", text)


def stamp(path):
    """What changes when a file is replaced; None without a file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def is_device(path):
    """Whether it exists and is neither a file nor a folder: /dev/null, /dev/stdout, a pipe."""
    return Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir())


def check_place(flag, path):
    """Raise BadInput, before the work, when the result could not be written to `path` after it."""
    if path is None or is_device(path):
        return
    if not path or Path(path).is_dir() or not os.access(Path(path).resolve().parent, os.W_OK):
        raise BadInput(f"{flag} {path!r}: name a file in a folder that is there and writable")


def cache_folder():
    """The folder of our indexes: CE_CLIP_CACHE, or ~/.cache/ce-clip."""
    return Path(os.environ.get("CE_CLIP_CACHE") or Path.home() / ".cache/ce-clip")


def utf8_lines(path):
    """(number from 1, text) of every line. Raises BadInput for one that is not UTF-8."""
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(2**26), b""), 1):
            if len(line) == 2**26:
                raise BadInput(f"{path}, line {number}: longer than 64 MiB; is it a text file?")
            try:                                        # -sig: without a byte-order mark
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file "
                               "as UTF-8 (in a spreadsheet: CSV UTF-8)") from None


def lock(path, wait=False):
    """Lock a file, made if need be -> the open file; or None when another process has the lock.

    It is held until the file is closed or the process ends. With `wait` the call waits for it.
    """
    file = open(path, "a")
    try:
        # Not flock: forked readers would inherit that lock, and may live longer than this process.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):          # which of the two depends on the system
        file.close()
        return None
    return file


@contextlib.contextmanager
def filled_beside(folder):
    """`with filled_beside(folder) as part`: an empty folder beside the place of `folder`.

    The caller fills it, then renames it, or a folder in it. Afterwards `part` is gone, and so is
    what a killed run left. A second process waits for the first. Raises BadInput: the disk refuses.
    """
    place = Path(folder).absolute()
    part = place.with_name(f"{place.name}.ce-clip-part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with lock(place.with_name(f".{place.name}.lock"), wait=True):
            if part.is_dir() and not part.is_symlink():
                remove_folder(part)
            part.mkdir()
            try:
                yield part
            finally:
                with contextlib.suppress(OSError):      # it may have become `folder`
                    remove_folder(part)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({str(error)[:300]}); is there room, and may you "
                       "write there?") from None


def remove_folder(folder):
    """Remove a folder with all in it. It may be deeper than shutil.rmtree can recurse."""
    folders = [folder]
    for place in folders:                               # the list grows
        os.chmod(place, 0o700)                          # it may lack our permissions
        for entry in list(os.scandir(place)):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                os.unlink(entry.path)
    for place in reversed(folders):
        os.rmdir(place)


# ---- the Hugging Face hub, a terminal


def download(repo, name, by_hand, repo_type="model"):
    """A file of the Hugging Face hub -> its path in the hub's cache, which other programs share.

    A cached file is used without a connection; others are downloaded whole or not at all, and their
    SHA-256 is compared. `by_hand` says what to do with a file from elsewhere. Raises BadInput.
    """
    import huggingface_hub              # here, because importing it takes 0.3 s
    try:
        path = huggingface_hub.try_to_load_from_cache(repo, name, repo_type=repo_type)
        if not isinstance(path, str):   # None, or a mark that the hub has no such file
            session = huggingface_hub.get_session()
            if not hasattr(session, "event_hooks"):
                raise BadInput("the library is too old: pip install -U 'huggingface_hub>=1'")
            session.event_hooks |= {"response": [check_answer]}
            path = huggingface_hub.hf_hub_download(repo, name, repo_type=repo_type,
                                                   headers={"Accept-Encoding": "identity"})
            check_download(Path(path).resolve())
        return Path(path)
    except Exception as error:          # of the network, the disk, an address: of many classes
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise BadInput(f"{repo}/{name}: cannot be downloaded ({reason}). HF_ENDPOINT names a "
                       f"mirror, HF_HOME a new folder; or get it elsewhere and {by_hand}") from None


def check_answer(answer):
    """Refuse what huggingface_hub would accept from a server (a hook of its httpx client).

    That is a tag that, as the name of a file in the cache, leads out of it; a redirect from https
    to http; content without end, larger than the free disk, or compressed, which could be either.
    """
    for name in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
        tag = answer.headers.get(name, "none")
        if answer.request.method == "HEAD" and not re.fullmatch(r'(W/)?"?\w[\w.-]{0,99}"?', tag):
            raise BadInput(f"the server's {name} cannot be the name of a file")
    target = answer.url.join(answer.headers.get("Location", ""))
    if answer.url.scheme == "https" and target.scheme != "https":
        raise BadInput(f"the server leads from https to {target}")
    if answer.request.method == "GET" and answer.is_success:
        size = answer.headers.get("Content-Length", "")
        if not size.isdigit() or "Content-Encoding" in answer.headers:
            raise BadInput("the server does not tell the size of the file")
        from huggingface_hub.constants import HF_HUB_CACHE
        if int(size) > shutil.disk_usage(HF_HUB_CACHE).free:
            raise BadInput(f"no room for {int(size):,} bytes in {HF_HUB_CACHE}")


def check_download(path):
    """Compare a new file in the hub's cache with its name there, its SHA-256."""
    if not re.fullmatch("[0-9a-f]{64}", path.name):
        warnings.warn(f"{path}: the server gave no SHA-256, so damage on the way goes unnoticed")
    elif sha256_of(path) != path.name:
        path.unlink()
        raise BadInput("its SHA-256 is another one than the server says: it was damaged on the way")


def sha256_of(path):
    """The SHA-256 of a file, as sha256sum prints it; 1 s a GB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def progress(what, total):
    """A tqdm bar on stderr; silent when that is no terminal, and in all processes but the first."""
    quiet = True if int(os.environ.get("RANK", 0)) else None    # None: tqdm looks for a terminal
    return tqdm(total=total, desc=what, disable=quiet, leave=False, delay=2, unit_scale=True)


# ---- helper processes, memory


def start_reader(parent, _):
    """A DataLoader worker's start: it gets its own session, and ends with the process `parent`.

    Ctrl-C and torchrun's SIGTERM reach a whole process group, but a run needs its readers to finish
    its step. DataLoader's own check misses a process that is killed while its readers start.
    """
    os.setsid()
    end_with(parent)


class Interrupted(BaseException):
    """A signal came while a run was waiting. No `except Exception` of a reader catches it."""


class StopSignals:
    """SIGTERM and SIGINT (Ctrl-C), noted in `caught`, so that a run can stop after its step.

    A second one of the same kind ends the process at once. (Of the same kind: Ctrl-C under torchrun
    brings one of each.)
    """

    def __init__(self):
        self.caught, self.waiting, self.loud = [], False, False

    def catch(self, loud):
        """From now on note them. loud: say what they do."""
        self.loud = loud
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, _):
        self.caught.append(number)
        if self.loud:
            os.write(2, b"stopping after this step; once more stops at once, unsaved\n")
        signal.signal(number, signal.SIG_DFL)
        if self.waiting:
            self.waiting = False                        # so a second one raises nothing
            raise Interrupted

    def next_of(self, iterator):
        """Its next item; None, without waiting for it, when a signal came or comes."""
        try:
            self.waiting = True
            item = None if self.caught else next(iterator)
            self.waiting = False
            return item
        except Interrupted:
            return None


def end_with(parent, number=signal.SIGKILL):
    """On Linux this process gets a signal when its parent (a process number) dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)              # PR_SET_PDEATHSIG
    if os.getppid() != parent:                          # it has died already
        os.kill(os.getpid(), number)


def keep_freed_memory(keep=True):
    """Freed memory stays with the process (on Linux with glibc; elsewhere nothing happens).

    Otherwise glibc returns each large tensor to the system, which must clear the pages of the next
    one: a quarter of a training step on a CPU. `keep` False, for the benchmark, is glibc's way.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0 if keep else 65536)           # M_MMAP_MAX: most blocks of their own
        library.mallopt(-3, 2**25)                          # M_MMAP_THRESHOLD: their least size
        library.mallopt(-1, 2**31 - 1 if keep else 2**26)   # M_TRIM_THRESHOLD: most free bytes


# ---- a program

# What a RuntimeError says -> what it means, and what to do.
HINTS = {
    r"DataLoader worker \(pid": "a reader of images was killed; fewer --workers need less memory",
    "shared memory": "/dev/shm is full; fewer --workers need less of it, --workers 0 none",
    "DataLoader timed out": "no image came: is /dev/shm full, or the disk gone? Try --workers 0",
    "MemoryError|out of memory|can't allocate memory":
        "there is not enough memory; in training --micro-batch or --grad-checkpointing needs less",
    r"torch\._(dynamo|inductor)": "torch.compile failed; run it without --compile",
    "recursion depth": "folders or brackets are nested too deeply",
    "EADDRINUSE": "another program uses this port; name another one (MASTER_PORT)",
    "[Cc]onnection": "the connection to another process of this run broke; its error says why"}


def run(main):
    """Run a program's main, then end the process: with status 0, or 1 after one line of error.

    Warnings become one line each. Under torchrun the first process alone reports a shared error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:                  # the caller has closed it
            setattr(sys, name, open(os.devnull, mode))
    keep_freed_memory()
    sys.stdout.reconfigure(errors="backslashreplace")   # a terminal without Chinese shows \u732b
    show_printable(sys.stdout, "\n\t")
    show_printable(sys.stderr, "\n\t\r")              # \r: of progress bars
    warnings.showwarning = show_warning
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as stop:
        status = stop.code
    except BrokenPipeError as error:
        status = f"error: {error}"
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if output.poll(0):                              # nobody reads on: `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        status = f"error: {printable(line)}"
    failed = isinstance(status, str)
    if failed and int(os.environ.get("RANK", 0)):
        time.sleep(3)                   # if the first process failed, too, torchrun ends this one
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)                                # it prints a string; then the status is 1
    if failed:
        print(status, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # At once: threads of torch.distributed can crash a Python that ends in the usual way.
    os._exit(1 if failed else status or 0)


def show_warning(message, *_, **__):
    print("warning:", printable(" ".join(str(message).splitlines())), file=sys.stderr, flush=True)


def error_line(error):
    """The line that tells the user about an exception; None for a fault of the program."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, (BadInput, OSError)):
        return lines[-1]                                # a reader's OSError begins with a traceback
    if isinstance(error, (RuntimeError, MemoryError)):
        for sign, hint in HINTS.items():
            if re.search(sign, f"{type(error)}: {error}"):
                line = lines[-1 if lines[0].startswith("Caught") else 0]        # a reader's
                return f"{hint} ({line[:200]})"
    return None
