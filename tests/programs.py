"""Small programs for tests of passes: a function or module with a loop around it, and what a pass runs in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from graphs import Traced, traced
from torch import fx

from stepfold.frontend.identity import weights_hash
from stepfold.frontend.repairs import repair
from stepfold.frontend.sampler import probe
from stepfold.ir.program import ModelIdentity, Program, Stage, slots_of
from stepfold.ir.shapes import port
from stepfold.loop.driver import Request, run_loop
from stepfold.loop.noise import noise
from stepfold.loop.plan import fold
from stepfold.loop.ports import BoundProgram, InputPort, Rate
from stepfold.loop.spec import LoopSpec
from stepfold.passes.base import Context, Options, Pass, PassResult
from stepfold.passes.manager import Step, run_passes

FLOW = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "config": {"num_train_timesteps": 1000},
    "steps": 4,
    "set_timesteps": {"sigmas": "linspace"},
}
ROLES = {"x": "state", "t": "timestep", "c": "condition"}
UNCONDITIONAL = 3


def loop_around(names: Sequence[str], latent: Sequence[int], guided: bool = True, **more: Any) -> LoopSpec:
    """A loop of four Euler calls: `x` is the latent, `t` the timestep, `c` a condition."""
    document: dict[str, Any] = {
        "inputs": {name: ROLES[name] for name in names},
        "sampler": FLOW,
        "latent": {"shape": list(latent)},
    }
    if guided and "c" in names:
        document["guidance"] = {"scale": 2.0, "unconditional": {"c": UNCONDITIONAL}}
    return LoopSpec.model_validate(document | more)


def denoiser(model: Callable[..., Any] | torch.nn.Module, *examples: torch.Tensor, **more: Any) -> Program:
    """The program of a denoiser whose arguments are named x, t and c, as `loop_around` has them."""
    before = traced(model, *examples)
    loop = loop_around(list(before.example), examples[0].shape[1:], **more)
    return _program(model, before, loop)


def component(model: Callable[..., Any] | torch.nn.Module, *examples: torch.Tensor) -> Program:
    """The program of a network without a loop."""
    return _program(model, traced(model, *examples), None)


def _program(model: Callable[..., Any] | torch.nn.Module, before: Traced, loop: LoopSpec | None) -> Program:
    """As `capture` makes it, without its report of frozen dimensions."""
    repair(before.graph, before.inputs)
    graph = fx.GraphModule(before.graph, before.graph.graph)
    nodes = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = tuple(port(node, f"y{i}" if i else "y") for i, node in enumerate(nodes))
    roles = {item.name: ROLES[item.name] if loop else "condition" for item in before.inputs}
    stage = Stage("step" if loop else "forward", Rate.of(roles.values()), graph, before.inputs, outputs)  # type: ignore[arg-type]
    weights = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    return Program(
        slots=slots_of(stage),
        inputs=tuple(InputPort(item, roles[item.name]) for item in before.inputs),  # type: ignore[arg-type]
        outputs=tuple(item.name for item in outputs),
        example=before.example,
        model=ModelIdentity(type(model).__name__, weights_hash(weights)),
        loop=loop,
        recurrence=probe(loop.sampler) if loop else None,
    )


class Modulated(torch.nn.Module):
    """y = gain(c, t) * linear(x) + shift(t): values of every rate, and a weight that only the timestep reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes = torch.nn.Embedding(4, 6)
        self.time = torch.nn.Linear(1, 6)
        self.gain = torch.nn.Linear(6, 5)
        self.shift = torch.nn.Linear(6, 5)
        self.body = torch.nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, T, 5], t [B], c [B] -> [B, T, 5]."""
        time = torch.sin(self.time(t[:, None] / 1000))
        gain = self.gain(self.classes(c) + time)
        return self.body(x) * gain[:, None] + self.shift(time)[:, None]


def modulated_example(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, 3, 5], t [B], c [B]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 5, generator=generator), torch.full((batch,), 500.0), torch.arange(batch) % 3


@cache
def modulated() -> Program:
    """The program of `Modulated`, captured once a process; passes leave it as it is."""
    return denoiser(Modulated(), *modulated_example())


def context_of(program: Program, cache: Path, **changes: Any) -> Context:
    """What passes run in, with the PyTorch reference in place of an engine, so that nothing is timed."""
    context = Context(program, Program.bind, program.bind, "reference", 0, cache, fitted_on="reference")
    return replace(context, **changes)


def operators(stage: Stage) -> list[str]:
    """The operators of a stage in order, without reads of the batch size."""
    found = [str(node.target).removeprefix("aten.") for node in calls(stage)]
    return [name for name in found if name != "sym_size.int"]


def calls(stage: Stage) -> list[fx.Node]:
    """The function calls of a stage."""
    return [node for node in stage.graph.graph.nodes if node.op == "call_function"]


def samples_of(program: Program, bound: BoundProgram | None = None, count: int = 5, seed: int = 3) -> np.ndarray:
    """What the whole loop makes of seeded noise, conditions in turn; where requests bring the other branch, it is zeros."""
    assert program.loop is not None and program.recurrence is not None
    guidance = program.loop.guidance
    conditions = {
        item.name: np.resize(program.example[item.name].numpy(), (count, *program.example[item.name].shape[1:]))
        for item in program.inputs
        if item.role == "condition"
    }
    unconditional = None
    if guidance is not None:
        values = guidance.unconditional if isinstance(guidance.unconditional, dict) else {}
        unconditional = {name: np.full_like(value, values.get(name, 0)) for name, value in conditions.items()}
    request = Request(noise(seed, (count, *program.loop.latent.shape)), conditions, unconditional)
    table = fold(program.recurrence, guidance.scales[0] if guidance else None)
    return run_loop(bound or program.bind(), program.loop, request, table)


class NoOptions(Options):
    """A pass without options."""


class FakePass(Pass[Any]):
    """A pass that does what a test gives it."""

    name = "fake"
    family = "test"
    source = "tests"
    options_type = NoOptions

    def __init__(self, rewrite: Callable[[Program, Context], PassResult], options: Options | None = None):
        super().__init__(options or NoOptions())
        self.rewrite = rewrite

    def run(self, program: Program, context: Context) -> PassResult:
        return self.rewrite(program, context)


def run(program: Program, *operations: Pass[Any] | Step, cache: Path = Path("unused")) -> Program:
    """Run passes one after the other, as the manager does."""
    steps = [item if isinstance(item, Step) else Step(item) for item in operations]
    return run_passes(program, steps, context_of(program, cache))
