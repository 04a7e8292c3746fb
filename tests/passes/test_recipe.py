"""Recipes: what a file may say, and what is said about every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stepfold.loop.errors import UsageError
from stepfold.passes.recipe import Recipe, load_recipe, override, shipped_recipes


@pytest.fixture
def write(tmp_path: Path):
    """Write a recipe file and return its path."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def entries(recipe: Recipe) -> list[tuple[str, dict[str, Any], bool]]:
    return [(entry.name, dict(entry.options), bool(entry.optional)) for entry in recipe.entries]


def message(source: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(source).steps()
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- what is shipped


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_well_formed(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary.endswith(".") and len(recipe.summary) < 120
    assert recipe.backend == ("tensorrt" if name.startswith("trt-") else "onnxruntime")
    assert [step.operation.name for step in recipe.steps()] == [entry.name for entry in recipe.entries]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_ends_with_the_schedule(name: str) -> None:
    """As the interface says; hoisting comes first, because scales of a whole batch cannot be hoisted."""
    names = [entry.name for entry in load_recipe(name).entries]
    assert names[-1] == "schedule" and names[0] == "hoist"
    assert load_recipe(name).entries[-1].options == {"evaluations": "auto", "min_psnr": BUDGETS.get(name, 40.0)}


BUDGETS = {"prune": 30.0, "mixed": 38.0, "trt-fp8": 38.0, "w4-gptq": 35.0, "w4-svdquant": 35.0}
"""What fewer bits or channels cannot hold with few evaluations: less than the 40 dB of the others."""


def test_names_that_users_rely_on() -> None:
    assert {"default", "fp32", "int8", "int8-static"} <= set(shipped_recipes())


# -- what a recipe may say


def test_options_and_optional(write) -> None:
    path = write(
        "name: custom\nsummary: Mine.\ntarget: {backend: onnxruntime}\npasses:\n  - hoist\n"
        "  - quantize: {activations: static, skip: ['*.proj*']}\n    optional: true\n  - fuse:\n"
    )
    recipe = load_recipe(path)
    assert (recipe.name, recipe.summary, recipe.backend) == ("custom", "Mine.", "onnxruntime")
    assert entries(recipe) == [
        ("hoist", {}, False),
        ("quantize", {"activations": "static", "skip": ["*.proj*"]}, True),
        ("fuse", {}, False),
    ]
    steps = recipe.steps()
    assert [(step.operation.name, step.optional) for step in steps] == [
        ("hoist", False), ("quantize", True), ("fuse", False),
    ]  # fmt: skip
    assert steps[1].operation.options.skip == ("*.proj*",)


def test_a_recipe_without_a_name_takes_that_of_its_file(write) -> None:
    assert load_recipe(write("passes: [hoist]\n", "quick.yml")).name == "quick"


def test_a_file_without_the_suffix_is_found(write) -> None:
    assert entries(load_recipe(write("passes: [hoist]\n", "quick"))) == [("hoist", {}, False)]


def test_content_as_a_mapping() -> None:
    recipe = load_recipe({"passes": ["hoist", {"fuse": {"rules": ["rotary"]}}]})
    assert recipe.backend is None and recipe.name == "recipe"
    assert recipe.steps()[1].operation.options.rules == ("rotary",)


def test_loading_does_not_change_a_mapping() -> None:
    content = {"extends": "int8", "passes": [{"quantize": {"skip": ["a"]}}]}
    load_recipe(content)
    assert content == {"extends": "int8", "passes": [{"quantize": {"skip": ["a"]}}]}


# -- extends


def test_extending_gives_new_options_to_a_pass(write) -> None:
    path = write("extends: int8\npasses:\n  - schedule: {evaluations: 5}\n")
    recipe, base = load_recipe(path), load_recipe("int8")
    assert [entry.name for entry in recipe.entries] == [entry.name for entry in base.entries]
    assert recipe.entries[-1].options == {**base.entries[-1].options, "evaluations": 5}
    assert recipe.entries[:-1] == base.entries[:-1]
    assert recipe.target == base.target and recipe.name == "mine"


def test_a_new_pass_goes_before_the_schedule(write) -> None:
    base = write("passes:\n  - hoist\n  - schedule: {evaluations: 5}\n", "base.yaml")
    path = write("extends: base.yaml\npasses:\n  - quantize: {}\n  - fuse: {}\n")
    assert [entry.name for entry in load_recipe(path).entries] == ["hoist", "quantize", "fuse", "schedule"]
    assert [entry.name for entry in load_recipe(base).entries] == ["hoist", "schedule"]


def test_a_new_pass_goes_behind_those_of_its_phase(write) -> None:
    write("passes: [fuse, schedule]\n", "base.yaml")
    path = write("extends: base.yaml\npasses: [quantize, hoist, quantize]\n")
    assert [entry.name for entry in load_recipe(path).entries] == ["hoist", "quantize", "quantize", "fuse", "schedule"]


def test_without_a_schedule_a_new_pass_goes_last(write) -> None:
    write("passes: [hoist]\n", "base.yaml")
    path = write("extends: base.yaml\npasses: [fuse]\n")
    assert [entry.name for entry in load_recipe(path).entries] == ["hoist", "fuse"]


def test_extending_alone_is_enough(write) -> None:
    assert load_recipe(write("name: mine\nextends: fp32\n")).entries == load_recipe("fp32").entries


def test_optional_is_inherited_unless_given(write) -> None:
    write("passes:\n  - quantize: {}\n    optional: true\n  - fuse: {}\n    optional: true\n", "base.yaml")
    path = write("extends: base.yaml\npasses:\n  - quantize: {min_tokens: 3}\n  - fuse: {}\n    optional: false\n")
    assert entries(load_recipe(path)) == [("quantize", {"min_tokens": 3}, True), ("fuse", {}, False)]


def test_extends_is_relative_to_the_file(write) -> None:
    write("passes: [hoist]\n", "family/base.yaml")
    path = write("extends: base.yaml\n", "family/mine.yaml")
    assert [entry.name for entry in load_recipe(path).entries] == ["hoist"]


def test_extending_twice(write) -> None:
    write("extends: int8\npasses:\n  - schedule: {samples: 9}\n", "middle.yaml")
    path = write("extends: middle.yaml\npasses:\n  - schedule: {evaluations: 3}\n")
    options = load_recipe(path).entries[-1].options
    assert (options["samples"], options["evaluations"], options["min_psnr"]) == (9, 3, 40.0)


def test_the_target_is_inherited_or_replaced(write) -> None:
    write("target: {backend: other}\npasses: [hoist]\n", "base.yaml")
    assert load_recipe(write("extends: base.yaml\n")).backend == "other"
    assert load_recipe(write("extends: base.yaml\ntarget: {backend: onnxruntime}\n")).backend == "onnxruntime"


# -- mistakes: file, line, what was received, the nearest valid name

MISTAKES = {
    "pass": ("passes:\n  - hoist: {}\n  - quantise: {}\n", ", line 3: unknown pass 'quantise'; did you mean 'quantize'?"),
    "far pass": ("passes: [zzz]\n", ", line 1: unknown pass 'zzz'; valid: cut, fuse, hoist, prune, quantize, schedule, "),
    "option": (
        "passes:\n  - hoist: {}\n\n  - schedule:\n      evaluation: 3\n",
        ", line 4: pass schedule: unknown option 'evaluation'; did you mean 'evaluations'?",
    ),
    "no options": ("passes:\n  - hoist: {deep: 1}\n", ", line 2: pass hoist: unknown option 'deep'; this pass has no options."),
    "value": (
        "passes:\n  - quantize: {scheme: int3}\n",
        ", line 2: pass quantize: option 'scheme': expected 'int8', 'int8-weights', 'int4',",
    ),
    "one of several values": (
        "passes:\n  - fuse: {rules: [atention]}\n",
        ", line 2: pass fuse: option 'rules': expected 'rms_norm', 'rotary' or 'attention';",
    ),
    "value of a union": (
        "passes:\n  - schedule: {evaluations: few}\n",
        ", line 2: pass schedule: option 'evaluations': expected a valid integer, unable to parse string as an integer or",
    ),
    "range": (
        "passes:\n  - schedule: {samples: 1}\n",
        ", line 2: pass schedule: option 'samples': expected greater than or equal to 4; received 1.",
    ),
    "order": (
        "passes:\n  - hoist\n  - schedule: {evaluations: 2}\n  - quantize\n",
        ", line 4: pass quantize: expected it before schedule, because the phases of a recipe are hoist, prune, cut,",
    ),
    "key": ("name: a\npases:\n  - hoist\n", ", line 2: unknown key 'pases'; did you mean 'passes'?"),
    "list": ("name: a\npasses: {hoist: {}}\n", ", line 2: expected `passes` to be a list; received dict."),
    "entry": ("passes:\n  - hoist\n  - 3\n", ", line 3: expected a pass name with its options; received 3."),
    "two in one": (
        "passes:\n  - {hoist: {}, fuse: {}}\n",
        ", line 2: expected one pass and maybe `optional: true`; received {'hoist': {}, 'fuse': {}}.",
    ),
    "optional alone": ("passes:\n  - optional: true\n", ", line 2: expected one pass and maybe `optional: true`"),
    "optional word": ("passes:\n  - fuse: {}\n    optional: maybe\n", ", line 2: expected one pass and maybe `optional: true`"),
    "options word": ("passes:\n  - fuse: all\n", ", line 2: expected the options of 'fuse' as a mapping; received 'all'."),
    "empty": ("passes: []\n", ": a recipe needs at least one pass; received none."),
    "nothing": ("name: a\n", ": a recipe needs at least one pass; received none."),
    "no mapping": ("- hoist\n", ": expected a mapping with `passes`; received list."),
    "no text": ("", ": expected a mapping with `passes`; received NoneType."),
    "no YAML": ("passes: [hoist\n", ": expected a recipe, YAML; not a YAML text: while parsing a flow sequence"),
    "target": ("target: onnxruntime\npasses: [hoist]\n", ", line 1: expected `target` as a mapping such as {backend: onnxruntime}"),
    "target key": ("passes: [hoist]\ntarget:\n  bakend: x\n", ", line 2: unknown key 'bakend' of `target`; did you mean 'backend'?"),
    "target value": ("target: {backend: 3}\npasses: [hoist]\n", ", line 1: expected the name of a backend; received 3."),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file(write, name: str) -> None:
    text, expected = MISTAKES[name]
    path = write(text)
    received = message(path)
    assert received.startswith(f"{path}{expected}"), received
    assert len(received.splitlines()) == 1


def test_a_recipe_of_no_name_has_a_neighbour() -> None:
    assert message("defalt") == "recipe 'defalt': no such recipe or file; did you mean 'default'?"
    assert message("zzz").startswith("recipe 'zzz': no such recipe or file; valid: default, ")


def test_a_missing_file(tmp_path: Path) -> None:
    assert (
        message(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: expected a recipe, YAML; there is no such file."
    )


def test_a_folder_and_bytes_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("folder.yaml", "bytes.yaml"):
        assert message(tmp_path / name).startswith(f"{tmp_path / name}: expected a recipe, YAML; received ")


def test_an_unknown_base_has_a_neighbour(write) -> None:
    assert message(write("extends: defalt\n")) == "recipe 'defalt': no such recipe or file; did you mean 'default'?"


@pytest.mark.parametrize("base", ["5", "[int8]"])
def test_a_base_that_is_no_name(write, base: str) -> None:
    assert message(write(f"extends: {base}\n")).startswith("recipe: expected a name or a file; received ")


def test_a_recipe_cannot_extend_itself(write) -> None:
    first, second = write("extends: b.yaml\n", "a.yaml"), write("extends: a.yaml\n", "b.yaml")
    assert message(first) == f"{first}: extends itself through {first} and {second}."


def test_replacing_a_pass_twice_is_ambiguous(write) -> None:
    path = write("extends: int8\npasses:\n  - fuse: {}\n  - fuse: {rules: [rotary]}\n")
    assert message(path).startswith(f"{path}, line 4: pass 'fuse' stands twice and would replace one")


def test_an_error_of_a_base_has_the_file_of_the_base(write) -> None:
    base = write("passes:\n  - hoist\n  - fuse: {rule: []}\n", "base.yaml")
    path = write("extends: base.yaml\npasses:\n  - quantize: {}\n")
    assert message(path).startswith(f"{base}, line 3: pass fuse: unknown option 'rule'; did you mean 'rules'?")


def test_a_mistake_in_a_mapping_has_no_line() -> None:
    assert message({"passes": ["hoist", {"fuse": {"rule": []}}]}).startswith("recipe: pass fuse: unknown option 'rule'")
    assert message({"pases": []}) == "recipe: unknown key 'pases'; did you mean 'passes'?"


# -- settings of the command line


def test_override_replaces_single_options() -> None:
    base = load_recipe("int8")
    recipe = override(
        base, [("schedule", "evaluations", 10), ("quantize", "skip", ["*.proj"]), ("schedule", "samples", 8)]
    )
    assert recipe.entries[-1].options == {**base.entries[-1].options, "evaluations": 10, "samples": 8}
    assert recipe.entries[1].options["skip"] == ["*.proj"]
    assert recipe.entries[0] == base.entries[0]
    assert base.entries[-1].options.get("evaluations") == "auto"


def test_override_of_a_pass_the_recipe_lacks() -> None:
    with pytest.raises(UsageError) as caught:
        override(load_recipe("fp32"), [("quantise", "scheme", "int8")])
    assert str(caught.value).startswith("--set quantise.scheme: recipe 'fp32' has no pass 'quantise'; ")
    with pytest.raises(UsageError, match=r"has no pass 'shedule'; did you mean 'schedule'\?"):
        override(load_recipe("fp32"), [("shedule", "evaluations", 1)])


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("evaluation", 3, "unknown option 'evaluation'; did you mean 'evaluations'?"),
        ("evaluations", "few", "option 'evaluations': expected a valid integer"),
    ],
)
def test_a_mistake_of_the_command_line_names_it(option: str, value: Any, expected: str) -> None:
    recipe = override(load_recipe("fp32"), [("schedule", option, value)])
    with pytest.raises(UsageError) as caught:
        recipe.steps()
    assert str(caught.value).startswith(f"--set schedule.{option}: pass schedule: {expected}")


def test_override_keeps_optional() -> None:
    recipe = override(load_recipe("default"), [("quantize", "min_tokens", 4)])
    assert next(entry for entry in recipe.entries if entry.name == "quantize").optional is True


def two(first: dict[str, Any], second: dict[str, Any]) -> Recipe:
    return load_recipe({"passes": ["hoist", {"quantize": first}, {"quantize": second}]})


def test_override_of_one_of_two_passes() -> None:
    both = two({"part": [0, 0.5]}, {"part": [0.5, 1]})
    for address, expected in (("quantize", [4, 4]), ("quantize:1", [4, None]), ("quantize:2", [None, 4])):
        recipe = override(both, [(address, "min_tokens", 4)])
        assert [entry.options.get("min_tokens") for entry in recipe.entries[1:]] == expected


@pytest.mark.parametrize("number", ["", "0", "3", "-1", "x", "1.5", "²", "9" * 5000])
def test_override_of_a_pass_of_no_number(number: str) -> None:
    with pytest.raises(UsageError, match="expected quantize:1 to quantize:2, the passes of that name in recipe"):
        override(two({"part": [0, 0.5]}, {"part": [0.5, 1]}), [(f"quantize:{number}", "min_tokens", 4)])


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (["hoist", "hoist"], "pass hoist: expected it once; received it twice, and the second has nothing left to do"),
        (["fuse", "fuse"], "pass fuse: expected it once; received it twice, and the second has nothing left to do"),
        ([{"quantize": {"scheme": "int8"}}, "quantize"], "pass quantize: expected it once; received it twice, and the"),
        (
            [{"schedule": {"evaluations": 3}}, {"schedule": {"evaluations": 4}}],
            "pass schedule: expected it once; received it twice, and the second throws away what the first has fitted",
        ),
    ],
)
def test_a_pass_that_could_do_nothing_the_second_time(passes: list[Any], expected: str) -> None:
    assert expected in message({"passes": passes})


