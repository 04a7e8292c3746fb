"""`loop.yaml`: what it may say, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from stepfold.loop.errors import UsageError
from stepfold.loop.spec import ComponentFile, InputSpec, LoopSpec, SamplerSpec, read_loop

ROOT = Path(__file__).resolve().parents[2]
LOOP = """
inputs: {hidden_states: state, timestep: timestep, class_labels: condition}
sampler: {scheduler: FlowMatchEulerDiscreteScheduler, steps: 50}
guidance: {scale: 2.0, unconditional: {class_labels: 10}}
latent: {shape: [1, 32, 32]}
"""


def read(tmp_path: Path, text: str) -> LoopSpec | ComponentFile:
    path = tmp_path / "loop.yaml"
    path.write_text(text)
    return read_loop(path)


def loop(tmp_path: Path, text: str) -> LoopSpec:
    spec = read(tmp_path, text)
    assert isinstance(spec, LoopSpec)
    return spec


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and message.startswith(str(tmp_path / "loop.yaml"))
    return message.removeprefix(str(tmp_path / "loop.yaml"))


def test_reference_loop() -> None:
    spec = read_loop(ROOT / "examples" / "mnist_dit" / "loop.yaml")
    assert isinstance(spec, LoopSpec) and spec.guidance is not None
    assert (spec.state, spec.timestep, spec.conditions) == ("hidden_states", "timestep", ["class_labels"])
    assert spec.sampler == SamplerSpec(
        scheduler="FlowMatchEulerDiscreteScheduler",
        config={"num_train_timesteps": 1000},
        steps=50,
        set_timesteps={"sigmas": "linspace"},
    )
    assert spec.guidance.scales == (2.0,) and spec.guidance.unconditional == {"class_labels": 10}
    assert spec.latent.shape == (1, 32, 32) and not spec.guidance.strict


def test_inputs_written_out(tmp_path: Path) -> None:
    text = LOOP.replace("class_labels: condition", "class_labels: {role: condition, shape: [77, 768], dtype: float32}")
    assert loop(tmp_path, text).inputs["class_labels"] == InputSpec(role="condition", shape=(77, 768), dtype="float32")


def test_several_guidance_scales(tmp_path: Path) -> None:
    guidance = loop(tmp_path, LOOP.replace("scale: 2.0", "scale: {values: [1.5, 2, 4]}, strict: true")).guidance
    assert guidance is not None and guidance.scales == (1.5, 2.0, 4.0) and guidance.strict


def test_unconditional_input(tmp_path: Path) -> None:
    guidance = loop(tmp_path, LOOP.replace("{class_labels: 10}", "input")).guidance
    assert guidance is not None and guidance.unconditional == "input"


def test_without_guidance_and_with_constants(tmp_path: Path) -> None:
    lines = [line for line in LOOP.splitlines() if not line.startswith("guidance")]
    spec = loop(tmp_path, "\n".join([*lines, "constants: {return_dict: false}"]))
    assert spec.guidance is None and spec.constants == {"return_dict": False}


def test_component(tmp_path: Path) -> None:
    text = (
        "component: {method: decode}\ninputs: {z: condition, flag: {role: constant}}\nconstants: {return_dict: false}"
    )
    spec = read(tmp_path, text)
    assert isinstance(spec, ComponentFile) and spec.component.method == "decode"
    assert {name: value.role for name, value in spec.inputs.items()} == {"z": "condition", "flag": "constant"}


def test_component_runs_forward_by_default(tmp_path: Path) -> None:
    spec = read(tmp_path, "component: {}")
    assert isinstance(spec, ComponentFile) and spec.component.method == "forward"


def test_specs_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        loop(tmp_path, LOOP).latent = None  # type: ignore[assignment]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml: expected a loop file, YAML; there is no such file\."):
        read_loop(tmp_path / "absent.yaml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a loop file, YAML; received a folder\."):
        read_loop(tmp_path)


def test_not_yaml(tmp_path: Path) -> None:
    """What YAML files may hold is tested with their reader."""
    assert refusal(tmp_path, "inputs: {a: [").startswith(": expected a loop file, YAML; not a YAML text: ")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1", "list"), ("just words", "str")])
def test_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    message = refusal(tmp_path, text)
    assert message == f": expected a mapping with inputs, sampler and latent; received {kind}."


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "hidden_states: state",
            "hidden_states: condition",
            "exactly one input must have the role 'state'; received []",
        ),
        (
            "class_labels: condition",
            "class_labels: timestep",
            "exactly one input must have the role 'timestep'; received",
        ),
        (
            "class_labels: condition",
            "class_labels: label",
            "inputs.class_labels.role: Input should be 'state', 'timestep'",
        ),
        (
            "{class_labels: 10}",
            "{labels: 10}",
            "guidance.unconditional names ['labels'], which are not condition inputs",
        ),
        ("{class_labels: 10}", "{timestep: 10}", "guidance.unconditional names ['timestep'], which are not condition"),
        ("latent:", "constants: {hidden_states: 5}\nlatent:", "constants names ['hidden_states'], which are inputs of"),
        ("steps: 50", "steps: 0", "sampler.steps: Input should be greater than 0 (received 0)"),
        ("steps: 50", "steps: 2001", "sampler.steps: Input should be less than or equal to 2000 (received 2001)"),
        ("steps: 50", "steps: many", "sampler.steps: Input should be a valid integer"),
        (", steps: 50", "", "sampler.steps: Field required"),
        ("steps: 50", "steps: 50, eta: 0.5", "sampler.eta: Extra inputs are not permitted (received 0.5)"),
        ("scale: 2.0", "scale: strong", "guidance.scale"),
        ("scale: 2.0", "scale: {values: []}", "at least 1 item"),
        ("[1, 32, 32]", "[]", "latent.shape: Tuple should have at least 1 item"),
        ("latent:", "latents:", "latent: Field required"),
        ("latent:", "latents:", "latents: Extra inputs are not permitted"),
    ],
)
def test_wrong_loops_say_where_and_what(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in LOOP
    message = refusal(tmp_path, LOOP.replace(old, new))
    assert expected in message and "\n" not in message


NUMBERS = {
    "sampler.steps": (True, "8", 8.5, None, [8], 10**30, ".nan"),
    "sampler.output_scale": (0, ".nan", 1e300, True),
    "sampler.timestep_offset": (".nan", ".inf", "x", 1e300, True),
    "sampler.timestep_scale": (0, -1, ".nan", ".inf", "x", 1e300, True),
    "sampler.config": ({"shift": ".nan"}, {"shift": ".inf"}, {"shift": {"a": [".nan"]}}),
    "guidance.scale": (
        ".nan",
        ".inf",
        1e300,
        True,
        "big",
        {"values": [".nan"]},
        {"values": [2.0, 2.0]},
        {"values": ["a"]},
    ),
    "guidance.unconditional.class_labels": ("ten", None, {"a": 1}, [], [[1], [2, 3]], 10**30, ".nan", ["a"]),
    "latent.shape": ([1, -8, 8], [1, 0, 8], [10**6, 10**6], [10**30], "abc", [1.5, 8], [[1]], [True], [1] * 100),
    "inputs.class_labels.shape": ([-3], [0], [10**12], [10**30], [1.5], "abc"),
    "inputs.class_labels.dtype": ("int65", "ops", "complex64", "qint8", "bits8", "float8_e4m3fn", 5),
    "inputs.timestep.dtype": ("int8", "bool", "uint8"),
    "constants.a": (".nan", [".inf"], {"b": ".nan"}, {1: 2}),
}


@pytest.mark.parametrize(("place", "value"), [(place, value) for place, values in NUMBERS.items() for value in values])
def test_values_out_of_their_range(tmp_path: Path, place: str, value: object) -> None:
    """The texts `.nan` and `.inf` are written as the numbers of YAML."""
    document = yaml.safe_load(LOOP)
    document["inputs"] = {name: {"role": role} for name, role in document["inputs"].items()}
    *parents, last = place.split(".")
    target = document
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    text = yaml.safe_dump(document).replace("'.nan'", ".nan").replace("'.inf'", ".inf")
    message = refusal(tmp_path, text)
    assert message.startswith(f": {'.'.join(parents)}") and "\n" not in message


def test_wrong_component(tmp_path: Path) -> None:
    message = refusal(tmp_path, "component: {method: decode, model: vae}")
    assert message == ": component.model: Extra inputs are not permitted (received 'vae')"
