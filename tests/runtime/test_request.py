"""A request that does not fit the model is refused with what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepfold.loop.errors import UsageError
from stepfold.loop.ports import InputPort, Port
from stepfold.loop.spec import LoopSpec
from stepfold.runtime.request import build_request

INPUTS = (
    InputPort(Port("x", (None, 1, 2, 2), "float32"), "state"),
    InputPort(Port("t", (None,), "float32"), "timestep"),
    InputPort(Port("labels", (None,), "int64"), "condition", 5),
    InputPort(Port("text", (None, 3), "float32"), "condition"),
)
NOISE = np.zeros((2, 1, 2, 2), np.float32)
LABELS, TEXT = np.array([1, 2]), np.ones((2, 3), np.float32)


def loop(unconditional: Any = "input") -> LoopSpec:
    return LoopSpec.model_validate(
        {
            "inputs": {"x": "state", "t": "timestep", "labels": "condition", "text": "condition"},
            "sampler": {"scheduler": "DDIMScheduler", "steps": 4},
            "guidance": None if unconditional is None else {"scale": 2.0, "unconditional": unconditional},
            "latent": {"shape": [1, 2, 2]},
        }
    )


def request(noise: Any = NOISE, unconditional: Any = None, spec: LoopSpec | None = None, **conditions: Any) -> Any:
    spec = spec or loop({"labels": 4})
    given = {"labels": LABELS, "text": TEXT, **conditions}
    given = {name: value for name, value in given.items() if value is not None}
    return build_request(INPUTS, spec, noise, given, unconditional, guided=spec.guidance is not None)


def refused(**arguments: Any) -> str:
    with pytest.raises(UsageError) as error:
        request(**arguments)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (NOISE[0], "noise: expected shape [B, 1, 2, 2] with B at least 1; received [1, 2, 2]."),
        (NOISE[:, :, :1], "noise: expected shape [B, 1, 2, 2] with B at least 1; received [2, 1, 1, 2]."),
        (NOISE[:0], "noise: expected shape [B, 1, 2, 2] with B at least 1; received [0, 1, 2, 2]."),
        (NOISE.astype("float64"), "noise: expected dtype float32; received float64. Convert it: .astype('float32')"),
        (NOISE.astype("int32"), "noise: expected dtype float32; received int32."),
        (NOISE + np.float32(np.nan), "noise: expected finite numbers; received NaN or infinity in 8 places."),
        (np.where(np.arange(8).reshape(NOISE.shape) == 3, np.float32(np.inf), NOISE), "infinity in 1 places."),
        (NOISE + np.float32(1e30), "noise: expected standard normal numbers; received 1e+30."),
        ("noise", "noise: expected an array of numbers; received str of dtype <U5."),
        ([[1], [2, 3]], "noise: expected an array of numbers; received list"),
        (None, "noise: expected an array of numbers; received NoneType of dtype object."),
    ],
)
def test_noise(noise: Any, message: str) -> None:
    assert message in refused(noise=noise)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"labels": None}, "conditions: expected labels [B] int64; received ['text']."),
        (
            {"label": LABELS},
            "label: expected a condition of this model; received an unknown name: did you mean 'labels'?",
        ),
        ({"t": LABELS}, "t: the loop computes this input itself; expected conditions only."),
        ({"labels": np.array([1])}, "labels: expected 2 rows, one for each sample of the noise; received 1."),
        ({"labels": 3}, "labels: expected shape [B]; received []."),
        ({"labels": np.array([[1], [2]])}, "labels: expected shape [B]; received [2, 1]."),
        ({"labels": np.array([1.0, 2.0])}, "labels: expected dtype int64; received float64."),
        ({"labels": [1.5, 2]}, "labels: expected dtype int64; received float64."),
        ({"labels": [True, False]}, "labels: expected dtype int64; received bool."),
        ({"labels": ["a", "b"]}, "labels: expected an array of numbers; received list of dtype <U1."),
        ({"labels": np.array([0, 5])}, "labels: expected indices from 0 to 4; received 5 at position 1."),
        ({"labels": np.array([-1, 0])}, "labels: expected indices from 0 to 4; received -1 at position 0."),
        ({"labels": np.array([2**63, 0], np.uint64)}, "labels: expected values that fit int64; received uint64 up to"),
        ({"text": TEXT[:, :2]}, "text: expected shape [B, 3]; received [2, 2]."),
        ({"text": TEXT.astype("float64")}, "text: expected dtype float32; received float64. Convert it: .astype("),
        ({"text": TEXT * np.float32(np.nan)}, "text: expected numbers; received NaN in 6 places."),
        ({"text": TEXT.astype("int64")}, "text: expected dtype float32; received int64."),
    ],
)
def test_conditions(conditions: dict[str, Any], message: str) -> None:
    assert message in refused(**conditions)


@pytest.mark.parametrize("labels", [[1, 2], (1, 2), np.array([1, 2], np.int32), np.array([1, 2], np.uint8)])
def test_whole_numbers_become_the_dtype_of_an_index(labels: Any) -> None:
    made = request(labels=labels)
    assert made.conditions["labels"].dtype == np.int64 and made.conditions["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("text", [TEXT.astype("float16"), TEXT.tolist(), [[1, 1, 1], [1, 1, 1]]])
def test_conversions_that_keep_every_value(text: Any) -> None:
    made = request(text=text)
    assert made.conditions["text"].dtype == np.float32
    np.testing.assert_array_equal(made.conditions["text"], TEXT)


def test_infinity_is_a_condition_such_as_an_attention_mask() -> None:
    assert np.isinf(request(text=TEXT * -np.float32(np.inf)).conditions["text"]).all()


class Tensor:
    """Looks like a torch tensor on another device."""

    dtype = "torch.float32"

    def __init__(self, array: np.ndarray):
        self.array = array

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def numpy(self) -> np.ndarray:
        if self.array.dtype == object:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


def test_tensors_are_recognized_without_torch() -> None:
    made = request(noise=Tensor(NOISE), labels=Tensor(LABELS))
    assert type(made.noise) is np.ndarray and made.conditions["labels"].tolist() == [1, 2]
    message = refused(noise=Tensor(np.array(None)))
    assert message == "noise: expected an array of numbers; received Tensor: Got unsupported ScalarType BFloat16"


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"labels": 4}, {"labels": [4, 4], "text": TEXT.tolist()}),
        ({"labels": 4, "text": 0}, {"labels": [4, 4], "text": np.zeros((2, 3)).tolist()}),
        ({"text": [0.5, 1, 2]}, {"labels": [1, 2], "text": [[0.5, 1, 2]] * 2}),
    ],
)
def test_values_of_the_unconditional_branch(declared: dict[str, Any], expected: dict[str, Any]) -> None:
    made = request(spec=loop(declared))
    assert {name: value.tolist() for name, value in made.unconditional.items()} == expected
    assert made.unconditional["labels"].dtype == np.int64 and made.unconditional["text"].dtype == np.float32


def test_unconditional_values_of_the_caller() -> None:
    made = request(spec=loop("input"), unconditional={"text": TEXT * 0})
    assert made.unconditional["labels"].tolist() == [1, 2] and not made.unconditional["text"].any()


@pytest.mark.parametrize(
    ("declared", "given", "message"),
    [
        ("input", None, "unconditional: expected a mapping with values for labels, text (a negative prompt)"),
        ("input", {}, "unconditional: expected a mapping with values for labels, text"),
        ("input", {"texts": TEXT}, "texts: expected a condition of this model; received an unknown name: did you mean"),
        ("input", {"text": TEXT[:1]}, "text: expected 2 rows, one for each sample of the noise; received 1."),
        ({"labels": 4}, {"text": TEXT}, "unconditional: expected none; the loop gives the values {'labels': 4}."),
        (None, {"text": TEXT}, "unconditional: expected none; this loop has no guidance."),
        ({"labels": 9}, None, "labels: expected indices from 0 to 4; received 9"),
        ({"text": [0, 0]}, None, "guidance.unconditional.text: expected a number or an array [3]; received shape [2]."),
        ({"labels": 0.5}, None, "labels: expected dtype int64; received float64."),
    ],
)
def test_unconditional_refusals(declared: Any, given: Any, message: str) -> None:
    assert message in refused(spec=loop(declared), unconditional=given)


def test_without_guidance_there_is_one_branch() -> None:
    assert request(spec=loop(None)).unconditional is None