def test_passes_of_one_name_with_different_options() -> None:
    assert len(two({"part": [0, 0.5]}, {"part": [0.5, 1]}).steps()) == 3


@pytest.mark.parametrize("evaluations", [0, -1])
def test_a_number_of_evaluations_is_known_to_be_wrong_before_the_model_is_read(evaluations: int) -> None:
    assert "option 'evaluations': expected greater than or equal to 1" in message(
        {"passes": [{"schedule": {"evaluations": evaluations}}]}
    )


@pytest.mark.parametrize("name", ["samples", "search_samples", "validation"])
def test_a_number_of_samples_has_a_limit(name: str) -> None:
    assert f"option '{name}': expected less than or equal to 100000" in message(
        {"passes": [{"schedule": {name: 10**12}}]}
    )


def test_a_file_does_not_stand_in_for_a_shipped_recipe(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("passes: [hoist]", "int8")
    monkeypatch.chdir(path.parent)
    assert [entry.name for entry in load_recipe("int8").entries] == ["hoist", "quantize", "fuse", "schedule"]
    assert [entry.name for entry in load_recipe("./int8").entries] == ["hoist"]


# -- the document in the manifest


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_document_is_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    document = yaml.safe_load(yaml.safe_dump(recipe.document()))
    again = load_recipe(document)
    assert again.document() == recipe.document()
    assert entries(again) == entries(recipe)
    assert (again.name, again.target) == (recipe.name, recipe.target)


def test_the_document_has_what_was_set() -> None:
    recipe = override(load_recipe({"extends": "int8", "name": "mine"}), [("schedule", "evaluations", 3)])
    document = recipe.document()
    assert document["name"] == "mine" and "extends" not in document
    assert document["passes"][-1]["schedule"]["evaluations"] == 3
