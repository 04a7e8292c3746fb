"""The cache: whole results or none, damage is found, room is made, and nothing that is wrong with it ends a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from threads import at_once

from stepfold.bundle.cache import ABANDONED_SECONDS, ENTRY, Cache, key_of

KEY = "a" * 64
WHAT = "compiled stage"
PARTS = {"stage": "s", "version": None}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "stages", WHAT)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A compiled stage: its main file is not the first by name."""
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "step.so").write_bytes(b"main" * 100)
    (folder / "a.bin").write_bytes(b"weights")
    return [folder / "step.so", folder / "a.bin"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def kept(cache: Cache, files: list[Path], key: str = KEY) -> Path:
    cache.keep(key, "step", PARTS, files)
    return cache.folder / key


def test_what_was_kept_is_taken(cache: Cache, files: list[Path], target: Path) -> None:
    assert cache.take(KEY, target) is None
    folder = kept(cache, files)
    assert cache.take(KEY, target) == [target / "step.so", target / "a.bin"]
    assert (target / "step.so").read_bytes() == files[0].read_bytes()
    assert sorted(path.name for path in cache.folder.iterdir()) == [KEY]
    entry = json.loads((folder / ENTRY).read_text())
    assert (entry["name"], entry["parts"], entry["main"]) == ("step", PARTS, "step.so")


def test_the_same_parts_give_the_same_key() -> None:
    assert (
        key_of({"a": 1, "b": {"c": None}}) == key_of({"b": {"c": None}, "a": 1}) != key_of({"a": 2, "b": {"c": None}})
    )


def _truncated(folder: Path) -> None:
    (folder / "step.so").write_bytes(b"main")


def _altered(folder: Path) -> None:
    (folder / "step.so").write_bytes(b"MAIN" * 100)


def _missing(folder: Path) -> None:
    (folder / "a.bin").unlink()


def _no_entry(folder: Path) -> None:
    (folder / ENTRY).unlink()


def _half_an_entry(folder: Path) -> None:
    text = (folder / ENTRY).read_text()
    (folder / ENTRY).write_text(text[: len(text) // 2])


def rewrite(folder: Path, **changes: Any) -> None:
    (folder / ENTRY).write_text(json.dumps(json.loads((folder / ENTRY).read_text()) | changes))


def _leaves_the_folder(folder: Path) -> None:
    digest = json.loads((folder / ENTRY).read_text())["files"]["step.so"]
    rewrite(folder, main="../step.so", files={"../step.so": digest})


def _in_a_folder(folder: Path) -> None:
    (folder / "deep").mkdir()
    shutil.move(folder / "step.so", folder / "deep" / "step.so")
    digest = json.loads((folder / ENTRY).read_text())["files"]["step.so"]
    rewrite(folder, main="deep/step.so", files={"deep/step.so": digest})


def _another_format(folder: Path) -> None:
    rewrite(folder, format_version=3)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def _another_content(folder: Path) -> None:
    (folder / "step.so").unlink()
    (folder / "step.so").mkdir()


DAMAGE = [
    _truncated,
    _altered,
    _missing,
    _no_entry,
    _half_an_entry,
    _leaves_the_folder,
    _in_a_folder,
    _another_format,
    _a_file,
    _another_content,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_and_taken_away(
    cache: Cache, files: list[Path], target: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    damage(kept(cache, files))
    assert cache.take(KEY, target) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "is damaged and is made again: " in record.getMessage()
    assert list(target.iterdir()) == [] and list(cache.folder.iterdir()) == []
    kept(cache, files)
    assert cache.take(KEY, target) is not None


def test_an_entry_that_is_there_stays(cache: Cache, files: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """Another process has compiled the same stage; its files are in use."""
    before = (kept(cache, files) / "step.so").stat().st_ino
    assert (kept(cache, files) / "step.so").stat().st_ino == before
    assert [path.name for path in cache.folder.iterdir()] == [KEY] and caplog.records == []


def test_many_at_once(cache: Cache, files: list[Path], tmp_path: Path) -> None:
    """Writers and readers of one key: each reader gets the whole stage or nothing."""
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn in range(20):
            folder = tmp_path / f"{number}_{turn}"
            folder.mkdir()
            taken = cache.take(KEY, folder)
            if taken is not None and [path.stat().st_size for path in taken] != [400, 7]:
                wrong.append(taken)
            cache.keep(KEY, "step", PARTS, files)

    at_once(work, range(4))
    assert wrong == [] and [path.name for path in cache.folder.iterdir()] == [KEY]


def test_room_is_made_for_what_is_used(cache: Cache, files: list[Path], target: Path) -> None:
    size = sum(path.stat().st_size for path in kept(cache, files, "0").iterdir())
    small = Cache(cache.folder, WHAT, limit=3 * size)
    for age, key in enumerate("123"):
        kept(Cache(cache.folder, WHAT), files, key)
        os.utime(cache.folder / key, (age, age))
    os.utime(cache.folder / "0", (0, 0))
    assert small.take("1", target) is not None  # it is the newest now
    kept(small, files, "4")
    assert {path.name for path in cache.folder.iterdir()} == {"1", "3", "4"}


def test_a_stage_that_is_larger_than_the_cache_is_not_kept(cache: Cache, files: list[Path]) -> None:
    kept(Cache(cache.folder, WHAT, limit=406), files)
    assert not cache.folder.exists()


def test_what_killed_processes_left_is_removed(cache: Cache, files: list[Path]) -> None:
    kept(cache, files)
    for name, age in {"old": 2 * ABANDONED_SECONDS, "new": 0}.items():
        folder = cache.folder / f".{name}.partial"
        folder.mkdir()
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    kept(cache, files, "b")
    assert {path.name for path in cache.folder.iterdir()} == {KEY, "b", ".new.partial"}


def test_a_full_disk_is_no_error(
    cache: Cache, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    kept(cache, files)
    assert "the compiled stage step cannot be kept: [Errno 28] No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_an_interruption_leaves_nothing(cache: Cache, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept(cache, files)
    assert list(cache.folder.iterdir()) == []


def test_a_result_of_one_file(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.read(KEY) is None
    cache.write(KEY, "calibration", PARTS, "latents.safetensors", b"numbers")
    assert cache.read(KEY) == b"numbers"
    cache.write(KEY, "calibration", PARTS, "latents.safetensors", b"others")  # the first one stays
    assert cache.read(KEY) == b"numbers" and caplog.records == []
    (cache.folder / KEY / "latents.safetensors").write_bytes(b"numberz")
    assert cache.read(KEY) is None and "is damaged and is made again: " in caplog.text
    assert list(cache.folder.iterdir()) == []
    Cache(cache.folder, WHAT, limit=6).write(KEY, "calibration", PARTS, "latents.safetensors", b"numbers")
    assert cache.read(KEY) is None


def _is_a_file(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder.parent.mkdir()
    cache.folder.write_text("no folder")


def _lies_in_a_file(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder.parent.write_text("no folder")


def _leads_nowhere(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder.parent.mkdir()
    cache.folder.symlink_to(cache.folder.with_name("gone"))


def _must_not_be_used(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may write everywhere, so the system's answer is given here."""

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    real = os.stat
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "stat", lambda path, **more: refuse(path) if KEY in str(path) else real(path, **more))


@pytest.mark.parametrize("spoil", [_is_a_file, _lies_in_a_file, _leads_nowhere, _must_not_be_used])
def test_a_folder_that_cannot_be_used_is_warned_of(
    cache: Cache, files: list[Path], target: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any, spoil: Any
) -> None:
    with monkeypatch.context() as patch:
        spoil(cache, patch)
        assert cache.take(KEY, target) is None and cache.read(KEY) is None
        caplog.clear()
        cache.keep(KEY, "step", PARTS, files)
        cache.write(KEY, "step", PARTS, "step.so", b"main")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all("compiled stage step cannot be kept: " in record.getMessage() for record in caplog.records)
    assert list(target.iterdir()) == []
