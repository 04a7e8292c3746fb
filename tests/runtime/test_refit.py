"""A bundle of a pipeline, whose negative branch is an input of the loop, fitted and measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import QUICK, load_captured

from stepfold.bundle import Probe, read, write_manifest, write_probe
from stepfold.calibration.conditions import sample_request
from stepfold.ir.program import Program
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.noise import SampleSet
from stepfold.loop.spec import LoopSpec
from stepfold.passes.base import silent
from stepfold.report.work import of_bundles
from stepfold.runtime import load, refit
from stepfold.runtime.compiler import Job, optimize

NULL = 4  # the class of the other branch, not the zero that a caller without one would be given


@pytest.fixture(scope="module")
def pipeline(tiny_program: Program) -> Program:
    """The tiny DiT as a pipeline would have it, which gives the other branch its conditions."""
    assert tiny_program.loop is not None
    loop = tiny_program.loop.model_dump() | {"guidance": {"scale": 2.0, "unconditional": "input"}}
    rows = torch.full_like(tiny_program.example["class_labels"], NULL)
    return replace(tiny_program, loop=LoopSpec.model_validate(loop), unconditional={"class_labels": rows})


@pytest.fixture(scope="module")
def bundle(pipeline: Program, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipelines") / "bundle"
    settings = [("schedule", name, value) for name, value in (QUICK | {"evaluations": 4}).items()]
    with pytest.MonkeyPatch.context() as patch:
        load_captured(patch, tiny_checkpoint, pipeline)
        optimize(Job(tiny_checkpoint, out, recipe="fp32", settings=settings), silent)
    return out


def test_refit_fits_and_measures_with_the_conditions_of_the_pipeline(
    bundle: Path, pipeline: Program, tiny_checkpoint: Path
) -> None:
    original = refit._original(load(bundle), tiny_checkpoint)
    requests = [sample_request(program, SampleSet("validation", 0, 7)) for program in (pipeline, original)]
    for expected, received in zip(*(request.unconditional.values() for request in requests), strict=True):  # type: ignore[union-attr]
        np.testing.assert_array_equal(received, expected)
    document = refit.refit(bundle, tiny_checkpoint, None, silent)
    before, after = document["before"]["quality"]["psnr_db"], document["quality"]["psnr_db"]
    assert after["mean"] == pytest.approx(before["mean"], abs=0.05)
    kept = read(bundle).probe()
    assert kept is not None and kept.unconditional["class_labels"].tolist() == [NULL] * len(kept.inputs["class_labels"])


def test_a_bench_samples_with_the_conditions_of_the_pipeline(bundle: Path) -> None:
    arrays = of_bundles([read(bundle)]).arrays(3, 0)
    assert arrays["unconditional/class_labels"].tolist() == [NULL] * 3
    assert arrays["condition/class_labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("class_labels", np.zeros((2, 3), np.int64)), ("class_labels", np.zeros(2)), ("other", np.zeros(2))],
)
def test_conditions_that_do_not_fit_the_model_are_damage(bundle_folder: Path, name: str, rows: np.ndarray) -> None:
    found = read(bundle_folder)
    probe = found.probe()
    assert probe is not None
    write_probe(bundle_folder, Probe(probe.inputs, probe.outputs, probe.tolerance, None, {name: rows}))
    write_manifest(bundle_folder, found.manifest)
    with pytest.raises(BundleError, match="of the other guidance branch; received"):
        of_bundles([read(bundle_folder)])


@pytest.mark.parametrize("schedule", [None, [1], "abc", {"evaluations": "x"}, {"zzz": 1}, {"samples": 10**12}])
def test_a_recipe_that_no_build_wrote_is_damage(bundle: Path, schedule: object) -> None:
    engine = load(bundle)
    recipe = {"name": "fp32", "passes": [{"schedule": schedule}]}
    changed = replace(engine.bundle, manifest=engine.manifest.model_copy(update={"recipe": recipe}))
    engine.bundle = changed
    with pytest.raises(BundleError, match="recipe: pass schedule: "):
        refit._options(engine, None)


@pytest.mark.parametrize("passes", [None, 5, "schedule", [5], {"schedule": {}}])
def test_a_recipe_without_a_schedule(bundle: Path, passes: object) -> None:
    engine = load(bundle)
    manifest = engine.manifest.model_copy(update={"recipe": {"passes": passes}})
    engine.bundle = replace(engine.bundle, manifest=manifest)
    with pytest.raises(UsageError, match="expected a bundle with a fitted schedule"):
        refit._options(engine, None)
