"""The frozen-dimension report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from zoo import EACH, ZooModel

from stepfold.frontend.capture import capture
from stepfold.frontend.frozen import BY_CONSTANT, BY_EXAMPLE
from stepfold.ir.program import Program

Captured = Callable[[ZooModel], Program]


def sources(program: Program) -> dict[tuple[str, int], str]:
    return {(item.input, item.dimension): item.source for item in program.frozen}


@pytest.mark.slow
def test_pixart_bakes_the_latent_size(captured: Captured) -> None:
    """Its position embedding is made for one size; the text length is free."""
    found = sources(captured(zoo.PIXART))
    for dimension in (2, 3):
        assert found["hidden_states", dimension].startswith("pos_embed (PatchEmbed) at diffusers/models/embeddings.py:")
    assert found["hidden_states", 1] == "pos_embed.proj (Conv2d)"
    assert found["encoder_hidden_states", 1] == BY_EXAMPLE
    assert found["encoder_hidden_states", 2] == "caption_projection.linear_1 (Linear)"


@pytest.mark.slow
def test_qwenimage_bakes_the_image_shapes(captured: Captured) -> None:
    program = captured(zoo.QWENIMAGE)
    baked = [(i.input, i.dimension, i.value) for i in program.frozen if i.source == BY_CONSTANT]
    assert baked == [("img_shapes.0.0", 0, 1), ("img_shapes.0.0", 1, 4), ("img_shapes.0.0", 2, 4)]
    assert sources(program)["hidden_states", 1] != BY_EXAMPLE  # its tokens are counted by the image shapes


@pytest.mark.slow
def test_cogvideox_bakes_the_text_length(captured: Captured) -> None:
    found = sources(captured(zoo.COGVIDEOX))
    assert found["encoder_hidden_states", 1].startswith("patch_embed (CogVideoXPatchEmbed)")
    assert "diffusers/models/embeddings.py:" in found["hidden_states", 3]


@pytest.mark.slow
def test_flux_fixes_the_sum_of_image_and_text_tokens(captured: Captured) -> None:
    found = sources(captured(zoo.FLUX))
    assert found["hidden_states", 1] == found["encoder_hidden_states", 1] != BY_EXAMPLE


@pytest.mark.slow
def test_sana_takes_other_latent_sizes(captured: Captured) -> None:
    found = sources(captured(zoo.SANA))
    assert found["hidden_states", 2] == found["hidden_states", 3] == BY_EXAMPLE


@pytest.mark.parametrize("model", EACH)
def test_every_static_size_is_listed_once_and_no_batch(model: ZooModel, captured: Captured) -> None:
    program = captured(model)
    listed = [(i.input, i.dimension, i.value) for i in program.frozen if i.source != BY_CONSTANT]
    wanted = [
        (i.name, dimension, size)
        for i in program.inputs
        for dimension, size in enumerate(i.port.shape)
        if size is not None
    ]
    assert listed == wanted and all(dimension > 0 for _, dimension, _ in listed)
    assert not any("does not run on symbolic sizes" in item.source for item in program.frozen)


def test_the_analysis_leaves_the_model_alone(captured: Captured) -> None:
    """QwenImage caches its tables in the module; a fake tensor left there would break the next call."""
    model = zoo.QWENIMAGE.build()
    capture(model, zoo.QWENIMAGE.kwargs(2), zoo.QWENIMAGE.loop())
    output = zoo.QWENIMAGE.call(model, zoo.QWENIMAGE.kwargs(3))
    assert type(output) is torch.Tensor and not any(module._forward_hooks for module in model.modules())


class Reads(torch.nn.Module):
    """Python reads a value: nothing can be said about its sizes without running it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(self.sizes(x))

    def sizes(self, x: torch.Tensor) -> list[int]:
        if torch.compiler.is_exporting():
            return [1]
        raise RuntimeError("only when exporting")


def test_a_model_that_does_not_trace_is_reported_so() -> None:
    program = capture(Reads(), {"x": torch.randn(2, 5)})
    assert [(i.dimension, i.value) for i in program.frozen] == [(1, 5)]
    assert program.frozen[0].source == "the example (the model does not run on symbolic sizes: RuntimeError)"


def test_reference_checkpoint(reference_program: Program) -> None:
    assert {i.dimension for i in reference_program.frozen if i.input == "hidden_states"} == {1, 2, 3}
