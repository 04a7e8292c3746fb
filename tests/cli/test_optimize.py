"""`optimize`: what it prints and records, and every kind of bad input."""

import errno
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import HOIST, QUICK
from folders import empty

from stepfold.cli.optimize import parse_setting, refusals, schedule_line
from stepfold.cli.options import quality_budget
from stepfold.loop.budget import PsnrFigures, QualityBudget
from stepfold.loop.errors import GateError, UsageError
from stepfold.runtime.quality import check_budget

pytestmark = pytest.mark.usefixtures("captured_once")

SEARCH = [word for name, value in QUICK.items() for word in ("--set", f"schedule.{name}={value}")]


def recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


# What it does
def test_json(stepfold, tiny_checkpoint: Path, out: Path) -> None:
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--min-psnr", 25, *SEARCH, "--json")
    assert result.code == 0, result.err
    document = result.document()
    assert document["bundle"] == str(out)
    assert [entry["name"] for entry in document["passes"]] == ["hoist", "quantize", "fuse", "schedule"]
    assert {"changed", "refused", "drift", "total_drift", "flops_before", "seconds"} <= document["passes"][0].keys()
    assert {stage["name"] for stage in document["stages"]} >= {"step"}
    assert document["schedule"]["evaluations"] <= document["schedule"]["grid_steps"] == 8
    assert document["quality"]["psnr_db"]["mean"] > 20
    assert sorted(path.name for path in out.parent.iterdir()) == ["bundle"]
    schedule = json.loads((out / "manifest.json").read_text())["recipe"]["passes"][-1]["schedule"]
    assert schedule == {"evaluations": "auto", "min_psnr": 25.0, **QUICK}  # the command line wins, and is recorded


def test_summary(stepfold, tiny_checkpoint: Path, out: Path) -> None:
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", HOIST)
    assert (result.code, result.err) == (0, "")
    for text in ("hoist", "once×timestep", "Schedule: none", "126.02 dB PSNR", f"Bundle: {out}"):
        assert text in result.out
    again = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", HOIST, "--overwrite")
    assert "reused" in again.out and "compiled" not in again.out


def test_overwrite(stepfold, tiny_checkpoint: Path, bundle_folder: Path) -> None:
    words = ("optimize", tiny_checkpoint, "--out", bundle_folder, "--recipe", HOIST)
    refused = stepfold(*words)
    assert (refused.code, refused.error) == (
        2,
        f"{bundle_folder}: already exists. Choose another --out, or pass --overwrite to replace the bundle.",
    )
    assert json.loads((bundle_folder / "manifest.json").read_text())["model"]["class"] == "Tiny"
    assert stepfold(*words, "--overwrite").code == 0
    assert json.loads((bundle_folder / "manifest.json").read_text())["model"]["class"] == "DiTTransformer2DModel"


def test_refusals_are_told_by_reason() -> None:
    sites = [{"site": f"layer_{i}", "reason": "too small" if i else "the last layer"} for i in range(5)]
    entries = [{"name": "hoist", "refused": []}, {"name": "quantize", "refused": sites}]
    assert refusals(entries) == [
        "quantize refused layer_0: the last layer",
        "quantize refused layer_1 and 3 more: too small",
    ]


def test_further_reasons_are_counted() -> None:
    sites = [{"site": f"layer_{i}", "reason": f"reason {min(i, 5)}"} for i in range(8)]
    assert refusals([{"name": "quantize", "refused": sites}]) == [
        *(f"quantize refused layer_{i}: reason {i}" for i in range(3)),
        "quantize refused 5 more for other reasons; --json has them all",
    ]


def test_schedule_in_words() -> None:
    schedule = {"grid_steps": 50, "evaluations": 10, "guided_evaluations": 8, "fitted_on": "engine"}
    assert schedule_line(schedule) == (
        "Schedule: 10 evaluations (8 with both guidance branches) instead of 50, fitted on the engine."
    )


