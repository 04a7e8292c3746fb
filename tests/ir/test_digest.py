"""The hash of a stage: the same for the same stage in any process, another for whatever a lowering can read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Modulated, denoiser, modulated_example
from torch import fx

from stepfold.ir.digest import stage_digest
from stepfold.ir.program import Stage
from stepfold.loop.ports import Port, Rate


def stage() -> Stage:
    return denoiser(Modulated(), *modulated_example()).step


def copy(original: Stage) -> Stage:
    return replace(original, graph=deepcopy(original.graph))


def call(item: Stage, target: Any) -> fx.Node:
    return item.graph.graph.find_nodes(op="call_function", target=target)[0]


def weight(item: Stage) -> torch.Tensor:
    return next(value for value in item.tensors().values() if value.is_floating_point())


def test_a_stage_that_is_made_again_has_the_same_hash() -> None:
    digest = stage_digest(stage())
    assert digest is not None and len(digest) == 64
    assert stage_digest(stage()) == digest == stage_digest(copy(stage()))


@pytest.mark.slow
def test_the_hash_is_the_same_in_another_process() -> None:
    code = (
        "from programs import Modulated, denoiser, modulated_example; from stepfold.ir.digest import stage_digest; "
        "print(stage_digest(denoiser(Modulated(), *modulated_example()).step))"
    )
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == stage_digest(stage())


def _one_bit(item: Stage) -> None:
    flat = weight(item).data.view(-1).view(torch.int32)
    flat[0] ^= 1


def _argument(item: Stage) -> None:
    node = call(item, torch.ops.aten.unsqueeze.default)
    node.args = (node.args[0], -2)


def _operator(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).target = torch.ops.aten.cos.default


def _name(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).name = "another"


def _source(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).meta["stack_trace"] = "another line"


def _module(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).meta["nn_module_stack"] = {"key": ("elsewhere", "Linear")}


def _shape(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).meta["shape"] = (None, 7)


@pytest.mark.parametrize("change", [_one_bit, _argument, _operator, _name, _source, _module, _shape])
def test_what_a_lowering_reads_changes_the_hash(change: Callable[[Stage], None]) -> None:
    changed = copy(stage())
    change(changed)
    assert stage_digest(changed) not in (None, stage_digest(stage()))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "other"},
        {"rate": Rate.ONCE},
        {"inputs": (Port("x", (None, 3, 6), "float32"), *stage().inputs[1:])},
        {"outputs": (Port("y", (None, 3, 5), "float16"),)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_ports_name_and_rate_change_the_hash(fields: dict[str, Any]) -> None:
    assert stage_digest(replace(stage(), **fields)) not in (None, stage_digest(stage()))


def test_the_names_that_one_process_gives_to_modules_do_not() -> None:
    keys = copy(stage())
    for node in keys.graph.graph.nodes:
        entries = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {f"key_{i}": entry for i, entry in enumerate(entries.values())}
    assert stage_digest(keys) == stage_digest(stage())


class Opaque:
    """An argument whose text would be its address."""


def _opaque(item: Stage) -> None:
    node = call(item, torch.ops.aten.unsqueeze.default)
    node.args = (node.args[0], Opaque())  # type: ignore[assignment]


def _function(item: Stage) -> None:
    call(item, torch.ops.aten.sin.default).target = lambda x: x.sin()


@pytest.mark.parametrize("change", [_opaque, _function])
def test_what_has_no_stable_text_has_no_hash(change: Callable[[Stage], None]) -> None:
    changed = copy(stage())
    change(changed)
    assert stage_digest(changed) is None
