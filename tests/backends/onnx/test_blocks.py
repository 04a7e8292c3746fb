"""Blocks as small as one group of activations: the weights stay, the rounding of activations gets finer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stages import floats, one_call

from stepfold.backends.onnx.blocks import BLOCKED_LINEAR, blocked_layers, in_blocks_of
from stepfold.ir.blocked import decoded, pack_bits
from stepfold.ir.program import Stage, attribute, reference

N, M, T = 5, 64, 3


def layer(bits: int, block: int, zeros: bool, rounds: bool) -> Stage:
    """A stage of one `blocked_linear` of random weights."""
    generator = torch.Generator().manual_seed(bits)
    count = M // block
    blocks = torch.randint(0, 256, (N, count, block * bits // 8), dtype=torch.uint8, generator=generator)
    zero_points = pack_bits(torch.randint(0, 2**bits, (N, count), generator=generator), bits) if zeros else None
    weights = [blocks, torch.rand(N, count, generator=generator), zero_points, torch.linspace(-1, 1, N)]
    return one_call(BLOCKED_LINEAR, [floats(None, T, M)], weights, (bits, block, rounds))


def weight(stage: Stage) -> torch.Tensor:
    (node,) = blocked_layers(stage)
    held = [None if item is None else attribute(stage.graph, str(item.target)) for item in node.args[1:4]]  # type: ignore[union-attr]
    bits, block = node.args[5:7]
    return decoded(held[0], held[1], held[2], bits, block, M)  # type: ignore[arg-type]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_stay_and_activations_are_rounded_in_the_smaller_blocks(bits: int, zeros: bool) -> None:
    stage = layer(bits, 32, zeros, rounds=True)
    finer = in_blocks_of(stage, 16)
    assert torch.equal(weight(finer), weight(stage)) and blocked_layers(finer)[0].args[6] == 16
    assert blocked_layers(stage)[0].args[6] == 32, "the stage is as it was"
    x = np.random.default_rng(0).standard_normal((2, T, M)).astype(np.float32)
    groups = x.reshape(2, T, -1, 16)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    rounded = (np.round(groups / scale) * scale).reshape(x.shape)
    expected = rounded @ weight(stage).numpy().T + np.linspace(-1, 1, N, dtype=np.float32)
    np.testing.assert_allclose(reference(finer)({"x": x})[0], expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(reference(stage)({"x": x})[0], expected, rtol=1e-4, atol=1e-3)


def test_layers_with_float_activations_stay() -> None:
    stage = layer(4, 32, False, rounds=False)
    assert blocked_layers(in_blocks_of(stage, 16))[0].args[6] == 32