# Words of the command line
@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("schedule.evaluations=10", ("schedule", "evaluations", 10)),
        ("schedule.evaluations=auto", ("schedule", "evaluations", "auto")),
        ("schedule.min_psnr=null", ("schedule", "min_psnr", None)),
        ("quantize.skip=[a=b, '*.c']", ("quantize", "skip", ["a=b", "*.c"])),
    ],
)
def test_settings_are_yaml(text: str, setting: tuple[str, str, Any]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule=1", "expected NAME.OPTION=VALUE"),
        ("schedule.evaluations", "expected NAME.OPTION=VALUE"),
        (".x=1", "expected NAME.OPTION=VALUE"),
        ("quantize.skip=[a", "expected a YAML value, as in 10 or [a, b]; not a YAML text: "),
    ],
)
def test_unfit_settings(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^--set") as caught:
        parse_setting(text)
    assert message in str(caught.value)


WRONG = {
    "backend option": (
        ("--set", "onnxruntime.threads=1"),
        "backend onnxruntime: unknown option 'threads'; valid: provider, rows.",
    ),
    "pass": (("--set", "shedule.evaluations=3"), "recipe 'default' has no pass 'shedule'; did you mean 'schedule'?"),
    "option": (("--set", "schedule.evaluation=3"), "--set schedule.evaluation: pass schedule: unknown option"),
    "value": (("--set", "schedule.evaluations=many"), "--set schedule.evaluations: pass schedule: option"),
    "recipe": (("--recipe", "defaul"), "recipe 'defaul': no such recipe or file; did you mean 'default'?"),
    "recipe file": (("--recipe", "none.yaml"), "none.yaml: expected a recipe, YAML; there is no such file."),
    "backend": (("--backend", "onnxruntim"), "did you mean 'onnxruntime'?"),
    "no backend": (("--backend", ""), "backend: expected one that this stepfold has; received"),
    "budget": (
        ("--min-psnr", "nan"),
        "--min-psnr: expected a number of decibels, 0 or more, or two of them, as in mean=40,p05=34; received 'nan'.",
    ),
    "no budget": (("--min-psnr", "-3"), "as in mean=40,p05=34; received '-3'."),
    "loop": (("--loop", "none.yaml"), "none.yaml: expected a loop file, YAML; there is no such file."),
    "inputs": (
        ("--inputs", "none.safetensors"),
        "none.safetensors: expected a safetensors file of example inputs; there is no such file.",
    ),
    "too many": (("--set", "schedule.evaluations=9"), "schedule: evaluations must be 1 to 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(stepfold, tiny_checkpoint: Path, out: Path, case: str) -> None:
    words, message = WRONG[case]
    result = stepfold("optimize", tiny_checkpoint, "--out", out, *words)
    assert result.code == 2
    assert message in result.error
    assert result.out == "" and empty(out.parent)


# Recipes
RECIPES = {
    "pass": ("passes:\n  - hoist: {}\n  - quantise: {}\n", "line 3: unknown pass 'quantise'; did you mean 'quantize'?"),
    "option": (
        "passes:\n  - hoist: {}\n\n  - schedule: {evaluation: 3}\n",
        "line 4: pass schedule: unknown option 'evaluation'; did you mean 'evaluations'?",
    ),
    "value": (
        "passes:\n  - quantize: {scheme: int3}\n",
        "line 2: pass quantize: option 'scheme': expected 'int8', 'int8-weights', 'int4',",
    ),
    "key": ("passes: [hoist]\npases: []\n", "unknown key 'pases'; did you mean 'passes'?"),
    "no list": ("passes: {hoist: {}}\n", "expected `passes` to be a list; received dict."),
    "no mapping": ("- hoist\n", "expected a mapping with `passes`; received list."),
    "nothing": ("passes: []\n", "a recipe needs at least one pass; received none."),
    "no YAML": ("passes: [hoist\n", "not a YAML text"),
    "base": ("extends: defalt\npasses: [hoist]\n", "recipe 'defalt': no such recipe or file; did you mean 'default'?"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_recipes(stepfold, tiny_checkpoint: Path, out: Path, tmp_path: Path, case: str) -> None:
    text, message = RECIPES[case]
    file = recipe(tmp_path, text)
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", file, "--set", "schedule.moves=0")
    assert result.code == 2
    assert message in result.error
    assert case == "base" or str(file) in result.error
    assert empty(out.parent)


def test_a_folder_of_a_recipes_name_is_not_the_recipe(
    stepfold, tiny_checkpoint: Path, out: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "fp32").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ("--recipe", "fp32", "--set", "schedule.evaluations=2", *SEARCH)
    assert stepfold("optimize", tiny_checkpoint, "--out", out, *words).code == 0


def test_a_pass_that_changes_nothing_fails(stepfold, tiny_checkpoint: Path, out: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, "passes:\n  - quantize: {skip: ['*']}\n")
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", file)
    assert result.code == 1
    assert result.error.startswith("pass quantize: expected to change something, changed nothing (")
    assert "skipped by the recipe" in result.error and "optional: true" in result.error
    assert empty(out.parent)


# What goes wrong later
def test_a_budget_that_cannot_be_met(stepfold, tiny_checkpoint: Path, out: Path) -> None:
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--min-psnr", 110, *SEARCH, "--json")
    assert result.code == 3
    assert result.error.startswith("schedule: no schedule reaches 110 dB; the best was ")
    assert result.out == "" and empty(out.parent)


def test_a_budget_without_a_search(stepfold, tiny_checkpoint: Path, out: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, "passes: [quantize]\n")
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", file, "--min-psnr", 110)
    assert (result.code, result.error.startswith("quality: expected 110 dB; the best")) == (3, True)
    assert empty(out.parent)


@pytest.mark.parametrize(("budget", "met"), [(30.0, True), (30.1, False), (None, True)])
def test_a_budget_without_a_search_is_met_by_the_lower_bound(budget: float | None, met: bool) -> None:
    program: Any = SimpleNamespace(schedule=None)
    measured: Any = SimpleNamespace(psnr=PsnrFigures(33.0, 30.0, 25.0, 20.0), latents=None)
    with nullcontext() if met else pytest.raises(GateError, match=r"reached is 30\.00 dB"):
        check_budget(program, measured, None if budget is None else QualityBudget(mean=budget))


def test_a_tail_without_a_search() -> None:
    program: Any = SimpleNamespace(schedule=None)
    measured: Any = SimpleNamespace(psnr=PsnrFigures(33.0, 30.0, 25.0, 20.0), latents=None)
    with pytest.raises(GateError, match=r"mean; met\) and 25\.00 dB at the 5th percentile \(missed\)"):
        check_budget(program, measured, QualityBudget(mean=30, p05=26))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("40", QualityBudget(mean=40)),
        ("mean=40", QualityBudget(mean=40)),
        ("mean=40, p05=34.5", QualityBudget(mean=40, p05=34.5)),
        (None, None),
    ],
)
def test_budgets_of_the_command_line(text: str | None, budget: QualityBudget | None) -> None:
    assert quality_budget(text) == budget


@pytest.mark.parametrize("text", ["p05=34", "mean=40,mean=30", "mean=40,p05", "mean=40,p50=3", "40,34", ""])
def test_what_is_no_budget_of_the_command_line(text: str) -> None:
    with pytest.raises(UsageError, match="--min-psnr: expected a number of decibels, 0 or more, or two of them"):
        quality_budget(text)


def test_a_tail_is_recorded(stepfold, tiny_checkpoint: Path, out: Path) -> None:
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--min-psnr", "mean=25,p05=15", *SEARCH, "--json")
    assert result.code == 0, result.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["passes"][-1]["schedule"]["min_psnr"] == {"mean": 25.0, "p05": 15.0}
    figures = result.document()["quality"]["psnr_db"]
    assert figures["min"] <= figures["p05"] <= figures["mean"]


def raises(error: BaseException):
    def write(folder: Path, *_: object) -> None:
        (folder / "half").write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted; nothing was written."),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    ],
)
def test_writing_that_stops_leaves_nothing(
    stepfold, tiny_checkpoint: Path, out: Path, monkeypatch, error: BaseException, message: str
) -> None:
    monkeypatch.setattr("stepfold.runtime.packing.write_tables", raises(error))
    monkeypatch.setattr("stepfold.runtime.compiler.measure", lambda *_: None)
    result = stepfold("optimize", tiny_checkpoint, "--out", out, "--recipe", HOIST)
    assert (result.code, message in result.error) == (1, True)
    assert empty(out.parent)


def test_overwriting_that_stops_leaves_the_old_bundle(
    stepfold, tiny_checkpoint: Path, bundle_folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr("stepfold.runtime.packing.write_tables", raises(KeyboardInterrupt()))
    monkeypatch.setattr("stepfold.runtime.compiler.measure", lambda *_: None)
    words = ("--out", bundle_folder, "--overwrite", "--recipe", HOIST)
    assert stepfold("optimize", tiny_checkpoint, *words).code == 1
    assert stepfold("verify", bundle_folder).code == 0
