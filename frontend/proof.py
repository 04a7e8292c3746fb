"""The proof: samples of the pipeline's own code against those of the program that was captured from it.

The pipeline runs once more, its denoiser as it is and every step its own. Beside it, in step, runs the loop of the
captured program from the same noise. So nothing of a trajectory is kept, and where the two part the branches of that
very step can be compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..ir.program import Program
from ..loop.driver import LoopRun, Request
from ..loop.errors import StepfoldError
from ..loop.metrics import drift
from ..loop.plan import fold
from .arrangement import arranged
from .branches import guided, of_samples, one_of_two
from .images import LEAST_DB, pipeline_images, unit_images, worst
from .recorder import OnStep as OnRecordedStep
from .recorder import Recording, Step, recording
from .sampler import probed

Array = np.ndarray
LONGEST_PROMPT = "max_sequence_length"  # argument of pipelines: how many tokens of a prompt are read
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class PipelineRun:
    """A pipeline and the call that its loop was recorded from.

    Attributes:
        pipeline: pipeline as diffusers loads it.
        denoiser: its network.
        arguments: arguments of the call.
        batch: how many samples they ask for.
        experts: other networks of the denoiser's class by name, which may take its place at some steps.
    """

    pipeline: Any
    denoiser: torch.nn.Module
    arguments: Mapping[str, Any]
    batch: int
    experts: Mapping[str, torch.nn.Module] = field(default_factory=dict)

    def watched(self, on_step: OnRecordedStep, *, answer: bool, images: bool) -> Any:
        """Call the pipeline as it was recorded, from the same noise.

        Args:
            on_step: called when the scheduler has made a step.
            answer: whether noise is answered in the denoiser's place.
            images: whether latents become images; they may stay what they are elsewhere.

        Returns:
            What the pipeline returns.
        """
        given = self.given()
        if "output_type" in given and images:
            given["output_type"] = "np"
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(0)
        with torch.no_grad(), self.recorded(on_step, answer=answer):
            return self.pipeline(**given)

    def given(self) -> dict[str, Any]:
        """The arguments for one call, of which some pipelines rewrite the list of prompts (Z-Image)."""
        return {name: list(value) if isinstance(value, list) else value for name, value in self.arguments.items()}

    def recorded(self, on_step: OnRecordedStep, *, answer: bool = True) -> AbstractContextManager[Recording]:
        """A recorder on the pipeline, see `recording`."""
        parameter = inspect.signature(self.pipeline.__call__).parameters.get(LONGEST_PROMPT)
        tokens = self.arguments.get(LONGEST_PROMPT, parameter.default if parameter is not None else 0)
        return recording(
            (self.denoiser, *self.experts.values()),
            self.pipeline.scheduler,
            dict(self.pipeline.components),
            on_step,
            answer=answer,
            tokens=tokens if isinstance(tokens, int) else 0,
        )

    def drawn(self) -> tuple[Array, Array]:
        """Latents [B, *latent] at the end of the loop, its denoiser answered for with noise, and their images."""
        last = np.zeros(0)

        def on_step(_: Recording, step: Step) -> None:
            nonlocal last
            last = _array(of_samples(arranged(step, self.batch).result, self.batch))

        answer = self.watched(on_step, answer=True, images=True)
        return last, pipeline_images(answer)


@dataclass(frozen=True)
class Proof:
    """How close the samples of a program are to those of its pipeline.

    Attributes:
        latent_db: PSNR of the worst sample, its peak the range of the pipeline's.
        image_db: agreement of the images; None where stepfold compiles no decoder.
        samples: number of samples that were compared.
    """

    latent_db: float
    image_db: float | None
    samples: int


def prove(run: PipelineRun, program: Program, decoder: Program | None, on_step: OnStep) -> Proof:
    """Compare a captured program with the pipeline it was captured from.

    Args:
        run: the pipeline's call.
        program: the denoiser and its loop, before any pass.
        decoder: decoder from latents to images, before any pass; None where none is compiled.
        on_step: called with (steps done, steps in all).

    Raises:
        StepfoldError: they are less than `LEAST_DB` equal; the message says where they part.
    """
    beside = _Beside(run, program, on_step)
    answer = run.watched(beside, answer=False, images=decoder is not None)
    latents, wanted = beside.latents()
    latent_db = worst(latents, wanted)
    if latent_db < LEAST_DB:
        raise StepfoldError(f"{beside.parted()} The bundle would draw other samples than the pipeline.")
    if decoder is None:
        return Proof(latent_db, None, len(latents))
    images = pipeline_images(answer)
    image_db = worst(unit_images(decoder, latents), images)
    if image_db < LEAST_DB:
        alone = worst(unit_images(decoder, wanted), images)
        raise StepfoldError(
            f"proof: expected images within {LEAST_DB:g} dB of those of {type(run.pipeline).__name__}; received "
            f"{image_db:.1f} dB. They part at the decoder: it is {alone:.1f} dB from the pipeline's own latents, and the "
            f"latents are equal ({latent_db:.1f} dB). This is a defect of stepfold on this pipeline; --no-proof builds it "
            "nevertheless."
        )
    return Proof(latent_db, image_db, len(latents))


class _Beside:
    """The loop of a program, one step at a time beside that of its pipeline."""

    def __init__(self, run: PipelineRun, program: Program, on_step: OnStep):
        assert program.loop is not None and program.recurrence is not None
        self._name, self._batch, self._on_step = type(run.pipeline).__name__, run.batch, on_step
        self._program, self._loop, self._bound = program, program.loop, program.bind()
        scale = program.loop.guidance.scales[0] if program.loop.guidance else None
        self._plan = fold(program.recurrence, scale)
        self._kept = list(probed(self._loop.sampler).kept)
        self._drawn = 0
        self._run: LoopRun | None = None
        self._wanted = np.zeros(0)
        self._parted: str | None = None

    def __call__(self, recorded: Recording, step: Step) -> None:
        """Make the same step."""
        k, plan, step = recorded.taken, self._plan, arranged(step, self._batch)
        latent = _array(one_of_two(step.sample, self._batch))
        if self._run is None:
            self._noise = np.zeros((self._batch, *self._loop.noise_shape), np.float32)
            start = self._noise[:, 0] if self._loop.draws else self._noise
            start[:] = latent / plan.initial_scale
            self._run = LoopRun(self._bound, self._loop, self._request(self._noise), plan)
        self._take(step.draws)
        if k < plan.evaluations:
            self._run.evaluate(k)
            self._run.advance(k, plan)
        self._wanted = _array(of_samples(step.result, self._batch))
        if self._parted is None and worst(self._run.latent, self._wanted) < LEAST_DB:
            self._parted = self._where(k, step, latent)
        self._on_step(k + 1, plan.evaluations)

    def _take(self, draws: Sequence[torch.Tensor]) -> None:
        """Give the loop what the pipeline's scheduler drew in this step."""
        for value in draws:
            if self._drawn in self._kept:
                self._noise[:, 1 + self._kept.index(self._drawn)] = _array(of_samples(value, self._batch))
            self._drawn += 1

    def latents(self) -> tuple[Array, Array]:
        """Those of the program and of the pipeline after the last step."""
        if self._run is None:
            raise StepfoldError(
                f"proof: expected {self._name} to make the steps that it was recorded with; it makes none."
            )
        return self._run.latent, self._wanted

    def parted(self) -> str:
        """Where the two part, as a sentence."""
        return self._parted or "proof: the last latents differ."

    def _request(self, noise: Array) -> Request:
        """The conditions that the pipeline was recorded with; draws are written into the noise as they are made."""
        program, guidance = self._program, self._loop.guidance
        names = [port.name for port in program.inputs if port.role == "condition"]
        conditions = {name: program.example[name].numpy()[: self._batch] for name in names}
        if guidance is None:
            return Request(noise, conditions, None)
        fixed = guidance.unconditional if isinstance(guidance.unconditional, dict) else {}
        given = {name: value.numpy()[: self._batch] for name, value in program.unconditional.items()}
        other = {
            name: np.full_like(value, fixed[name]) if name in fixed else given.get(name, value)
            for name, value in conditions.items()
        }
        return Request(noise, conditions, other)

    def _where(self, k: int, step: Step, latent: Array) -> str:
        """Which branch differs at the pipeline's own latent; the update, where none does."""
        assert self._run is not None
        where = f"step {k + 1} of {self._plan.evaluations}"
        text = (
            f"proof: expected latents within {LEAST_DB:g} dB of those of {self._name}; they part at {where} "
            f"({worst(self._run.latent, self._wanted):.1f} dB): "
        )
        if k >= self._plan.evaluations:
            return f"{text}the pipeline makes a step that the folded loop does not have."
        theirs = guided(step, self._batch, where)
        here = self._run.fork()
        here.latent = latent
        conditional, unconditional = here.evaluate(k)
        pairs = [("conditional", conditional, theirs.conditional)]
        if unconditional is not None and theirs.unconditional is not None:
            pairs.append(("unconditional", unconditional, theirs.unconditional))
        errors = {name: drift(ours, _array(branch.output)) for name, ours, branch in pairs}
        name = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        if errors[name] <= 10 ** (-LEAST_DB / 20):
            return f"{text}the branches agree, and the update of the latent does not."
        return f"{text}the {name} branch of the denoiser differs by {errors[name]:.2g} of its size."


def _array(value: torch.Tensor) -> Array:
    return value.detach().float().numpy()
