"""`passes`, `recipes` and `backends`."""

from typing import Literal

import pytest

from stepfold.backends.registry import BACKENDS
from stepfold.cli.passes import attributes, describe_options, type_name
from stepfold.loop.budget import QualityBudget


def test_passes(stepfold) -> None:
    entries = {entry["name"]: entry for entry in stepfold("passes", "--json").document()["passes"]}
    assert list(entries) == ["hoist", "prune", "cut", "sparsify_attention", "quantize", "fuse", "schedule"]
    assert entries["hoist"]["options"] == {}
    assert entries["quantize"]["options"]["skip"] == {
        "type": "list of str",
        "default": [],
        "description": "module patterns to leave alone.",
    }
    evaluations = entries["schedule"]["options"]["evaluations"]
    assert (evaluations["type"], evaluations["default"]) == ("int | auto", "auto")


def test_every_option_of_every_pass_is_described(stepfold) -> None:
    for entry in stepfold("passes", "--json").document()["passes"]:
        assert entry["summary"] and entry["source"] and entry["family"]
        assert [name for name, option in entry["options"].items() if not option["description"]] == []


def test_passes_as_text(stepfold) -> None:
    everything, one = stepfold("passes").out, stepfold("passes", "schedule").out
    assert "hoist" in everything and "hoist" not in one
    assert "int | auto" in one and "denoiser calls in the plan" in one
    assert "It has no options." in stepfold("passes", "hoist").out


def test_recipes(stepfold) -> None:
    entries = {entry["name"]: entry for entry in stepfold("recipes", "--json").document()["recipes"]}
    assert {"default", "fp32", "int8", "int8-static"} <= entries.keys()
    assert entries["default"]["passes"][-1] == "schedule"
    assert all(entry["summary"] for entry in entries.values())
    assert list(entries) == [entry["name"] for entry in stepfold("recipes", "--json").document()["recipes"]]


def test_a_shown_recipe_can_be_used(stepfold, tmp_path) -> None:
    from stepfold.passes.recipe import load_recipe

    (tmp_path / "mine.yaml").write_text(stepfold("recipes", "default").out)
    mine, shipped = load_recipe(tmp_path / "mine.yaml"), load_recipe("default")
    assert mine.document() == shipped.document()
    assert mine.summary == shipped.summary


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("passes", "hoits"), "pass 'hoits': no such pass; did you mean 'hoist'?"),
        (("recipes", "int9"), "recipe 'int9': no such recipe; did you mean 'int8'?"),
    ],
)
def test_unknown_names(stepfold, words: tuple[str, str], message: str) -> None:
    result = stepfold(*words)
    assert (result.code, result.error) == (2, message)


def test_backends(stepfold) -> None:
    entries = {entry["name"]: entry for entry in stepfold("backends", "--json").document()["backends"]}
    assert set(entries) == {backend.name for backend in BACKENDS}
    for entry in entries.values():
        assert entry.keys() == {"name", "can_build", "can_run", "version", "reason", "install", "options"}
        assert [name for name, option in entry["options"].items() if not option["description"]] == []
    assert entries["onnxruntime"]["can_run"] and list(entries["onnxruntime"]["options"]) == ["provider", "rows"]
    assert entries["openvino"]["options"]["precision"]["type"] == "fp32 | bf16"
    text = stepfold("backends").out
    assert entries["onnxruntime"]["version"] in text and "openvino.precision" in text


def test_attributes_are_read_from_a_docstring() -> None:
    text = """Say something.

    Attributes:
        first: one line.
        second: begins
            and goes on: here.

    Raises:
        third: is none.
    """
    assert attributes(text) == {"first": "one line.", "second": "begins and goes on: here."}


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | Literal["auto"], "int | auto"),
        (float | None, "number | null"),
        (tuple[str, ...], "list of str"),
        (bool, "true | false"),
        (Literal["a", "b"], "a | b"),
        (QualityBudget | None, "{mean, p05} | null"),
    ],
)
def test_types_in_words(annotation: object, text: str) -> None:
    assert type_name(annotation) == text


def test_an_option_without_a_default() -> None:
    from pydantic import BaseModel

    class Options(BaseModel):
        """Options.

        Attributes:
            rank: of the factors.
        """

        rank: int

    assert describe_options(Options) == {"rank": {"type": "int", "default": None, "description": "of the factors."}}
