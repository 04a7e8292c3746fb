"""Writing leaves the finished bundle, or what was there before, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.bundle import check_out, read, writer, writing
from stepfold.loop.errors import StepfoldError, UsageError


def fill(folder: Path, text: str = "new") -> None:
    (folder / "manifest.json").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_bundle(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as folder:
        assert folder.parent == tmp_path and not (tmp_path / "out").exists()
        fill(folder)
    assert entries(tmp_path) == ["out"] and (tmp_path / "out" / "manifest.json").read_text() == "new"


def test_missing_parents_are_made_and_removed_again(tmp_path: Path) -> None:
    with writing(tmp_path / "a" / "b" / "out") as folder:
        fill(folder)
    assert (tmp_path / "a" / "b" / "out" / "manifest.json").exists()
    with pytest.raises(ValueError, match="stop"), writing(tmp_path / "c" / "d" / "out"):
        raise ValueError("stop")
    assert entries(tmp_path) == ["a"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as folder:
        fill(folder)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_existing_out_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    message = r"out: already exists\. Choose another --out, or pass --overwrite"
    with pytest.raises(UsageError, match=message), writing(tmp_path / "out"):
        pytest.fail("the work must not start")
    assert entries(tmp_path) == ["out"] and (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_only_a_bundle_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a bundle to overwrite; received another folder"):
        check_out(tmp_path / "home", overwrite=True)
    with pytest.raises(UsageError, match="expected a folder to overwrite; received a file"):
        check_out(tmp_path / "file", overwrite=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="already exists"):
        check_out(tmp_path / "dangling", overwrite=False)


@pytest.mark.parametrize("exchange", [writer._exchange, lambda first, second: False], ids=["one step", "two steps"])
def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: Callable[..., bool]) -> None:
    monkeypatch.setattr(writer, "_exchange", exchange)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "gone").write_text("")
    with writing(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
        assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["manifest.json"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux")
def test_linux_swaps_in_one_step(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not writer._exchange(tmp_path / "first", tmp_path / "second"):
        pytest.skip("this file system cannot exchange")
    assert entries(tmp_path / "first") == ["second"] and entries(tmp_path / "second") == ["first"]


def test_overwrite_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    fill(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to("real")
    with writing(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert entries(tmp_path) == ["out", "real"] and (tmp_path / "real" / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_what_was_there(tmp_path: Path, stop: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "old")
    before = entries(tmp_path)
    with pytest.raises(stop), writing(tmp_path / "out", overwrite) as folder:
        (folder / "stages").mkdir()
        (folder / "stages" / "step.onnx").write_bytes(b"half")
        raise stop
    assert entries(tmp_path) == before
    assert not overwrite or (tmp_path / "out" / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("at", [1, 2], ids=["old moved aside", "new moved in"])
def test_an_interruption_of_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(source)
        rename(source, target)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    monkeypatch.setattr(writer.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", overwrite=True) as folder:
        fill(folder)
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == ("old" if at == 1 else "new")


def test_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already exists"), writing(tmp_path / "out") as folder:
        fill(folder)
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "of another run")
    assert entries(tmp_path) == ["out"] and (tmp_path / "out" / "manifest.json").read_text() == "of another run"


FULL_DISKS: list[Callable[[], Any]] = [
    lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    lambda: RuntimeError("I/O error: No space left on device (os error 28)"),  # as native libraries report it
]


@pytest.mark.parametrize("cause", FULL_DISKS, ids=["full", "quota", "native"])
def test_a_full_disk(tmp_path: Path, cause: Callable[[], Exception]) -> None:
    with pytest.raises(StepfoldError) as error, writing(tmp_path / "out") as folder:
        fill(folder)
        try:
            raise cause()
        except Exception as inner:
            raise RuntimeError("could not save") from inner
    assert "out: expected room for the bundle; the disk is full." in str(error.value)
    assert error.value.exit_code == 1 and entries(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match="the disk is full"), writing(tmp_path / "out") as folder:
        (folder / "tables.safetensors").symlink_to("/dev/full")
        writer._write_arrays(folder / "tables.safetensors", {"x": np.zeros(4)})
    assert entries(tmp_path) == []


def test_a_full_disk_while_the_bundle_is_written(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StepfoldError, match="the disk is full"):
        tiny.build(tmp_path / "out")
    assert entries(tmp_path) == []


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), writing(tmp_path / "out"):
        raise PermissionError("no")


CTRL_C = """
import signal, sys, time
from pathlib import Path
from stepfold.bundle import writing
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
with writing(Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CTRL_C, str(tmp_path / "out")], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(entries(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert entries(tmp_path) == []


def test_the_same_bundle_has_the_same_bytes(tiny, tmp_path: Path) -> None:
    first, second = tiny.build(tmp_path / "first"), tiny.build(tmp_path / "second")
    for name in (*read(first).manifest.files, "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_manifest_lists_every_file(read_only_bundle: Path) -> None:
    found = {p.relative_to(read_only_bundle).as_posix() for p in read_only_bundle.rglob("*") if p.is_file()}
    data = json.loads((read_only_bundle / "manifest.json").read_text())
    assert set(data["files"]) == found - {"manifest.json"}
    assert "stages/step.onnx.data" in data["files"]
    assert data["model"]["class"] == "Tiny" and data["stages"][0]["rate"] == "once×timestep"
    assert data["stages"][1]["inputs"][0] == {"name": "hidden_states", "shape": [None, 1, 2, 2], "dtype": "float32"}


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    writer.write_json(tmp_path / "x.json", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_json_refuses_what_it_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StepfoldError, match=r"x\.json: expected finite numbers, text, lists and mappings"):
        writer.write_json(tmp_path / "x.json", {"a": value})
    assert entries(tmp_path) == []


def test_schedule_is_readable(read_only_bundle: Path) -> None:
    data = json.loads((read_only_bundle / "schedule.json").read_text())
    assert data["grid_steps"] == 4
    assert data["scales"][0] == {
        "scale": 2.0,
        "positions": [0, 2],
        "evaluations": 2,
        "guided_evaluations": 2,
        "fitted_on": "reference",
    }


def test_a_digest_that_was_checked_is_kept(bundle_folder: Path) -> None:
    """A file that was changed behind the check does not get a digest that fits it."""
    manifest = read(bundle_folder).manifest
    kept = {name: entry for name, entry in manifest.files.items() if name.startswith("stages/")}
    for name in ("stages/step.onnx", "schedule.json"):
        (bundle_folder / name).write_bytes(b"something else")
    files = writer.write_manifest(bundle_folder, manifest, kept).files
    assert files["stages/step.onnx"] == manifest.files["stages/step.onnx"]
    assert files["schedule.json"].bytes == len(b"something else")


def test_what_engines_write_lies_behind_a_path_that_is_text(tmp_path: Path) -> None:
    with writing(tmp_path / os.fsdecode(b"a\xff") / os.fsdecode(b"b\xff")) as folder:
        str(folder).encode()
        fill(folder)
    assert os.listdir(os.fsencode(tmp_path / os.fsdecode(b"a\xff"))) == [b"b\xff"]


def test_json_has_an_escape_for_what_is_no_text(tmp_path: Path) -> None:
    value = {"bundle": os.fsdecode(b"b\xff"), "text": "ü"}
    writer.write_json(tmp_path / "report.json", value)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == value
