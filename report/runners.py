"""One opened row: a bundle or a baseline as a function from a request to samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.tables import TABLES
from ..loop.driver import run_loop
from ..loop.plan import Plan
from ..loop.ports import BoundProgram, BoundStage, InputPort, Port, Rate, StageCallable, bound_slots
from ..loop.spec import LoopSpec
from ..runtime.engine import load
from ..runtime.request import build_request
from . import work

Array = np.ndarray
STAGES = "stages/"


@dataclass(frozen=True)
class Runner:
    """What a worker measures.

    Attributes:
        sample: named arrays of a request (see `work`) to samples [B, ...].
        evaluations: denoiser calls of one loop, None for a component.
        size_bytes: files the engine needs to run.
    """

    sample: Callable[[Mapping[str, Array]], Array]
    evaluations: int | None
    size_bytes: int


def open_bundle(path: Path, guidance: float | None, threads: int, allow_native: bool = False) -> Runner:
    """Open a bundle with the runtime its users have; raises as `stepfold.runtime.engine.load` does."""
    engine = load(path, threads=threads, allow_native=allow_native)
    needed = [entry.bytes for name, entry in engine.manifest.files.items() if name.startswith(STAGES) or name == TABLES]

    def sample(request: Mapping[str, Array]) -> Array:
        if engine.loop is None:
            return engine.run(**work.part(request, work.INPUT))[0]
        return engine.sample(
            request[work.NOISE],
            guidance,
            unconditional=work.part(request, work.UNCONDITIONAL) or None,
            conditions=work.part(request, work.CONDITION),
        )

    evaluations = None if engine.loop is None else engine.plan(guidance).evaluations
    return Runner(sample, evaluations, sum(needed))


def along_loop(
    denoiser: StageCallable, inputs: tuple[InputPort, ...], loop: LoopSpec, plan: Plan, size_bytes: int
) -> Runner:
    """Run a whole denoiser along a plan: a baseline has one stage, of rate step.

    Args:
        denoiser: name -> [B, ...] to its outputs, the prediction first.
        inputs: inputs of the denoiser.
        loop: roles, guidance and latent shape.
        plan: the sampler, folded with the guidance scale.
        size_bytes: size of the model, in bytes.
    """
    output = Port("sample", (None, *loop.latent.shape), "float32")
    stage = BoundStage("denoiser", Rate.STEP, tuple(i.port for i in inputs), (output,), lambda v: denoiser(v)[:1])
    program = BoundProgram(inputs, (output.name,), bound_slots(stage), {})
    guided = bool(plan.guided.any())

    def sample(request: Mapping[str, Array]) -> Array:
        conditions, other = work.part(request, work.CONDITION), work.part(request, work.UNCONDITIONAL)
        built = build_request(inputs, loop, request[work.NOISE], conditions, other or None, guided)
        return run_loop(program, loop, built, plan)

    return Runner(sample, plan.evaluations, size_bytes)


def once(model: StageCallable, size_bytes: int) -> Runner:
    """Run a component: one call."""
    return Runner(lambda request: model(work.part(request, work.INPUT))[0], None, size_bytes)
