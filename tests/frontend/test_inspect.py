"""The content of `inspect --json`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import zoo
from zoo import EACH, ZooModel

from stepfold.frontend.capture import capture
from stepfold.frontend.inspect import inspect_program
from stepfold.ir.program import Program

Captured = Callable[[ZooModel], Program]


@pytest.mark.parametrize("model", EACH)
def test_every_zoo_model_is_described(model: ZooModel, captured: Captured) -> None:
    program = captured(model)
    document = json.loads(json.dumps(inspect_program(program)))
    assert document["class"] == model.class_name
    assert document["parameters"] == sum(rate["parameters"] for rate in document["rates"])
    assert (document["loop"] is None) == (not model.is_loop)
    assert document["unsupported"] == []
    assert all(entry["source"] for entry in document["frozen_dimensions"])


def test_inputs_loop_and_sites(captured: Captured) -> None:
    document = inspect_program(captured(zoo.DIT))
    assert document["inputs"][0] == {
        "name": "hidden_states",
        "role": "state",
        "shape": [None, 4, 8, 8],
        "dtype": "float32",
    }
    assert document["loop"]["sampler"]["steps"] == 8
    assert document["sites"] == {"linear": 22, "attention": 2, "feed_forward": 2, "modulate": 5, "block": 2}


def test_flops_are_for_one_sample(captured: Captured) -> None:
    rates = {rate["rate"]: rate for rate in inspect_program(captured(zoo.DIT))["rates"]}
    # step: patch convolution; in 2 blocks q k v out, attention, up and down; the last projection. 16 tokens, width 32
    tokens, width = 16, 32
    linears = 4 * width * width + 2 * width * 4 * width
    step = 2 * tokens * (2 * linears + 2 * 2 * tokens * width + 4 * 4 * width + width * 32)
    assert rates["step"]["flops"] == step
    assert rates["once×timestep"]["flops"] > 0


@pytest.mark.slow
def test_near_misses_are_listed(captured: Captured) -> None:
    misses = inspect_program(captured(zoo.FLUX))["near_misses"]
    assert {"kind", "site", "missing"} == set(misses[0])


class Complex(torch.nn.Module):
    """Complex exponential: no engine has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x).exp())


def test_what_no_engine_runs_is_named() -> None:
    document = inspect_program(capture(Complex(), {"x": torch.randn(2, 3, 2)}))
    reasons = [entry["reason"] for entry in document["unsupported"]]
    assert "aten.exp.default: engines have no complex numbers" in reasons
    assert all("test_inspect.py" in entry["source"] for entry in document["unsupported"])
