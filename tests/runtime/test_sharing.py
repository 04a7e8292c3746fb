"""A bundle stores once what two of its stages hold, and computes the same."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import QUICK, load_captured

import stepfold
from stepfold.backends import get
from stepfold.backends.shared import SMALLEST_BYTES
from stepfold.bundle import read, write_manifest
from stepfold.bundle.manifest import PipelineEntry
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.verify import verify
from stepfold.cli.inspect import print_bundle
from stepfold.cli.optimize import print_summary
from stepfold.ir.program import Program
from stepfold.loop.errors import BundleError
from stepfold.runtime.compiler import Job, compiled_stages, optimize
from stepfold.runtime.engine import open_stage
from stepfold.runtime.refit import refit
from stepfold.runtime.workshop import Workshop

FILE = "stages/shared.weights"
ACTIVATIONS = {"onnxruntime": "dynamic", "openvino": "symmetric"}
FEED_FORWARD = 2 * SMALLEST_BYTES
"""Two layers of 16 and 64 features in float32, which are not quantized."""
REFERENCES = 2 * 2 * 128
"""Bytes of what takes the place of two weights in two stages, at most."""


def silent(task: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def recipe(backend: str, **options: Any) -> dict[str, Any]:
    """The late half in 8 bits, but for the feed-forward pair."""
    return {"passes": ["hoist", {"quantize": {"skip": ["*.ff.*"], "activations": ACTIVATIONS[backend], **options}}]}


@dataclass(frozen=True)
class Built:
    """A program in two parts, its bundle, and the bundle without sharing."""

    backend: str
    program: Program
    bundle: Path
    apart: Path


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name == "openvino" else name for name in ACTIVATIONS],
)
def built(request: pytest.FixtureRequest, tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    program, _ = stepfold.apply(tiny_program, recipe(request.param, part=[0.5, 1.0]), backend=request.param)
    stepfold.lower(program, request.param, out=folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get(request.param)), "share", lambda *_: None)
        stepfold.lower(program, request.param, out=folder / "apart")
    return Built(request.param, program, folder / "bundle", folder / "apart")


@pytest.fixture(scope="module")
def optimized(
    tiny_checkpoint: Path, tiny_program: Program, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A bundle of the command, with a fitted schedule, and what it said."""
    out = tmp_path_factory.mktemp("optimized") / "bundle"
    passes = [*recipe("onnxruntime", part=[0.5, 1.0])["passes"], {"schedule": {"evaluations": 4, **QUICK}}]
    with pytest.MonkeyPatch.context() as patch:
        load_captured(patch, tiny_checkpoint, tiny_program)
        return out, optimize(Job(tiny_checkpoint, out, recipe={"passes": passes}), silent)


