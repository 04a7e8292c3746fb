"""Whole files or none, and a lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from stepfold.calibration.durable import LOCK, locked, remove_partials, replacing
from stepfold.loop.errors import StepfoldError, UsageError


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_it_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, move = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), move(a, b)))
    with replacing(tmp_path / "file") as stream:
        stream.write(b"x")
    assert order == ["file", "replace", "folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no")])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as stream:
        stream.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, "room on the disk"), (errno.EIO, "can be written")])
def test_what_the_system_refuses_names_the_path(tmp_path: Path, number: int, expected: str) -> None:
    path = tmp_path / "file"
    with (
        pytest.raises(StepfoldError, match=f"^{path}: expected .*{expected}; received: {os.strerror(number)}"),
        replacing(path),
    ):
        raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".store.json.0a1b2c3d.partial", "store.json", "notes.partial"):
        (tmp_path / name).touch()
    remove_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"store.json", "notes.partial"}


HOLD = """
import sys
from pathlib import Path
from stepfold.calibration.durable import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(UsageError, match=f"^{tmp_path}: another process is calibrating into this store"),
        locked(tmp_path),
    ):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_who_waits_goes_on_when_the_other_is_done(tmp_path: Path) -> None:
    got = Event()

    def second() -> None:
        with locked(tmp_path, wait=True):
            got.set()

    waiting = Thread(target=second)
    with locked(tmp_path):
        waiting.start()
        assert not got.wait(0.3)
    assert got.wait(60)
    waiting.join()


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass
