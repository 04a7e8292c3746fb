"""Engine: a loaded bundle, ready to evaluate and to sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..backends.registry import get
from ..bundle.bind import bind
from ..bundle.files import AGAIN
from ..bundle.manifest import Manifest, StageEntry
from ..bundle.prompts import PromptReader
from ..bundle.reader import Bundle, read
from ..bundle.tables import Tables
from ..loop.calls import function, named, place, text, texts, whole, wholes
from ..loop.classes import class_conditions
from ..loop.driver import OnStep, run_loop
from ..loop.errors import BundleError, UsageError
from ..loop.noise import noise as seeded_noise
from ..loop.plan import Plan, fold
from ..loop.ports import BoundProgram, StageCallable
from ..loop.reading import Expected, read_text
from ..loop.recurrence import Recurrence
from ..loop.spec import LoopSpec
from ..loop.values import LARGEST_FACTOR
from .arguments import check_arguments
from .differences import other_products
from .ends import Ends
from .native import require_allowed
from .prompts import draw
from .request import build_request
from .samples import finite

logger = logging.getLogger(__name__)

Array = np.ndarray
TOKENIZER = Expected("the JSON of a tokenizer", BundleError, AGAIN)
UNGUIDED = 1.0  # the scale whose guided output is the conditional one


def load(
    path: Path | str, *, threads: int | None = None, device: str | None = None, allow_native: bool = False
) -> Engine:
    """Load a bundle after checking the hash of every file.

    Args:
        path: the folder.
        threads: number of threads of an operator; None leaves it to the engine.
        device: `cpu` or `cuda`; None is the one its engine is made for.
        allow_native: whether native code that was not built here by this user may be opened.

    Raises:
        UsageError: there is no such folder, its engine or the device is missing here, or it holds native code.
        BundleError: the bundle is damaged, newer than this stepfold, or has a path that leaves its folder.
    """
    threads = None if threads is None else whole("threads", threads, 1)
    device = None if device is None else text("device", device)
    bundle = read(place("path", path))
    tables = bundle.tables()
    for line in other_products(bundle.manifest):
        logger.warning("%s: %s", bundle.path, line)

    def load_session(bundle: Bundle, stage: StageEntry) -> StageCallable:
        return open_stage(bundle, stage, threads=threads, device=device, allow_native=allow_native)

    def open_within(folder: str) -> BoundProgram:
        inner = bundle.within(folder)
        return bind(inner, inner.tables(), load_session)

    return Engine(bundle, tables, bind(bundle, tables, load_session), open_within)


def open_stage(
    bundle: Bundle,
    stage: StageEntry,
    *,
    threads: int | None = None,
    device: str | None = None,
    allow_native: bool = False,
) -> StageCallable:
    """Open one stage of a bundle with the engine it was built for; raises as `load` does."""
    entry = bundle.manifest.backend
    try:
        backend = get(entry.name).with_options(entry.options)
    except UsageError as error:
        raise BundleError(f"{bundle.path}: {error} {AGAIN}") from error
    if entry.device != backend.default_device:
        raise BundleError(
            f"{bundle.path}: expected the device {backend.default_device!r} that the options of {entry.name} say; "
            f"received {entry.device!r}. {AGAIN}"
        )
    require_allowed(bundle, allow_native)
    ports = stage.input_ports(), stage.output_ports()
    files = bundle.stage_files(stage)
    return backend.open_session(bundle.file(stage.file), *ports, threads=threads, device=device, files=files)


class Engine:
    """A loaded bundle; in a `with` statement it is closed at the end of the block.

    Attributes:
        bundle: the checked folder.
        tables: recurrence, fitted tables, timestep values.
    """

    def __init__(
        self, bundle: Bundle, tables: Tables, program: BoundProgram, open_within: Callable[[str], BoundProgram]
    ):
        """See `load`."""
        self.bundle = bundle
        self.tables = tables
        self._program: BoundProgram | None = program
        self._open = open_within

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the sessions, with their memory, threads and files; a second call does nothing."""
        if self._program is None:
            return
        ends, decoder = (self.__dict__.pop(name, None) for name in ("ends", "decoder"))
        for program in (self._program, decoder, None if ends is None else ends.text):
            close(program)
        self._program, self._open = None, self._refuse
        self.bundle = replace(self.bundle, held={})

    def _refuse(self, folder: str = "") -> BoundProgram:
        raise UsageError(f"{self.bundle.path / folder}: expected an open engine; it was closed. Load the bundle again.")

    @property
    def program(self) -> BoundProgram:
        """The stages as callables.

        Raises:
            UsageError: the engine was closed.
        """
        return self._refuse() if self._program is None else self._program

    @cached_property
    def decoder(self) -> BoundProgram | None:
        """What makes images of latents, opened when it is first asked for; None where nothing does."""
        entry = self.manifest.pipeline
        return None if entry is None or entry.decoder is None else self._open(entry.decoder)

    @cached_property
    def ends(self) -> Ends:
        """What the pipeline does around the loop; its stages are opened when it is first asked for."""
        entry = self.manifest.pipeline
        if entry is None:
            return Ends()
        text = None if entry.text is None else self._open(entry.text)
        readers = tuple(
            PromptReader(item.input, read_text(self.bundle.opened(item.file), TOKENIZER), item.mask, item.cleaning)
            for item in entry.tokenizers
        )
        return Ends(readers, text, self.decoder, entry.given, entry.unprompted)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.bundle.manifest

    @property
    def loop(self) -> LoopSpec | None:
        """The loop, None for a component."""
        return self.manifest.loop

    def run(self, **kwargs: Any) -> list[Array]:
        """One evaluation of the model.

        Args:
            **kwargs: the model's own keyword arguments: arrays or torch tensors with a leading batch, nested lists
                and dictionaries of them; constants that were baked in at capture may be passed again.

        Returns:
            The outputs of the model as arrays.

        Raises:
            UsageError: an argument is missing, unknown or unfit, or the timestep is not on the grid of a program
                whose values or stages depend on the call of the loop.
        """
        constants = {**self.manifest.constants, **self.tables.constants}
        arrays = check_arguments(self.program.inputs, constants, kwargs)
        call = self._grid_call(arrays) if self.program.by_call else None
        return self.program.evaluate(arrays, call)

    def sample(
        self,
        noise: Any,
        guidance: float | None = None,
        on_step: OnStep | None = None,
        unconditional: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        **named_conditions: Any,
    ) -> Array:
        """Run the loop.

        Args:
            noise: float32 [B, *latent], standard normal.
            guidance: scale; None takes that of the loop. A scale without a fitted plan uses the unfitted fold.
            on_step: called with (evaluations done, evaluations in all).
            unconditional: name -> [B, ...] of the unconditional branch, where the loop takes it as an input.
            conditions: name -> [B, ...]; for names that this method uses itself, such as `guidance`.
            **named_conditions: the same by keyword: `class_labels=labels`.

        Returns:
            float32 [B, *latent].

        Raises:
            UsageError: the request does not fit the model; the message says what was expected.
            StepfoldError: a sample has numbers that are not finite.
        """
        loop, _ = self._looped()
        if on_step is not None:
            function("on_step", on_step)
        unconditional = None if unconditional is None else named("unconditional", unconditional)
        plan = self.plan(guidance)
        guided = bool(plan.guided.any())
        given = {**named("conditions", {} if conditions is None else conditions), **named_conditions}
        request = build_request(self.program.inputs, loop, noise, given, unconditional, guided)
        return finite(run_loop(self.program, loop, request, plan, on_step))

    def generate(
        self,
        count: int,
        seed: int = 0,
        classes: Sequence[int] | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> Array:
        """Samples of a seed: sample i has class i modulo the number of classes, or the i-th of `classes`, cycled.

        Args:
            count: number of samples.
            seed: seed of the noise, see `stepfold.loop.noise`.
            classes: class indices; the unconditional row is not one.
            guidance: see `sample`.
            on_step: see `sample`.

        Returns:
            float32 [count, *latent].

        Raises:
            UsageError: a class outside the range, or a model whose conditions are not a class index.
        """
        loop, _ = self._looped()
        count, seed = whole("count", count, 1), whole("seed", seed, 0)
        classes = None if classes is None else wholes("classes", classes)
        conditions = class_conditions(self.program.inputs, loop, count, classes)
        noise = seeded_noise(seed, (count, *loop.noise_shape))
        return self.sample(noise, guidance, on_step, conditions=conditions)

    def draw(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        count: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> Array:
        """Images of prompts, with the text encoders and the decoder of the pipeline.

        Args:
            prompt: one, or one for each image.
            negative_prompt: what to keep away from; None is what the pipeline takes for none: an empty prompt, or
                zeros in its place.
            count: number of images; None makes one for each prompt. Prompts are cycled.
            seed: seed of the noise, see `stepfold.loop.noise`.
            guidance: see `sample`.
            on_step: see `sample`.

        Returns:
            float32 [count, C, H, W], of a video [count, C, F, H, W], in [-1, 1].

        Raises:
            UsageError: the model takes no prompts, or the request does not fit it.
        """
        loop, _ = self._looped()
        prompts = texts("prompt", prompt)
        if not prompts:
            raise UsageError("prompt: expected at least one; received an empty list.")
        count = len(prompts) if count is None else whole("count", count, 1)
        seed = whole("seed", seed, 0)
        negative_prompt = None if negative_prompt is None else text("negative_prompt", negative_prompt)
        noise = seeded_noise(seed, (count, *loop.noise_shape))
        return draw(self, loop, self.ends, noise, prompts, negative_prompt, guidance, on_step)

    def plan(self, guidance: float | None = None) -> Plan:
        """The plan of a guidance scale: the fitted one, or the unfitted fold of every grid call.

        Args:
            guidance: scale; None takes that of the loop.

        Raises:
            UsageError: the bundle has no loop or no guidance, or is strict about its scales.
        """
        loop, recurrence = self._looped()
        scale = guidance_scale(loop, guidance)
        fitted = self.tables.fitted.get(scale)
        if fitted is not None:
            return fitted
        if loop.guidance is not None and loop.guidance.strict and scale not in loop.guidance.scales:
            scales = ", ".join(f"{value:g}" for value in loop.guidance.scales)
            raise UsageError(
                f"guidance: expected one of {scales}, because the bundle was built with `strict: true`; received "
                f"{scale:g}."
            )
        if self.tables.fitted:
            logger.info("guidance %g has no fitted plan: running all %d grid calls", scale, recurrence.calls)
        return fold(recurrence, scale)

    def _looped(self) -> tuple[LoopSpec, Recurrence]:
        if self.loop is None or self.tables.recurrence is None:
            raise UsageError(f"{self.bundle.path}: this bundle is a component without a loop. Call Engine.run.")
        return self.loop, self.tables.recurrence

    def _grid_call(self, arrays: Mapping[str, Array]) -> int:
        """The grid call whose timestep all rows have."""
        loop, recurrence = self._looped()
        received = arrays[loop.timestep]
        grid = recurrence.timesteps_as(received.dtype.name)
        calls = np.nonzero(grid == received.flat[0])[0]
        if len(calls) == 0 or (received != received.flat[0]).any():
            raise UsageError(
                f"{loop.timestep}: expected one of the {len(grid)} timesteps of the grid, the same for every row, "
                f"because {self._depends()}; received {received.flat[0]:g}"
                f"{' and others' if (received != received.flat[0]).any() else ''}. The nearest is "
                f"{grid[np.abs(grid - received.flat[0]).argmin()]:g}."
            )
        return int(calls[0])

    def _depends(self) -> str:
        """Why a timestep has to be one of the grid."""
        if self.program.tables:
            return "what depends on it was computed at compile time"
        return "it decides which variants compute the prediction"


def close(program: BoundProgram | None) -> None:
    """Close the sessions of a program that hold more than memory, such as threads."""
    for stage in () if program is None else program.stages:
        end = getattr(stage.call, "close", None)
        if end is not None:
            end()


def guidance_scale(loop: LoopSpec, guidance: float | None) -> float:
    """The scale of a request as a number; that of a loop without guidance is 1.

    Raises:
        UsageError: it is no finite number, or the loop has no guidance.
    """
    if loop.guidance is None:
        if guidance is not None:
            raise UsageError(
                f"guidance: expected none, because this loop has no guidance; received {guidance!r:.60}. "
                "An input of the model of that name goes into conditions={'guidance': array}."
            )
        return UNGUIDED
    if guidance is None:
        return float(loop.guidance.scales[0])
    number = isinstance(guidance, (int, float, np.number)) and not isinstance(guidance, bool)
    if not number or not abs(guidance) <= LARGEST_FACTOR:  # also NaN
        raise UsageError(f"guidance: expected a finite number, at most {LARGEST_FACTOR:g}; received {guidance!r:.60}.")
    return float(guidance)
