"""Reference trajectories: the latents of the full loop of the unoptimized program, cached by what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ..bundle.cache import Cache, key_of
from ..ir.program import Program
from ..loop.driver import LoopRun, Request
from ..loop.noise import SampleSet
from ..loop.plan import Plan, fold
from ..loop.ports import BoundProgram
from ..loop.recurrence import Array
from .conditions import sample_request
from .origin import origin_of

FOLDER, FILE = "trajectories", "latents.safetensors"
LIMIT_BYTES = 8 << 30
"""Beyond it the trajectories that were not used for longest are removed."""

BATCH = 16
"""Samples evaluated at once: large enough to be efficient, small enough for the latents of big models."""


@dataclass(frozen=True)
class Trajectories:
    """The full loop of one sample set.

    Attributes:
        request: noise and conditions of the B samples.
        latents: [S+1, B, *latent] x[0] (scaled noise) to x[S] (the samples), float32; [1, B, *latent], the samples
            alone, when the whole path was not asked for.
    """

    request: Request
    latents: Array

    @cached_property
    def pieces(self) -> list[Request]:
        """The request in batches of at most `BATCH` samples, the same objects each time."""
        return slices(self.request, BATCH)


def trajectories(
    program: Program,
    bound: BoundProgram,
    samples: SampleSet,
    scale: float | None,
    cache: Path,
    progress: Callable[[int, int], None],
    *,
    whole: bool = True,
) -> Trajectories:
    """Run the full loop and keep its latents, or read them from the cache.

    Args:
        program: the unoptimized program.
        bound: its callables.
        samples: which samples.
        scale: guidance scale.
        cache: folder; what cannot be read or written there, or is damaged, is warned of and made again.
        progress: called with (evaluations done, evaluations in all).
        whole: keep every latent, not only the samples.
    """
    assert program.loop is not None and program.recurrence is not None
    request = sample_request(program, samples)
    origin = origin_of(program)
    if origin is None:  # a graph holds what has no stable text, so nothing can be told from anything else
        return Trajectories(request, _run(program, bound, request, fold(program.recurrence, scale), progress, whole))
    kept = Cache(cache / FOLDER, "reference trajectory", LIMIT_BYTES)
    parts = {**origin, "samples": [*samples.entropy, samples.count], "scale": scale, "whole": whole}
    key = key_of(parts)
    content = kept.read(key)
    if content is not None:
        return Trajectories(request, load(content)["latents"])
    latents = _run(program, bound, request, fold(program.recurrence, scale), progress, whole)
    kept.write(key, f"of {samples.count} {samples.name} samples", parts, FILE, save({"latents": latents}))
    return Trajectories(request, latents)


def first(data: Trajectories, count: int) -> Trajectories:
    """The first samples of a set."""
    return Trajectories(part(data.request, 0, count), data.latents[:, :count])


def slices(request: Request, size: int) -> list[Request]:
    """The request cut into requests of at most `size` samples."""
    return [part(request, start, start + size) for start in range(0, len(request.noise), size)]


def part(request: Request, start: int, stop: int) -> Request:
    """Samples start to stop of a request."""
    return Request(
        request.noise[start:stop],
        {name: value[start:stop] for name, value in request.conditions.items()},
        None
        if request.unconditional is None
        else {name: value[start:stop] for name, value in request.unconditional.items()},
    )


def _run(
    program: Program,
    bound: BoundProgram,
    request: Request,
    plan: Plan,
    progress: Callable[[int, int], None],
    whole: bool,
) -> Array:
    assert program.loop is not None
    parts = slices(request, BATCH)
    total, done, collected = plan.evaluations * len(parts), 0, []
    for piece in parts:
        run = LoopRun(bound, program.loop, piece, plan)
        latents = [run.latent]
        for k in range(plan.evaluations):
            run.evaluate(k)
            run.advance(k, plan)
            latents = [*latents, run.latent] if whole else [run.latent]
            done += 1
            progress(done, total)
        collected.append(np.stack(latents))
    return np.concatenate(collected, axis=1)
