"""`stepfold generate`: samples of a bundle or of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..loop.array_files import read_arrays, read_npy
from ..loop.classes import class_conditions
from ..loop.errors import UsageError
from ..loop.noise import noise as seeded_noise
from ..loop.reading import Expected
from ..loop.spec import LoopSpec
from ..loop.writing import replacing, require_writable
from ..runtime.prompts import OTHER, draw, draw_given
from .console import console, working
from .options import BUNDLE_OR_CHECKPOINT, MOST_SAMPLES, AllowNative, Guidance, Seed, is_bundle

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.unoptimized import Unoptimized

Array = np.ndarray
CONDITIONS = "safetensors of arrays, for --conditions"


def generate(
    model: Annotated[
        Path,
        typer.Argument(metavar=BUNDLE_OR_CHECKPOINT, help="A bundle; or a checkpoint, which PyTorch runs as it is."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.png", help="Picture of the samples, one for each frame of videos; replaces files."
        ),
    ] = None,
    npy: Annotated[
        Path | None, typer.Option("--npy", metavar="FILE.npy", help="The samples, float32; replaces the file.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="0,1,2", help="Class of each sample, repeated as needed.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--count",
            min=1,
            max=MOST_SAMPLES,
            metavar="N",
            help="Number of samples; one, or as many as --classes names.",
        ),
    ] = None,
    seed: Seed = 0,
    noise: Annotated[
        Path | None, typer.Option("--noise", metavar="FILE.npy", help="Noise to start from: float32 [B, C, H, W].")
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            "--conditions", metavar="FILE.safetensors", help="Conditions by name, such as embeddings that were saved."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="What to draw; several are taken in turn."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What to keep away from.")
    ] = None,
    guidance: Guidance = None,
    allow_native: AllowNative = False,
) -> None:
    """Sample from a bundle with its engine, or from a checkpoint with PyTorch and every call of the loop.

    Without --classes, sample i has class i modulo the number of classes. The same seed gives both the same noise.
    A bundle of a text-to-image pipeline takes --prompt. One that was built from embeddings takes --conditions.

    $ stepfold generate out/mnist --out digits.png --count 20 --seed 7
    """
    _check_targets(out, npy)
    chosen = None if classes is None else parse_classes(classes)
    given = None if noise is None else read_noise(noise)
    _one_of({"--classes": chosen, "--prompt": prompt, "--conditions": conditions})
    if negative_prompt is not None and not prompt:
        raise UsageError("--negative-prompt: expected a --prompt beside it; received none.")
    embedded = None if conditions is None else read_conditions(conditions)
    wanted = _count(count, chosen or prompt or _rows(embedded), given)
    with working() as progress:
        progress("loading", 0, 1)
        sampler = _open(model, allow_native)
        loop = _looped(model, sampler, drawn=out is not None)
        start = seeded_noise(seed, (wanted, *loop.noise_shape)) if given is None else given
        told = progress.task("sampling")
        if prompt:
            samples = draw(sampler, loop, sampler.ends, start, prompt, negative_prompt, guidance, told)
        elif embedded is not None:
            samples = draw_given(sampler, sampler.ends, start, embedded, guidance, told)
        else:
            labels = class_conditions(sampler.program.inputs, loop, wanted, chosen)
            samples = sampler.ends.images(sampler.sample(start, guidance, told, conditions=labels))
    _write(samples, out, npy)


def parse_classes(text: str) -> list[int]:
    """`0,1,2` as numbers.

    Raises:
        UsageError: something between the commas is no whole number.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--classes: expected whole numbers with commas, as in 0,1,2; received {text!r}.") from None


def read_noise(file: Path) -> Array:
    """The array of a `.npy` file; nothing in it is unpickled.

    Raises:
        UsageError: there is no such file, or it holds no array of numbers.
    """
    return read_npy(file, Expected("an array saved with numpy.save, for --noise"))


def read_conditions(file: Path) -> dict[str, Array]:
    """The arrays of a safetensors file by name.

    Raises:
        UsageError: there is no such file, it holds no arrays, or one of a type that NumPy lacks.
    """
    expected = Expected(CONDITIONS, hint="Save the conditions as float32, by the names that `inspect` shows.")
    arrays = read_arrays(file, expected)
    if not arrays:
        raise UsageError(f"{file}: expected {CONDITIONS}; received a file without arrays.")
    return arrays


def _rows(arrays: Mapping[str, Array] | None) -> Sequence[object] | None:
    """The rows of the first conditions that have any, as many as there are samples."""
    told = [array for name, array in (arrays or {}).items() if not name.startswith(OTHER) and array.ndim]
    return range(len(told[0])) if told else None


def _one_of(given: Mapping[str, object]) -> None:
    """Raise UsageError where more than one of these options was given."""
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise UsageError(f"{names[0]}: expected {' or '.join(names)}; received both. Leave one of them out.")


def _check_targets(out: Path | None, npy: Path | None) -> None:
    if out is None and npy is None:
        raise UsageError("generate: expected --out FILE.png, --npy FILE.npy or both; received neither.")
    for option, path, suffix in (("--out", out, ".png"), ("--npy", npy, ".npy")):
        if path is not None and path.suffix.lower() != suffix:
            raise UsageError(f"{option}: expected a file that ends in {suffix}; received {path}.")
        if path is not None and os.path.isdir(path):
            raise UsageError(f"{option}: expected a file; received the folder {path}.")
        if path is not None:
            require_writable(option, path)


def _count(count: int | None, chosen: Sequence[object] | None, noise: Array | None) -> int:
    """How many samples to make."""
    rows = None if noise is None or noise.ndim == 0 else len(noise)
    if rows is not None and count not in (None, rows):
        raise UsageError(f"--count: expected {rows}, the samples of --noise; received {count}. Leave one of them out.")
    return count or rows or len(chosen or ()) or 1


def _open(model: Path, allow_native: bool) -> Engine | Unoptimized:
    if is_bundle(model):
        from ..runtime.engine import load

        return load(model, allow_native=allow_native)
    from ..runtime.unoptimized import load_unoptimized

    return load_unoptimized(model)


def _looped(model: Path, sampler: Engine | Unoptimized, drawn: bool) -> LoopSpec:
    """The loop; refuses, before anything is computed, what has none or cannot be drawn."""
    loop = sampler.loop
    if loop is None:
        raise UsageError(f"{model}: expected a model with a loop; received a component, which makes no samples.")
    shape = loop.latent.shape
    if drawn and sampler.ends.decoder is None and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise UsageError(
            f"--out: expected a model whose latents are images, [1 or 3, H, W]; its latents are {list(shape)}. Save "
            "the numbers instead: --npy FILE.npy"
        )
    return loop


def write_array(path: Path, samples: Array) -> None:
    """Write a `.npy` file in one step."""
    with replacing(path) as stream:
        np.save(stream, samples, allow_pickle=False)


def _write(samples: Array, out: Path | None, npy: Path | None) -> None:
    from ..report.images import write_pictures

    screen = console()
    if npy is not None:
        write_array(npy, samples)
        screen.print(f"{npy}: {len(samples)} samples", markup=False, soft_wrap=True)
    if out is not None:
        first, *others = write_pictures(out, samples)
        to = f" to {others[-1]}: {len(others) + 1} frames of" if others else ":"
        screen.print(f"{first}{to} {len(samples)} samples", markup=False, soft_wrap=True)
