"""What every script needs of the system: errors of one line, writing, progress, downloads; and how a script ends."""
import concurrent.futures
import hashlib
import os
import pty
import random
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from conftest import ROOT

import checkpoint
from support import system
from support.system import BadInput
from support.weights import find

REAL_SLEEP = time.sleep


def test_messages_are_one_line_and_a_workers_message_is_unwrapped():
    assert str(BadInput("a.jsonl, line 3: 第一行\n第二行\u2028?")) == "a.jsonl, line 3: 第一行 第二行 ?"
    assert str(BadInput("Caught BadInput in DataLoader worker process 0.\nTraceback …\nsystem.BadInput: image 3 cannot be read\n")) == "image 3 cannot be read"


def test_writing_keeps_links_and_devices(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    system.write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == "new"
    reader, writer = os.pipe()
    system.write_text(f"/dev/fd/{writer}", "into a pipe")
    assert os.read(reader, 100) == b"into a pipe"


def test_progress_shows_the_time_left_in_a_terminal_and_nothing_elsewhere(capfd, monkeypatch):
    def work(seconds):
        with system.Progress("images embedded", 40) as progress:
            for _ in range(20):
                time.sleep(seconds / 20)
                progress.add(2)

    monkeypatch.setattr(system.time, "time", iter(range(10_000)).__next__)      # a clock that goes a second at each look
    work(0)
    assert capfd.readouterr().err == ""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work(0)
        monkeypatch.setenv("RANK", "1")
        work(0)
    shown = os.read(reader, 2**16).decode()
    assert "images embedded: 20 of 40, 0:00:" in shown and shown.endswith("\x1b[K") and shown.count("40 of 40") == 1


# ---------------------------------------------------------------------------------------------------------------- from the web


def finished(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix not in (".lock", ".part")) if folder.exists() else []


def test_a_cut_connection_goes_on_where_it_stopped(hub, tmp_path):
    hub.cuts = [1_000_000, 1_500_000]
    assert find("cn-clip-rn50").read_bytes() == hub.content
    assert [span for what, _, span in hub.asked if what == "GET"] == ["bytes=0-", "bytes=1000000-", "bytes=2500000-"]


def test_a_download_that_failed_for_good_is_continued_by_the_next_call(hub, tmp_path):
    hub.cuts = [500_000, 0, 0, 0, 0]
    with pytest.raises(BadInput, match="cannot be downloaded .*500,000 of 3,000,000 bytes.*HF_ENDPOINT names a mirror"):
        find("cn-clip-rn50")
    assert finished(tmp_path / "cache") == []
    assert find("cn-clip-rn50").read_bytes() == hub.content and hub.asked[-1][2] == "bytes=500000-"


def test_a_server_without_ranges_sends_the_whole_again(hub, tmp_path):
    hub.ranges, hub.cuts = False, [1_000_000]                                   # and the next part does not begin with the last one
    assert find("cn-clip-rn50").read_bytes() == hub.content


def test_a_part_of_another_version_is_not_continued(hub, tmp_path):
    hub.cuts = [1_000_000, 0, 0, 0, 0]
    with pytest.raises(BadInput):
        find("cn-clip-rn50")
    hub.content = random.Random(1).randbytes(2_000_000)
    hub.tag = hashlib.sha256(hub.content).hexdigest()
    assert find("cn-clip-rn50").read_bytes() == hub.content


def test_what_does_not_have_the_announced_hash_is_deleted(hub, tmp_path):
    hub.tag = "0" * 64
    with pytest.raises(BadInput, match="not what the server announced"):
        find("cn-clip-rn50")
    assert finished(tmp_path / "cache") == [] and not list((tmp_path / "cache").glob("*.part"))


def test_a_file_that_is_not_there_fails_at_once(hub):
    with pytest.raises(BadInput, match="clip_cn_vit-b-16.pt: cannot be downloaded .HTTP Error 404: Not Found.. HF_ENDPOINT"):
        find("cn-clip-vit-b-16")
    assert len(hub.asked) == 1


def test_moved_repositories_are_followed(hub, tmp_path):
    assert system.download(system.hub_url("moved/clip_cn_rn50.pt"), tmp_path / "x.pt").read_bytes() == hub.content


def test_processes_share_one_download(hub, tmp_path):
    code = "import checkpoint; print(checkpoint.find('cn-clip-rn50'))"
    racing = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {p.communicate()[0].strip() for p in racing} == {str(tmp_path / "cache/clip_cn_rn50.pt")}
    assert sum(what == "GET" for what, _, _ in hub.asked) == 1


def test_an_address_without_its_beginning_fails_at_once(hub, monkeypatch):
    for endpoint, message in (("127.0.0.1:8077", "HF_ENDPOINT=127.0.0.1:8077: it must begin with https://"), ("http://[", "cannot be downloaded"), ("http://镜像", "cannot be downloaded")):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(BadInput, match=message):
            find("cn-clip-rn50")


def test_a_cache_that_is_no_folder(hub, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadInput, match="cache: cannot be used as the folder of downloads"):
        find("cn-clip-rn50")


def test_an_empty_file_is_none(hub):
    hub.content = b""
    with pytest.raises(BadInput, match="does not say how large the file is"):
        find("cn-clip-rn50")


def test_threads_share_one_download(hub):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(find, ["cn-clip-rn50"] * 6))) == 1
    assert sum(what == "GET" for what, _, _ in hub.asked) == 1


def test_killed_while_downloading_leaves_nothing_under_the_final_name(hub, tmp_path):
    hub.cuts, hub.pause = [2_000_000], threading.Event()
    child = subprocess.Popen([sys.executable, "-c", "import checkpoint; checkpoint.find('cn-clip-rn50')"], cwd=ROOT)
    while not any((tmp_path / "cache").glob("*.part")) or next((tmp_path / "cache").glob("*.part")).stat().st_size < 1_000_000:
        assert child.poll() is None
        REAL_SLEEP(0.05)
    child.kill()
    child.wait()
    hub.pause.set()
    assert finished(tmp_path / "cache") == []
    assert find("cn-clip-rn50").read_bytes() == hub.content and int(hub.asked[-1][2][6:-1]) >= 1_000_000
    assert finished(tmp_path / "cache") == ["clip_cn_rn50.pt"] and not list((tmp_path / "cache").glob("*.part"))


# ---------------------------------------------------------------------------------------------------------------- a script


def test_too_little_memory_is_one_line(monkeypatch):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation")
    monkeypatch.setattr(system.warnings, "showwarning", warnings.showwarning)   # run replaces it
    with pytest.raises(SystemExit) as stop:
        system.run(main)
    assert stop.value.code == "error: there is not enough memory (CUDA out of memory. Tried to allocate 20 GiB.); in training a smaller --micro-batch or --grad-checkpointing needs less"


@pytest.mark.parametrize("command", ["{} search.py --help <&- >&- 2>&-", "{} search.py --help | head -1 > /dev/null; exit $(( PIPESTATUS[0] % 141 ))"])
def test_closed_and_broken_streams_are_no_error(command):
    done = subprocess.run(["bash", "-c", command.format(sys.executable)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
