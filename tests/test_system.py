"""What every program needs of the system: errors of one line, whole files, locks, progress, downloads; and how a program ends."""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.parse
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from support import system
from support.system import BadInput
from support.weights import find

REAL_SLEEP = time.sleep


def test_messages_are_one_line_and_a_workers_message_is_unwrapped():
    assert str(BadInput("a.jsonl, line 3: 第一行\n第二行\u2028?")) == "a.jsonl, line 3: 第一行 第二行 ?"
    worker = "Caught BadInput in DataLoader worker process 0.\nTraceback …\nsupport.system.BadInput: image 3 cannot be read\n"
    assert str(BadInput(worker)) == "image 3 cannot be read"


def test_writing_keeps_links_and_devices(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    system.write_json(tmp_path / "link.json", {"新": [1]})
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == '{\n "新": [\n  1\n ]\n}\n'
    reader, writer = os.pipe()
    system.write_text(f"/dev/fd/{writer}", "into a pipe")
    assert os.read(reader, 100) == b"into a pipe"


def test_a_fault_while_a_file_is_written_is_not_called_a_full_disk(tmp_path):
    """A reader is killed in that moment: DataLoader's signal handler raises in the middle of the writing, and torch.save raises another error over it."""
    def failing(first, hidden):
        def fill(f):
            try:
                f.write(b"half")
                raise first
            except Exception:
                if hidden:
                    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
                raise
        return fill
    for hidden in (False, True):
        with pytest.raises(RuntimeError, match="pid 7"):
            system.write(tmp_path / "last.pt", failing(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), hidden))
        with pytest.raises(BadInput, match=r"last.pt: cannot be written \(.Errno 28. No space left\); nothing there was changed"):
            system.write(tmp_path / "last.pt", failing(OSError(errno.ENOSPC, "No space left"), hidden))
    with pytest.raises(BadInput, match=r"cannot be written \(is the disk full\? unexpected pos\)"):
        system.write(tmp_path / "last.pt", failing(RuntimeError("unexpected pos"), False))
    assert not list(tmp_path.iterdir())


def test_a_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path):
    code = "import sys; from support import system; held = system.lock(sys.argv[1], wait='wait' in sys.argv); print(held is not None, flush=True); sys.stdin.read()"
    ask = lambda *more: subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock", *more], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first = ask()
    assert first.stdout.readline() == "True\n"
    assert system.lock(tmp_path / "lock") is None
    waits = ask("wait")
    first.kill()
    first.wait()
    assert waits.stdout.readline() == "True\n" and system.lock(tmp_path / "lock") is None
    waits.communicate()
    with system.lock(tmp_path / "lock"), pytest.raises(OSError):
        system.lock(tmp_path / "nowhere/lock")


def test_a_reader_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    code = ("import os, sys, time; from support import system; held = system.lock(sys.argv[1]); child = os.fork()\n"
            "if child: print(child, flush=True)\n"
            "time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert system.lock(tmp_path / "lock") is None
    parent.kill()
    parent.wait()
    with system.lock(tmp_path / "lock"):
        os.kill(child, signal.SIGKILL)


def test_progress_shows_the_time_left_in_a_terminal_and_nothing_elsewhere(capfd, monkeypatch):
    def work():
        with system.progress("images embedded", 40) as progress:
            for _ in range(20):
                progress.update(2)

    monkeypatch.setattr("tqdm.std.time", iter(range(10_000)).__next__)          # a clock that goes a second at each look
    work()
    assert capfd.readouterr().err == ""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))    # 80 columns
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        terminal.write("the second:")
        monkeypatch.setenv("RANK", "1")
        work()
        monkeypatch.undo()
        terminal.write("end\n")
    shown = b""
    while not shown.endswith(b"end\r\n"):
        shown += os.read(reader, 2**16)
    assert "images embedded:  10%" in shown.decode() and "4.00/40.0 [00:04<00:18, 2.00it/s]" in shown.decode()        # 36 more at 2 a second
    assert shown.endswith(b"the second:end\r\n")


# ---------------------------------------------------------------------------------------------------------------- from the hub


