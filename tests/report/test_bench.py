"""How rows are measured, with workers that answer without an engine; then the tiny bundle with real ones."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.bundle import Manifest, write_manifest
from stepfold.bundle.reader import read_manifest
from stepfold.loop.errors import BundleError, StepfoldError, UsageError
from stepfold.report import bench as bench_module
from stepfold.report.bench import bench, with_speedup
from stepfold.report.measure import latency, quality
from stepfold.report.records import Report, Row

from .reports import row

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


class Fakes:
    """Runs a bench with fake workers over bundles of given names and reads what they were asked."""

    def __init__(self, folder: Path, build: Callable[[Path], Path]):
        self.folder, self.build, self.log = folder, build, folder / "log.jsonl"

    def bench(self, *names: str, **options: Any) -> Report:
        paths = [self.folder / name for name in names]
        for path in paths:
            if not path.exists():
                self.build(path)
        return bench(paths, **{"count": 3, "repeats": 2, "command": FAKE, **options})

    def entries(self, verb: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [entry for entry in found if verb is None or entry["do"] == verb]

    def pids(self) -> set[int]:
        return {entry["pid"] for entry in self.entries()}


@pytest.fixture
def fakes(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log.jsonl"))
    return Fakes(tmp_path, tiny.build)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_rows_take_turns(fakes: Fakes) -> None:
    report = fakes.bench("a", "b")
    assert [r.name for r in report.rows] == ["a", "b"]
    timed = [entry["name"] for entry in fakes.entries("sample") if entry["out"] is None]
    assert timed == ["a", "a", "b", "b"] * 2  # an untimed call and a timed one in each of two turns
    assert len(fakes.pids()) == 2
    assert (report.protocol.warmup, report.protocol.repeats, report.protocol.interleaved) == (1, 2, True)


def test_idle_workers_are_stopped_while_another_works(fakes: Fakes) -> None:
    fakes.bench("a", "b", "c", repeats=3)
    observed = [state for entry in fakes.entries("sample") for state in entry["others"].values()]
    assert len(observed) == 2 * 3 * (1 + 3 * 2)  # each sample call sees both others: page, three turns of two calls
    assert set(observed) == {"T"}


def test_figures_come_from_the_timed_calls(fakes: Fakes) -> None:
    report = fakes.bench("a", "slow", repeats=4)
    fast, slow = report.rows
    assert fast.latency_ms.samples_ms == (2.0,) * 4
    assert (slow.latency_ms.median, slow.latency_ms.n) == (250.0, 4)
    assert (fast.size_bytes, fast.peak_memory_bytes, fast.evaluations) == (123, 4096, 3)
    assert (fast.psnr_db, fast.ssim, fast.drift, fast.speedup) == (None, None, None, None)


def test_every_row_has_the_same_threads(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "physical_cores", lambda: 3)
    report = fakes.bench("a", "b")
    assert report.protocol.threads == 3
    assert {entry["omp"] for entry in fakes.entries()} == {"3"}
    assert {entry["threads"] for entry in fakes.entries("open")} == {3}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("refuses", "refuses: this engine is not installed."),
        ("crashes", "its process ended with code 7: RuntimeError: engine fell over"),
        ("crashes-open", "its process ended with code 1: ValueError: no kernel for this operator"),
        ("killed", "its process killed by SIGKILL"),
        ("nan", "12 values of its samples are not finite."),
    ],
)
def test_a_row_that_fails_is_skipped_and_the_others_go_on(fakes: Fakes, name: str, reason: str) -> None:
    report = fakes.bench("a", name, "b")
    assert [r.name for r in report.rows] == ["a", "b"]
    assert [(entry.name, entry.reason) for entry in report.skipped] == [(name, reason)]


def test_without_any_row_the_bench_fails_with_the_reasons(fakes: Fakes) -> None:
    with pytest.raises(StepfoldError, match=r"received none\. refuses: refuses: this engine is not installed") as error:
        fakes.bench("refuses", out=fakes.folder / "out")
    assert error.value.exit_code == 1
    assert not (fakes.folder / "out").exists()


@pytest.mark.parametrize("task", ["opening engines", "sampling b", "timing"])
def test_an_interruption_ends_every_process_and_leaves_nothing(
    fakes: Fakes, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = fakes.folder / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def interrupt(name: str, done: int, total: int) -> None:
        if name == task and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fakes.bench("a", "b", progress=interrupt, out=fakes.folder / "out")
    assert fakes.pids() and not any(alive(pid) for pid in fakes.pids())
    assert list(temporary.iterdir()) == []
    assert not (fakes.folder / "out").exists()


def test_processes_end_with_the_bench(fakes: Fakes) -> None:
    fakes.bench("a", "crashes", "b")
    assert len(fakes.pids()) == 3
    assert not any(alive(pid) for pid in fakes.pids())


def test_workers_die_with_a_bench_that_is_killed(fakes: Fakes, tiny: Any) -> None:
    code = (
        "import sys; from pathlib import Path; from stepfold.report.bench import bench\n"
        "def stop(task, done, total):\n"
        "    if task == 'timing': import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        f"bench([Path({str(fakes.folder / 'a')!r})], command={FAKE!r}, progress=stop)"
    )
    tiny.build(fakes.folder / "a")
    process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
    os.waitpid(process, 0)
    deadline = time.monotonic() + 20
    while any(alive(pid) and not zombie(pid) for pid in fakes.pids()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert fakes.pids() and not any(alive(pid) and not zombie(pid) for pid in fakes.pids())


def zombie(pid: int) -> bool:
    """Ended, and waiting for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_report_and_page_are_written(fakes: Fakes) -> None:
    report = fakes.bench("a", out=fakes.folder / "out")
    assert sorted(entry.name for entry in (fakes.folder / "out").iterdir()) == ["report.html", "report.json"]
    assert json.loads((fakes.folder / "out" / "report.json").read_text()) == report.document()
    html = (fakes.folder / "out" / "report.html").read_text()
    assert "a makes 3 samples in 2 ms." in html
    assert "data:image/png;base64" in html


