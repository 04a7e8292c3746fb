"""What every row of a bench computes: the inputs of its samples, the same for bundles, baselines and the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..bundle.bind import other_branch
from ..bundle.reader import Bundle
from ..loop.classes import class_conditions, class_input
from ..loop.errors import StepfoldError, UsageError
from ..loop.noise import noise as seeded_noise
from ..loop.pipeline_call import PipelineCall
from ..loop.ports import InputPort
from ..loop.spec import LoopSpec, Values

Array = np.ndarray
NOISE = "noise"
CONDITION, UNCONDITIONAL, INPUT = "condition/", "unconditional/", "input/"


@dataclass(frozen=True)
class Work:
    """The model as a caller sees it.

    Attributes:
        loop: the loop, None for a component.
        inputs: what the model is called with.
        example: name -> [B, ...] recorded values, for inputs that are neither noise nor a class.
        unconditional: name -> [B, ...] recorded conditions of the other guidance branch.
        call: what the pipeline was called with, where that is not its own defaults.
    """

    loop: LoopSpec | None
    inputs: tuple[InputPort, ...]
    example: Mapping[str, Array]
    unconditional: Mapping[str, Array] = field(default_factory=dict)
    call: PipelineCall | None = None

    @property
    def compared(self) -> Values | None:
        """What samples are; None for the outputs of a component."""
        return None if self.loop is None else self.loop.latent.kind

    @property
    def guidance(self) -> float | None:
        """The guidance scale of every row; None for a loop without guidance."""
        return None if self.loop is None or self.loop.guidance is None else float(self.loop.guidance.scales[0])

    def arrays(self, count: int, seed: int) -> dict[str, Array]:
        """Everything `count` samples need, by name, for `write`.

        Noise as `generate` draws it; sample i has class i modulo the number of classes; any other condition cycles
        through the recorded rows, and so does that of the other branch where the caller gives it and a pipeline was
        recorded; else it is zero, as it was for `optimize`. A component takes its recorded inputs in turn.
        """
        if self.loop is None:
            return {INPUT + port.name: self._cycled(port, self.example, count) for port in self.inputs}
        found = {NOISE: seeded_noise(seed, (count, *self.loop.noise_shape))}
        conditions = [port for port in self.inputs if port.role == "condition"]
        if class_input(self.inputs, self.loop) is not None:
            values = class_conditions(self.inputs, self.loop, count)
        else:
            values = {port.name: self._cycled(port, self.example, count) for port in conditions}
        found |= {CONDITION + name: value for name, value in values.items()}
        if self.loop.guidance is not None and self.loop.guidance.unconditional == "input":
            zeros = {name: np.zeros_like(value) for name, value in values.items()}
            recorded = [port for port in conditions if port.name in self.unconditional]
            other = zeros | {port.name: self._cycled(port, self.unconditional, count) for port in recorded}
            found |= {UNCONDITIONAL + name: value for name, value in other.items()}
        return found

    def _cycled(self, port: InputPort, rows_by_name: Mapping[str, Array], count: int) -> Array:
        if port.name not in rows_by_name:
            raise StepfoldError(
                f"{port.name}: expected recorded values to run the model with; the bundle has none. Build it again "
                "with `stepfold optimize --inputs FILE.safetensors`."
            )
        rows = rows_by_name[port.name]
        if port.port.shape[:1] != (None,):
            return rows
        return np.ascontiguousarray(rows[np.arange(count) % len(rows)])


def of_bundles(bundles: Sequence[Bundle]) -> Work:
    """The work of a bench, from the first bundle; the others must be called in the same way.

    Their loops may differ in sampler and guidance, see `shared_loop`.

    Raises:
        UsageError: they are called in another way.
    """
    works = [_of_bundle(bundle) for bundle in bundles]
    first = works[0]
    for bundle, work in zip(bundles, works, strict=True):
        if _signature(work) != _signature(first):
            raise UsageError(
                f"{bundle.path}: expected the inputs of {bundles[0].path}, {_signature(first)}; received "
                f"{_signature(work)}. Bundles of different models are measured one after the other."
            )
    return first


def shared_loop(bundles: Sequence[Bundle]) -> LoopSpec | None:
    """The loop all bundles were made for; None when they differ, or are components."""
    loops = [bundle.manifest.loop for bundle in bundles]
    return loops[0] if all(loop == loops[0] for loop in loops) else None


def shared_call(bundles: Sequence[Bundle]) -> PipelineCall | None:
    """What the pipeline of all bundles was called with; None where they differ, or it was left its defaults."""
    calls = [bundle.manifest.call for bundle in bundles]
    return calls[0] if all(call == calls[0] for call in calls) else None


def _of_bundle(bundle: Bundle) -> Work:
    probe = bundle.probe()
    constants = bundle.tables().constants
    inputs = tuple(port for port in bundle.manifest.input_ports() if port.name not in constants)
    manifest, example = bundle.manifest, probe.inputs if probe is not None else {}
    return Work(manifest.loop, inputs, example, other_branch(bundle), manifest.call)


def _signature(work: Work) -> str:
    inputs = ", ".join(f"{port.name} {list(port.port.shape)} {port.port.dtype}" for port in work.inputs)
    return inputs if work.loop is None else f"{inputs}, latent {list(work.loop.latent.shape)}"


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the arrays of a request for the workers."""
    from safetensors.numpy import save_file

    save_file(dict(arrays), path)


def read(path: Path, start: int, stop: int) -> dict[str, Array]:
    """Samples `start` to `stop` of what `write` wrote; an array without a sample dimension is kept whole."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    rows = max(len(value) for value in arrays.values() if value.ndim)
    return {
        name: np.ascontiguousarray(value[start:stop]) if value.ndim and len(value) == rows else value
        for name, value in arrays.items()
    }


def read_all(path: Path) -> dict[str, Array]:
    """All arrays of a file that `write` wrote."""
    from safetensors.numpy import load_file

    return load_file(path)


def part(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The arrays under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