def sizes(bundle: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (bundle / "stages").iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(bundle: Path) -> bytes:
    return stepfold.load(bundle, threads=1).generate(4, seed=3).tobytes()


def test_common_weights_are_stored_once(built: Built) -> None:
    together, apart = sizes(built.bundle), sizes(built.apart)
    assert sum(together.values()) <= sum(apart.values()) - FEED_FORWARD + REFERENCES
    assert together.keys() - apart.keys() == {"shared.weights"} and read(built.apart).manifest.shared is None
    entry = read(built.bundle).manifest.shared
    assert entry is not None and (entry.file, entry.stages) == (FILE, ("step", "step_1"))
    assert FEED_FORWARD <= entry.saved_bytes < 2 * FEED_FORWARD


def test_each_byte_counts_once_in_what_optimize_says(optimized: tuple[Path, dict[str, Any]]) -> None:
    out, document = optimized
    shared = document["shared"]
    assert shared["file"] == FILE and shared["stages"] == ["step", "step_1"]
    assert shared["bytes"] == shared["saved_bytes"] == sizes(out)["shared.weights"] == FEED_FORWARD
    assert sum(stage["bytes"] for stage in document["stages"]) + shared["bytes"] == sum(sizes(out).values())


def test_the_commands_say_what_is_shared(
    optimized: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(optimized[1])
    print_bundle(read(optimized[0]).manifest.model_dump(mode="json", by_alias=True))
    line = "Shared by step, step_1: stages/shared.weights, 8,192 bytes, which saves 8,192.\n"
    assert capsys.readouterr().out.count(line) == 2


def test_samples_are_the_same_bit_for_bit(built: Built) -> None:
    assert samples(built.bundle) == samples(built.apart)
    engine, apart = (stepfold.load(path, threads=1) for path in (built.bundle, built.apart))
    inputs = {"hidden_states": np.ones((2, 1, 8, 8), np.float32), "class_labels": np.array([1, 4])}
    for timestep in (1000.0, 125.0):  # of the first and of the last call
        values = {**inputs, "timestep": np.full(2, timestep, np.float32)}
        (received,), (wanted,) = (e.run(**values) for e in (engine, apart))
        assert received.tobytes() == wanted.tobytes()


def test_the_bundle_is_verified(built: Built) -> None:
    assert verify(built.bundle, open_stage) == ([], [])


def test_a_flipped_byte_is_reported_by_the_name_of_the_file(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.bundle, tmp_path / "copy"))
    content = bytearray((copy / FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / FILE).write_bytes(bytes(content))
    with pytest.raises(BundleError, match=f"{re.escape(FILE)}: expected sha256"):
        stepfold.load(copy)
    (problem,), _ = verify(copy, open_stage)
    assert problem.startswith(f"{FILE}: expected sha256")
    (copy / FILE).unlink()
    (problem,), _ = verify(copy, open_stage)
    assert problem.startswith(f"{FILE}: expected a file of {len(content)} bytes; it is missing")


def test_a_bundle_within_another_has_a_file_of_its_own(built: Built, tmp_path: Path) -> None:
    outer = Path(shutil.copytree(built.bundle, tmp_path / "outer"))
    shutil.copytree(built.bundle, outer / "decoder")
    pipeline = PipelineEntry(class_name="TinyPipeline", decoder="decoder")
    write_manifest(outer, read_manifest(outer).model_copy(update={"pipeline": pipeline}))
    inner = read(outer).within("decoder")
    assert inner.manifest.shared is not None and inner.file(FILE) == outer / "decoder" / FILE
    assert verify(outer, open_stage) == ([], [])
    (outer / "decoder" / FILE).write_bytes(bytes((outer / FILE).stat().st_size))
    (problem,), _ = verify(outer, open_stage)
    assert problem.startswith(f"decoder/{FILE}: expected sha256")


def test_a_manifest_that_forgets_the_file_is_refused(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][FILE]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"'{re.escape(FILE)}' has no hash among the files"):
        read(copy)


def test_a_stage_of_the_cache_is_whole_by_itself(built: Built, tmp_path: Path) -> None:
    """What other bundles take again: every stage opens in a folder of its own."""
    backend = get(built.backend)
    shop = Workshop(backend, tmp_path, cache=compiled_stages())
    program = read(built.bundle).manifest
    for stage, entry in zip(built.program.stages, program.stages, strict=True):
        file, *beside = shop.build(stage)
        assert shop.reused(stage) and not any(path.name == "shared.weights" for path in beside)
        assert file.read_bytes() == (built.apart / entry.file).read_bytes()
        backend.open_session(file, entry.input_ports(), entry.output_ports())


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))  # else nothing would be compiled
    stepfold.lower(built.program, built.backend, out=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built.bundle)


def test_a_bundle_with_one_step_stage_has_no_shared_file(built: Built, tiny_program: Program, tmp_path: Path) -> None:
    stepfold.lower(tiny_program, built.backend, out=tmp_path / "whole")
    manifest = read(tmp_path / "whole").manifest
    assert len(manifest.stages) == 1 and manifest.shared is None and FILE not in manifest.files


def test_refit_keeps_the_shared_file(
    optimized: tuple[Path, dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(optimized[0], tmp_path / "copy"))
    before, manifest = contents(copy / "stages"), read(copy).manifest
    refit(copy, tiny_checkpoint, None, silent)
    after = read(copy).manifest
    assert contents(copy / "stages") == before and FILE in after.files
    assert after.shared == manifest.shared is not None
    assert verify(copy, open_stage) == ([], [])


def test_a_shared_file_can_be_written_into_a_manifest_again(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.bundle, tmp_path / "copy"))
    assert write_manifest(copy, read_manifest(copy)) == read(built.bundle).manifest
