"""Compile what surrounds the loop of a pipeline into bundles that lie within the denoiser's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.manifest import PipelineEntry, TokenizerEntry
from ..bundle.prompts import PromptReader
from .decoding import Decoding
from .packing import pack

if TYPE_CHECKING:
    from ..frontend.surroundings.ends import CapturedEnds
    from ..ir.program import Program
    from ..passes.base import Context
    from ..passes.manager import Step
    from ..passes.recipe import Recipe
    from .workshop import Workshop

Progress = Callable[[str, int, int], None]
TEXT, DECODER, TOKENIZERS = "text", "decoder", "tokenizers"


def optimize_ends(ends: CapturedEnds, steps: Sequence[Step], context: Callable[[Program], Context]) -> CapturedEnds:
    """Apply the exact passes of a recipe.

    Nothing that surrounds the loop is measured by the quality of its samples, so nothing there is made worse.

    Args:
        ends: text encoder and decoder as captured.
        steps: passes of the recipe.
        context: function that makes the context of a program.
    """
    from ..passes.manager import run_passes

    exact = [replace(step, optional=True) for step in steps if step.operation.exact]

    def optimized(program: Program | None) -> Program | None:
        return None if program is None else run_passes(program, exact, context(program))

    return replace(ends, text=optimized(ends.text), decoder=optimized(ends.decoder))


def decoding_of(captured: CapturedEnds, ends: CapturedEnds, shop: Workshop, progress: Progress) -> Decoding | None:
    """What makes images of latents; None where latents are images, or the bundle gets no decoder.

    Args:
        captured: text encoder and decoder as captured.
        ends: both after all passes.
        shop: where the stages of the bundle are compiled; sessions are let go with the next program that it opens.
        progress: called with (task, done, total).
    """
    original, compiled = captured.decoder, ends.decoder
    if original is None or compiled is None:
        return None
    return Decoding(original.bind, lambda: shop.open(compiled), lambda done, total: progress("decoding", done, total))


def pack_ends(folder: Path, ends: CapturedEnds, shop: Workshop, recipe: Recipe) -> PipelineEntry:
    """Write tokenizers and bundles into the folder of a bundle.

    Args:
        folder: folder of the bundle.
        ends: text encoder and decoder after all passes.
        shop: where its stages are compiled.
        recipe: recipe as it was run.
    """

    def packed(program: Program | None, name: str) -> str | None:
        if program is None:
            return None
        (folder / name).mkdir()
        pack(folder / name, program, shop.open(program), shop, recipe, None, None)
        return name

    return PipelineEntry(
        class_name=ends.pipeline,
        tokenizers=tuple(_write_tokenizer(folder, reader) for reader in ends.readers),
        text=packed(ends.text, TEXT),
        decoder=packed(ends.decoder, DECODER),
        given=dict(ends.given),
        unprompted=ends.unprompted,
    )


def _write_tokenizer(folder: Path, reader: PromptReader) -> TokenizerEntry:
    file = f"{TOKENIZERS}/{reader.input}.json"
    (folder / TOKENIZERS).mkdir(exist_ok=True)
    (folder / file).write_text(reader.content, encoding="utf-8")
    return TokenizerEntry(input=reader.input, file=file, mask=reader.mask, cleaning=reader.cleaning)