def test_without_the_extra_the_report_is_written_and_the_page_is_not(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bench_module, "missing_packages", lambda: "the page needs plotly: pip install it")
    with caplog.at_level(logging.WARNING):
        fakes.bench("a", out=fakes.folder / "out")
    assert [entry.name for entry in (fakes.folder / "out").iterdir()] == ["report.json"]
    assert "report.html was not written: the page needs plotly" in caplog.text


def test_progress_names_the_work(fakes: Fakes) -> None:
    seen: list[tuple[str, int, int]] = []
    fakes.bench("a", progress=lambda *step: seen.append(step))
    assert dict.fromkeys(task for task, _, _ in seen) == dict.fromkeys(["opening engines", "sampling a", "timing"])
    assert seen[-1] == ("timing", 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--count: expected at least 1; received 0"),
        ({"quality_count": 0}, "--quality-count: expected at least 1"),
        ({"repeats": -1}, "--repeats: expected at least 1"),
        ({"seed": -1}, "--seed: expected a number from 0; received -1"),
        ({"baselines": ["eager"]}, "name it with --reference CHECKPOINT"),
        ({"reference": Path("nowhere")}, "--reference: expected the folder of a checkpoint; received nowhere"),
        ({"baselines": ["eagr"]}, "unknown baseline 'eagr' in 'eagr'; did you mean 'eager'?"),
    ],
)
def test_wrong_use_starts_nothing(fakes: Fakes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fakes.bench("a", **options)
    assert not fakes.log.exists()


def test_bundles_need_different_names(fakes: Fakes, tiny: Any) -> None:
    first, second = tiny.build(fakes.folder / "x" / "same"), tiny.build(fakes.folder / "y" / "same")
    with pytest.raises(UsageError, match=r"received 'same' 2 times\. A bundle's row has the name of its folder"):
        bench([first, second], command=FAKE)
    with pytest.raises(UsageError, match="expected at least one bundle"):
        bench([], command=FAKE)


def test_a_bundle_may_not_be_called_like_a_baseline(fakes: Fakes) -> None:
    with pytest.raises(UsageError, match="received 'eager' 2 times"):
        fakes.bench("eager", baselines=["eager"], reference=fakes.folder)


def test_bundles_of_different_models_are_refused(fakes: Fakes, tiny: Any) -> None:
    tiny.build(fakes.folder / "a")
    other = tiny.build(fakes.folder / "b")
    content = read_manifest(other).model_dump(mode="json", by_alias=True)
    content["inputs"].append({"name": "text", "shape": [None, 2], "dtype": "float32", "role": "condition"})
    content["loop"]["inputs"]["text"] = {"role": "condition"}
    write_manifest(other, Manifest.model_validate(content))
    with pytest.raises(UsageError, match="Bundles of different models are measured one after the other"):
        fakes.bench("a", "b")


def test_missing_and_damaged_bundles_are_refused(fakes: Fakes, tiny: Any) -> None:
    with pytest.raises(UsageError, match="expected the folder of a bundle"):
        bench([fakes.folder / "nothing"], command=FAKE)
    damaged = tiny.build(fakes.folder / "damaged")
    data = damaged / "stages" / "step.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    with pytest.raises(BundleError, match="sha256"):
        bench([damaged], command=FAKE)


def test_speedup_is_over_the_row_eager() -> None:
    rows = [
        Row.model_validate(row("a", 50.0)),
        Row.model_validate(row("eager", 200.0, kind="baseline")),
        Row.model_validate(row("eager@5", 20.0, kind="baseline")),
    ]
    assert [r.speedup for r in with_speedup(rows)] == [4.0, 1.0, 10.0]
    assert [r.speedup for r in with_speedup([rows[0], rows[2]])] == [None, None]


def test_latency_is_median_and_deciles() -> None:
    found = latency([float(value) for value in range(1, 12)])  # 1..11
    assert (found.median, found.p10, found.p90, found.n) == (6.0, 2.0, 10.0, 11)


def test_quality_of_a_known_error() -> None:
    reference = np.zeros((2, 1, 8, 8), np.float32)
    reference[:, :, ::2] = 0.5
    samples = reference + np.array([0.02, 0.2], np.float32)[:, None, None, None]
    found = quality(samples, reference, "pixels")
    assert found["psnr_db"].mean == pytest.approx(
        30.0, abs=1e-3
    )  # 10 log10(4 / 0.02^2) = 40 and 10 log10(4 / 0.2^2) = 20
    assert found["psnr_db"].min == pytest.approx(20.0, abs=1e-3)
    assert 0 < found["ssim"] < 1
    # sqrt((0.02^2 + 0.2^2) / (2 * 0.5^2 / 2))
    assert found["drift"] == pytest.approx(np.sqrt(0.0404 / 0.25), rel=1e-4)


def test_latents_are_not_clipped_and_their_peak_is_the_range_of_the_reference() -> None:
    """The figure that NumPy gives: latents that leave [-1, 1] everywhere, with an error that clipping would hide."""
    generator = np.random.default_rng(0)
    reference = 5 + 3 * generator.standard_normal((2, 4, 8, 8))
    samples = reference + 0.5 * generator.standard_normal(reference.shape)
    found = quality(samples, reference, "latents")
    wanted = [10 * np.log10(np.ptp(r) ** 2 / np.mean((s - r) ** 2)) for s, r in zip(samples, reference, strict=True)]
    assert found["psnr_db"].mean == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found["psnr_db"].min == pytest.approx(min(wanted), abs=1e-6)
    assert found["ssim"] is None
    signs = np.sign(reference - 5)
    beyond = {kind: quality(3 * signs, 2 * signs, kind)["psnr_db"].mean for kind in ("pixels", "latents")}
    assert beyond == {"pixels": pytest.approx(126.0, abs=0.1), "latents": pytest.approx(10 * np.log10(16), abs=1e-6)}


def test_quality_of_a_component_is_its_drift_alone() -> None:
    reference = np.ones((2, 3, 4), np.float32)
    assert quality(1.1 * reference, reference, None) == {"drift": pytest.approx(0.1, rel=1e-4)}
    assert quality(reference, None, "pixels") == {}


def test_video_has_no_ssim() -> None:
    reference = np.zeros((1, 2, 3, 4, 4), np.float32)
    assert quality(reference, reference, "pixels")["ssim"] is None


def test_the_tiny_bundle_with_its_own_engine(tiny: Any, tmp_path: Path) -> None:
    bundle = tiny.build(tmp_path / "tiny")
    report = bench([bundle], count=2, repeats=3, seed=7)
    (found,) = report.rows
    needed = [*(bundle / "stages").iterdir(), bundle / "tables.safetensors"]
    assert found.size_bytes == sum(file.stat().st_size for file in needed)
    assert found.evaluations == 2
    assert found.latency_ms.n == 3 and found.latency_ms.median > 0
    assert found.peak_memory_bytes > 20_000_000
    assert report.skipped == ()
    assert report.protocol.guidance == 2.0