def test_released_weights_are_downloaded_once_into_the_hubs_cache(hub, tmp_path):
    path = find("cn-clip-rn50")
    assert path.read_bytes() == hub.content and path.is_relative_to(tmp_path / "hub") and path.name == "clip_cn_rn50.pt"
    assert [(what, place) for what, place, _ in hub.asked] == [(what, "/OFA-Sys/chinese-clip-rn50/resolve/main/clip_cn_rn50.pt") for what in ("HEAD", "GET")]
    assert find("cn-clip-rn50") == path and len(hub.asked) == 2                 # without a connection


def test_a_file_that_is_there_is_used_without_a_connection(hub, tmp_path):
    (tmp_path / "a.pt").touch()
    assert find(str(tmp_path / "a.pt")) == tmp_path / "a.pt" and not hub.asked


def test_a_cut_connection_is_taken_up_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)                   # what is not a whole chunk comes again
    hub.cuts = [100_000, 150_000]
    assert find("cn-clip-rn50").read_bytes() == hub.content
    assert [span for what, _, span in hub.asked if what == "GET"] == [None, "bytes=100000-", "bytes=250000-"]


def test_a_download_that_fails_leaves_no_file_and_can_be_repeated(hub, tmp_path):
    hub.cuts = [100_000] + [0] * 8
    with pytest.raises(BadInput) as caught:
        find("cn-clip-rn50")
    line = str(caught.value)
    assert line.startswith("OFA-Sys/chinese-clip-rn50/clip_cn_rn50.pt: cannot be downloaded (") and "\n" not in line
    assert line.endswith("HF_ENDPOINT names a mirror, HF_HOME a new folder; or get it elsewhere and pass its path")
    assert not list((tmp_path / "hub").rglob("clip_cn_rn50.pt"))
    hub.cuts = []
    assert find("cn-clip-rn50").read_bytes() == hub.content


def test_a_file_of_another_size_than_the_hub_announced_is_refused(hub, tmp_path):
    hub.announced = 400_000
    with pytest.raises(BadInput, match="should be of size 400000"):
        find("cn-clip-rn50")
    assert not list((tmp_path / "hub").rglob("clip_cn_rn50.pt"))


@pytest.mark.parametrize("where", ["../../../../escaped", "/tmp/escaped", "..", "", "e" * 5000])
@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
def test_a_tag_that_leads_out_of_the_cache_is_refused(hub, tmp_path, header, where):
    hub.lies = {"HEAD": {header: f'"{where}"' if "ETag" in header else where}}
    before = set(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=f"the server's {header} cannot be the name of a file"):
        find("cn-clip-rn50")
    assert set(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/escaped")


@pytest.mark.parametrize("headers", [{"Content-Encoding": "gzip"}, {"Content-Length": None}])
def test_content_that_could_be_endless_is_refused(hub, headers):
    hub.lies = {"GET": headers}
    with pytest.raises(BadInput, match="does not tell the size"):
        find("cn-clip-rn50")


def test_content_that_does_not_fit_the_disk_is_refused(hub):
    hub.lies = {"GET": {"Content-Length": str(2**60)}}
    with pytest.raises(BadInput, match="no room for 1,152,921,504,606,846,976 bytes in .*hub"):
        find("cn-clip-rn50")


def test_other_content_than_its_sha256_is_refused_and_a_later_call_gets_it(hub, tmp_path):
    hub.other = bytes(len(hub.content))
    for _ in range(2):
        with pytest.raises(BadInput, match="its SHA-256 is another one than the server says"):
            find("cn-clip-rn50")
        assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size == len(hub.content)]
    hub.other = None
    assert find("cn-clip-rn50").read_bytes() == hub.content


