"""The cache of compiled stages: whole entries or none, damage is found, room is made."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from threads import at_once

from stepfold.runtime import artifacts
from stepfold.runtime.artifacts import ENTRY, ArtifactCache, key_of

KEY = "a" * 64
PARTS = {"stage": "s", "version": None}


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache" / "stages")


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


def kept(cache: ArtifactCache, files: list[Path], key: str = KEY) -> Path:
    cache.keep(key, "step", PARTS, files)
    return cache.folder / key


def test_what_was_kept_is_taken(cache: ArtifactCache, files: list[Path], target: Path) -> None:
    assert cache.take(KEY, target) is None
    folder = kept(cache, files)
    assert cache.take(KEY, target) == [target / "step.so", target / "a.bin"]
    assert (target / "step.so").read_bytes() == files[0].read_bytes()
    assert sorted(path.name for path in cache.folder.iterdir()) == [KEY]
    entry = json.loads((folder / ENTRY).read_text())
    assert (entry["stage"], entry["parts"], entry["main"]) == ("step", PARTS, "step.so")


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
    rewrite(folder, format_version=2)


DAMAGE = [_truncated, _altered, _missing, _no_entry, _half_an_entry, _leaves_the_folder, _in_a_folder, _another_format]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_and_taken_away(
    cache: ArtifactCache, files: list[Path], target: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    damage(kept(cache, files))
    assert cache.take(KEY, target) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "is damaged and is compiled again: " in record.getMessage()
    assert list(target.iterdir()) == [] and list(cache.folder.iterdir()) == []
    kept(cache, files)
    assert cache.take(KEY, target) is not None


def test_an_entry_that_is_there_stays(
    cache: ArtifactCache, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has compiled the same stage; its files are in use."""
    before = (kept(cache, files) / "step.so").stat().st_ino
    assert (kept(cache, files) / "step.so").stat().st_ino == before
    assert [path.name for path in cache.folder.iterdir()] == [KEY] and caplog.records == []


def test_many_at_once(cache: ArtifactCache, files: list[Path], tmp_path: Path) -> None:
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


def test_room_is_made_for_what_is_used(cache: ArtifactCache, files: list[Path], target: Path) -> None:
    size = sum(path.stat().st_size for path in kept(cache, files, "0").iterdir())
    small = ArtifactCache(cache.folder, limit=3 * size)
    for age, key in enumerate("123"):
        kept(ArtifactCache(cache.folder), files, key)
        os.utime(cache.folder / key, (age, age))
    os.utime(cache.folder / "0", (0, 0))
    assert small.take("1", target) is not None  # it is the newest now
    kept(small, files, "4")
    assert {path.name for path in cache.folder.iterdir()} == {"1", "3", "4"}


def test_a_stage_that_is_larger_than_the_cache_is_not_kept(cache: ArtifactCache, files: list[Path]) -> None:
    kept(ArtifactCache(cache.folder, limit=406), files)
    assert not cache.folder.exists()


def test_what_killed_processes_left_is_removed(cache: ArtifactCache, files: list[Path]) -> None:
    kept(cache, files)
    for name, age in {"old": 2 * artifacts.ABANDONED_SECONDS, "new": 0}.items():
        folder = cache.folder / f".{name}.partial"
        folder.mkdir()
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    kept(cache, files, "b")
    assert {path.name for path in cache.folder.iterdir()} == {KEY, "b", ".new.partial"}


def test_a_full_disk_is_no_error(
    cache: ArtifactCache, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    kept(cache, files)
    assert "the compiled stage step cannot be kept: [Errno 28] No space left on device" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_an_interruption_leaves_nothing(
    cache: ArtifactCache, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept(cache, files)
    assert list(cache.folder.iterdir()) == []
