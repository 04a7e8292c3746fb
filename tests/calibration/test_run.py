"""Whole runs: the cache of passes, kills at any moment, and the memory that was promised."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import CALLS, Network, calibrated, content, network_program, silent, standard

from stepfold.calibration import run
from stepfold.calibration.plan import Settings
from stepfold.calibration.run import TASK, calibrate, collected, prepare
from stepfold.loop.errors import StepfoldError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "examples" / "mnist_dit"
SHARDS = 20
"""Of the store of a command that is killed again and again."""


def test_progress_counts_what_is_missing(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(prepare(standard(), Settings(samples=20)), tmp_path, lambda *report: told.append(report))
    assert told == [(TASK, i + 1, 3 * CALLS) for i in range(3 * CALLS)]


def test_an_error_keeps_earlier_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run.collect_shard

    def breaks(plan: Any, index: int, on_evaluation: Any) -> Any:
        if index == 1:
            raise StepfoldError("site x: NaN")
        return real(plan, index, on_evaluation)

    monkeypatch.setattr(run, "collect_shard", breaks)
    with pytest.raises(StepfoldError, match="site x: NaN"):
        calibrated(standard(), tmp_path)
    assert set(content(tmp_path)) == {"lock", "store.json", "shards/00000.safetensors"}
    monkeypatch.setattr(run, "collect_shard", real)
    assert calibrated(standard(), tmp_path).resumed == 1


def test_nothing_of_a_shard_is_held_while_the_next_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would break the memory plan."""
    import gc
    import weakref

    real, before = run.collect_shard, []

    def watching(plan: Any, index: int, on_evaluation: Any) -> Any:
        gc.collect()
        assert all(array() is None for array in before)
        arrays = real(plan, index, on_evaluation)
        before.append(weakref.ref(arrays["seen"]))
        return arrays

    monkeypatch.setattr(run, "collect_shard", watching)
    calibrated(standard(), tmp_path)
    assert len(before) == 3


# -- what passes use when the user gave no store


def test_collected_once_and_then_from_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "stepfold")
    first = collected(standard(), 0, tmp_path, silent, samples=3)
    assert "calibrated now over 3 samples" in caplog.text
    monkeypatch.setattr(run, "collect_shard", None)
    again = collected(standard(), 0, tmp_path, silent, samples=3)
    assert "statistics from the cache over 3 samples" in caplog.text
    assert first.path == again.path and first.path.parent == tmp_path
    assert again.site("second").gram(0).shape == (7, 7)


def test_the_cache_tells_runs_apart(tmp_path: Path) -> None:
    other = network_program(Network(), guided=False)
    folders = {
        collected(standard(), 0, tmp_path, silent, samples=1).path,
        collected(standard(), 0, tmp_path, silent, samples=2).path,
        collected(standard(), 1, tmp_path, silent, samples=1).path,
        collected(standard(), 0, tmp_path, silent, samples=1, gram=False).path,
        collected(other, 0, tmp_path, silent, samples=1).path,
    }
    assert len(folders) == 5


def _in_a_file(cache: Path, store: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("no folder")


def _a_file(cache: Path, store: Path) -> None:
    shutil.rmtree(store)
    store.write_text("no store")


def _another_folder(cache: Path, store: Path) -> None:
    (store / "store.json").rename(store / "notes.json")


def _damaged(cache: Path, store: Path) -> None:
    (store / "store.json").write_text("{")


@pytest.mark.parametrize(
    "spoil, kept", [(_in_a_file, False), (_a_file, True), (_another_folder, True), (_damaged, True)]
)
def test_a_cache_that_cannot_be_used_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, kept: bool
) -> None:
    cache = tmp_path / "cache"
    expected = collected(standard(), 0, cache, silent, samples=1)
    grams = expected.site("second").gram(0)
    spoil(cache, expected.path)
    again = collected(standard(), 0, cache, silent, samples=1)
    np.testing.assert_array_equal(again.site("second").gram(0), grams)
    folder = again.path
    del again  # nobody reads its tensors any more
    assert (folder == expected.path) == folder.exists() == kept
    assert kept == ("the statistics cannot be kept" not in caplog.text)


def test_without_gram_matrices(tmp_path: Path) -> None:
    store = collected(standard(), 0, tmp_path, silent, samples=1, gram=False)
    assert not any(entry.gram for entry in store.sites) and store.site("second").count() > 0


# -- killed


def started(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """The real command, past its plan: what follows is the work."""
    command = [sys.executable, "-m", "stepfold", "calibrate", str(checkpoint), "--out", str(out)]
    command += ["--samples", str(8 * SHARDS), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Disk: "):
            return process
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_a_command_that_is_killed_ten_times_ends_with_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One store, and `kill -9` at ten seeded moments of the work; each time the same command goes on."""
    process, begin = started(tiny_checkpoint, tmp_path / "whole"), time.perf_counter()
    process.communicate()
    assert process.returncode == 0
    length, out = time.perf_counter() - begin, tmp_path / "killed"
    chance, killed, kept = random.Random(0), 0, []
    for _ in range(10):
        process = started(tiny_checkpoint, out)
        time.sleep(chance.uniform(0, length / 6))  # of which ten are less than the whole
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        kept.append(len(list((out / "shards").glob("*.safetensors"))))
    last, _ = started(tiny_checkpoint, out).communicate()
    assert json.loads(last)["resumed"] == kept[-1]
    assert content(out) == content(tmp_path / "whole")
    assert kept == sorted(kept) and len(set(kept)) >= 3  # what was finished stays, and more came at most starts
    assert killed >= 5  # most were still running


# -- memory


MEMORY = """
import json, sys
from pathlib import Path
import torch
from stepfold.calibration.memory import resident_bytes
from stepfold.calibration.plan import Settings
from stepfold.calibration.run import calibrate, prepare
from stepfold.frontend.load import load_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

prepared = prepare(load_checkpoint(Path(sys.argv[1])).capture(), Settings(samples=9))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use now
before = resident_bytes()
calibrate(prepared, Path(sys.argv[2]), lambda *_: None)
print(json.dumps([before, peak() - before, prepared.document.plan.planned]))
"""


@pytest.mark.slow
def test_memory_stays_within_the_plan(tmp_path: Path) -> None:
    """Two shards of the reference checkpoint, so that a shard that is not let go would be seen."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs to measure the peak from a moment on")
    command = [sys.executable, "-c", MEMORY, str(REFERENCE), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, growth, planned = json.loads(done.stdout.splitlines()[-1])
    assert before > planned > 0
    assert planned / 2 < growth < 1.2 * planned