def test_content_that_changes_between_two_ranges_is_refused_or_a_warning(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cuts, hub.tag, hub.other = [100_000], hashlib.sha256(hub.content).hexdigest(), bytes(len(hub.content))
    with pytest.raises(BadInput, match="its SHA-256 is another one"):
        find("cn-clip-rn50")
    hub.tag = "v1"
    with pytest.warns(UserWarning, match="v1: the server gave no SHA-256, so damage on the way goes unnoticed"):
        find("cn-clip-rn50")


@pytest.mark.parametrize("place", ["file:///etc/passwd", "data:,x", "ftp://127.0.0.1/x", "//"])
def test_a_redirect_to_something_else_than_http_is_refused(hub, tmp_path, place):
    hub.status, hub.lies = 302, {"HEAD": {"Location": place}}
    with pytest.raises(BadInput, match="cannot be downloaded"):
        find("cn-clip-rn50")
    assert not list((tmp_path / "hub").rglob("clip_cn_rn50.pt"))


@pytest.mark.parametrize("place, refused", [("http://127.0.0.1/x", True), ("https://127.0.0.1/x", False), ("/x", False), ("", False)])
def test_a_redirect_from_https_to_http_is_refused(place, refused):
    url = SimpleNamespace(scheme="https", join=lambda target: SimpleNamespace(scheme=urllib.parse.urlparse(urllib.parse.urljoin("https://a", target)).scheme))
    answer = SimpleNamespace(url=url, headers={"Location": place}, request=SimpleNamespace(method="HEAD"), is_success=False)
    with pytest.raises(BadInput, match="from https to") if refused else contextlib.nullcontext():
        system.check_answer(answer)


@pytest.mark.parametrize("name, message", [("cn-clip-vit-b-16", "clip_cn_vit-b-16.pt: cannot be downloaded (Client error '404 Not Found'"),
                                           ("cn-clip-vit-b-17", "cn-clip-vit-b-17: there is no such checkpoint. Name a file, a folder, or one of cn-clip-rn50")])
def test_wrong_names(hub, name, message):
    with pytest.raises(BadInput) as caught:
        find(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("scheme, message", [("http://", "Connection refused"), ("", "missing an 'http://' or 'https://' protocol"), ("http://[", "cannot be downloaded")])
def test_no_hub_at_this_address(hub, monkeypatch, scheme, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(BadInput, match=message):
        find("cn-clip-rn50")


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / "hub").write_text("")
    with pytest.raises(BadInput, match="cannot be downloaded .*tmp.*hub.*HF_HOME a new folder"):
        find("cn-clip-rn50")
    (tmp_path / "hub").unlink()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(BadInput, match="No space left on device.*HF_HOME a new folder"):
        find("cn-clip-rn50")


def test_killed_while_downloading(hub, tmp_path):
    """By another process: so HF_ENDPOINT and the cache come from the environment, as users set them. No file is half there."""
    hub.cuts, hub.pause = [100_000], threading.Event()
    code = "from support.system import download; download('OFA-Sys/chinese-clip-rn50', 'clip_cn_rn50.pt', '')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not any(what == "GET" for what, _, _ in hub.asked):
        assert child.poll() is None
        REAL_SLEEP(0.02)
    child.kill()
    child.wait()
    hub.pause.set()
    assert not list((tmp_path / "hub").rglob("clip_cn_rn50.pt"))
    assert find("cn-clip-rn50").read_bytes() == hub.content


# ---------------------------------------------------------------------------------------------------------------- a program


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation"), "there is not enough memory; in training --micro-batch or --grad-checkpointing needs less (CUDA out of memory. Tried to allocate 20 GiB.)"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory; "),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a reader of images was killed; fewer --workers need less memory (DataLoader worker (pid 7)"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …\nRuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left"),
     "/dev/shm is full; fewer --workers need less of it, --workers 0 none (RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left)"),
    (RuntimeError("The server socket has failed to listen. port: 29500, name: EADDRINUSE"), "another program uses this port; name another one (MASTER_PORT) ("),
    (RuntimeError("DataLoader timed out after 900 seconds"), "no image came: is /dev/shm full, or the disk gone? Try --workers 0 (DataLoader timed out after 900 seconds)"),
    (RuntimeError("[../gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "the connection to another process of this run broke"),
    (type("Failed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})("no C++"), "torch.compile failed; run it without --compile (no C++)"),
    (OSError("Caught OSError in DataLoader worker process 0.\nTraceback …\n[Errno 5] Input/output error"), "[Errno 5] Input/output error"),
    (MemoryError(), "there is not enough memory; in training --micro-batch or --grad-checkpointing needs less (MemoryError)"),
    (OSError(), "OSError"), (BadInput("a.csv: empty"), "a.csv: empty"), (RuntimeError("shape mismatch"), None), (KeyError("x"), None)], ids=lambda value: str(value)[:20])
def test_what_the_user_reads_of_an_error(error, line):
    said = system.error_line(error)
    assert said is None if line is None else said.startswith(line)


def test_how_a_program_ends(monkeypatch, capsys):
    monkeypatch.setattr(system.warnings, "showwarning", warnings.showwarning)   # run replaces it

    def ended(main):
        with pytest.raises(SystemExit) as stop:
            system.run(main)
        return stop.value.code

    def raises(error):
        def main():
            raise error
        return main
    assert ended(lambda: warnings.warn("one\ntwo")) == 0 and capsys.readouterr().err == "warning: one two\n"
    assert ended(raises(BadInput("a.csv: empty"))) == "error: a.csv: empty"     # Python prints it and ends with 1
    assert ended(raises(KeyboardInterrupt())) == 130 and ended(lambda: sys.exit(3)) == 3
    with pytest.raises(KeyError):                                               # a fault of ours: with its traceback
        system.run(raises(KeyError("x")))


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egpj.exe\u2066\u200f\u061c\x7f"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egpj.exe\u2066\u200f\u061c\x7f"
FAMILY = "一家人\U0001f468\u200d\U0001f469\u200d\U0001f467 naïve مرحبا"        # \u200d joins emojis; Arabic turns by itself


def test_nothing_that_is_shown_steers_the_terminal():
    """In messages, warnings, lines of output and tracebacks."""
    code = ("import sys, warnings\nfrom support import system\n"
            "def main():\n    print(sys.argv[1])\n    print('a\\tb\\nc')\n    warnings.warn(sys.argv[1])\n    raise eval(sys.argv[2])(sys.argv[1])\n"
            "system.run(main)")
    for error in ("system.BadInput", "OSError", "SystemError"):
        done = subprocess.run([sys.executable, "-c", code, HOSTILE + FAMILY, error], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 1 and done.stdout == f"{SHOWN}{FAMILY}\na\tb\nc\n" and f"warning: {SHOWN}{FAMILY}\n" in done.stderr
        assert done.stderr.endswith(f"rror: {SHOWN}{FAMILY}\n") and not set(done.stderr) & set("\x1b\x07\x9b\u202e\u2066\u200f\u061c\x7f")


def test_json_is_safe_to_show_and_reads_back(tmp_path):
    system.write_json(tmp_path / "a.json", {HOSTILE: [FAMILY, "\ud800"]})
    written = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert system.CONTROL.sub("", written.replace("\n", "")) == written.replace("\n", "") and FAMILY in written
    assert json.loads(written) == {HOSTILE: [FAMILY, "\ud800"]}


def test_of_several_processes_one_reports_the_error():
    code = "from support import system\ndef main(): raise system.BadInput('no')\nsystem.time.sleep = print\nsystem.run(main)"
    start = lambda rank: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"})
    first, second = start("0"), start("1")
    assert (first.returncode, first.stdout, first.stderr) == (1, "", "error: no\n") and (second.returncode, second.stdout) == (1, "3\n")


@pytest.mark.parametrize("command", ["{} -m tools.search --help <&- >&- 2>&-", "{} -m tools.search --help | head -1 > /dev/null; exit $(( PIPESTATUS[0] % 141 ))"])
def test_closed_and_broken_streams_are_no_error(command):
    done = subprocess.run(["bash", "-c", command.format(sys.executable)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_helper_process_ends_with_its_parent(tmp_path):
    code = ("import os, sys, time; from support import system; parent = os.getpid(); child = os.fork()\n"
            "if child: print(child, flush=True); time.sleep(60)\n"
            "system.end_with(parent); open(sys.argv[1], 'w'); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "began"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    while not (tmp_path / "began").exists():
        REAL_SLEEP(0.02)
    parent.kill()
    parent.wait()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(250):
            os.kill(child, 0)
            state = open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0]
            if state == "Z":                                                    # dead; whoever adopted it has not looked yet
                return
            REAL_SLEEP(0.02)
        os.kill(child, signal.SIGKILL)
        pytest.fail("it lives on")
