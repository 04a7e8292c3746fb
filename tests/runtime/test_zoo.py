"""`stepfold optimize` on a saved folder of every class the frontend captures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import load_captured
from zoo import BERT, FLUX, PIXART, SD3, UNET, ZOO, ZooModel

from stepfold.cli import main
from stepfold.runtime.engine import load

pytestmark = pytest.mark.slow

EXACT_DB = 85.0
"""PSNR of a bundle whose passes are exact; what is left is float32 rounding, magnified by guidance."""

EVALUATIONS = 6
LEAST_DB = {"sd3": 45, "flux": 45, "pixart": 40, "unet": 18}
"""Mean PSNR that recipes of 8 bits and more keep; the last has a guidance of 7.5, which magnifies what quantization changed."""
RECIPES = [
    *(("fp32", model) for model in (PIXART, UNET)),
    *(("int8", model) for model in ZOO),
    *(("int8-static", model) for model in (SD3, FLUX, PIXART, UNET, BERT)),
    *((name, model) for name in ("w4-gptq", "w4-svdquant", "mixed") for model in (SD3, FLUX, PIXART, UNET)),
]
NARROW = {"w4-gptq": ("group=16",), "w4-svdquant": ("group=16", "rank=4"), "mixed": ("group=16",)}
"""Options for layers of a few channels."""
COUPLED = ("int8", "mixed")
"""Recipes whose dynamic scales are those of a whole batch."""
SEARCH = {"evaluations": EVALUATIONS, "moves": 2, "samples": 8, "search_samples": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """The recipes of one model share its reference trajectories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def optimize(model: ZooModel, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """The object `optimize --json` prints for a saved folder of the model, which other tests load and capture."""
    checkpoint, bundle = model.save(folder / "checkpoint"), folder / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        load_captured(patch, checkpoint, model.program)
        code = main(["optimize", str(checkpoint), "--out", str(bundle), "--json", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def recipe(folder: Path, **passes: dict) -> str:
    """A recipe file of these passes."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"name": "test", "passes": [{name: options} for name, options in passes.items()]}))
    return str(path)


@pytest.mark.parametrize("model", ZOO, ids=str)
def test_exact_passes_give_the_samples_of_the_model(
    model: ZooModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = optimize(model, tmp_path, capsys, "--recipe", recipe(tmp_path, hoist={}))
    (entry,) = found["passes"]
    assert entry["outcome"] == ("changed" if model.is_loop else "not_applicable")
    if model.is_loop:
        assert found["quality"]["psnr_db"]["min"] > EXACT_DB
        assert found["schedule"] is None


@pytest.mark.parametrize(("name", "model"), RECIPES, ids=str)
def test_a_shipped_recipe(
    model: ZooModel,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """Quality of random weights says little; that every sample is a number, and how many evaluations, does."""
    options = [f"--set=schedule.{option}={value}" for option, value in SEARCH.items()]
    options += [f"--set=quantize.{option}" for option in NARROW.get(name, ())]
    found = optimize(model, tmp_path, capsys, "--recipe", name, *options)
    outcomes = {entry["name"]: entry["outcome"] for entry in found["passes"]}
    assert outcomes["schedule"] == ("changed" if model.is_loop else "not_applicable")
    if name != "fp32":
        assert outcomes["quantize"] == "changed"
    if model.is_loop:
        quality = found["quality"]["psnr_db"]["mean"]
        record_property("psnr_db", quality)
        assert found["schedule"]["evaluations"] == EVALUATIONS
        assert np.isfinite(quality) and quality > (10 if name in NARROW else LEAST_DB.get(model.name, 10))
    engine = load(tmp_path / "bundle")
    assert engine.manifest.batch_invariant == (name not in COUPLED)
    if not model.is_loop:
        outputs = engine.run(**{k: v.numpy() for k, v in model.kwargs(3).items()})
        assert np.isfinite(outputs[0]).all() and len(outputs[0]) == 3
