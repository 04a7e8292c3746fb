"""Codes in bytes, and ONNX Runtime's own reading of them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from stepfold.ir.blocked import pack_bits, pack_blocks, unpack_bits, unpack_blocks
from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.errors import drift
from stepfold.passes.quantize.algebra.grids import INT8_CHANNEL, MXFP4, Grid, IntegerGrid, Quantized
from stepfold.passes.quantize.algebra.packing import BlockedWeight, to_matmul_nbits

TOLERANCE = 1e-5  # relative L2 of a float32 product of a few hundred terms


# -- bits


@given(st.data(), st.integers(1, 8))
def test_bits_come_back(data: st.DataObject, bits: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor([codes, codes], dtype=torch.uint8), bits)
    assert packed.shape == (2, -(-len(codes) * bits // 8)) and packed.dtype == torch.uint8
    assert unpack_bits(packed, bits, len(codes)).tolist() == [codes, codes]


@pytest.mark.parametrize(
    ("bits", "codes", "bytes_"),
    [
        (4, [1, 2, 15], [0x21, 0x0F]),  # the first code is the low nibble
        (2, [1, 2, 3, 0, 1], [0b00_11_10_01, 1]),
        (8, [7, 255], [7, 255]),
        (3, [1, 2, 3], [0b11_010_001, 0]),  # 011 lies over two bytes: its lower bits end the first
        (6, [63, 1], [0b01_111111, 0]),
    ],
)
def test_bits_by_hand(bits: int, codes: list[int], bytes_: list[int]) -> None:
    assert pack_bits(torch.tensor(codes), bits).tolist() == bytes_


def test_codes_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"codes: expected 0 to 15 for 4 bits; received -1 to 16"):
        pack_bits(torch.tensor([16, -1]), 4)
    for bits in (0, 9):
        with pytest.raises(UsageError, match=f"bits: expected 1 to 8; received {bits}"):
            pack_bits(torch.zeros(4), bits)
        with pytest.raises(UsageError, match=f"bits: expected 1 to 8; received {bits}"):
            unpack_bits(torch.zeros(4, dtype=torch.uint8), bits, 1)


@given(st.integers(1, 4), st.integers(1, 80), st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.integers(0, 99))
def test_blocks_come_back(rows: int, columns: int, bits: int, block: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    blocks = pack_blocks(codes, bits, block)
    assert blocks.shape == (rows, -(-columns // block), block * bits // 8)
    assert torch.equal(unpack_blocks(blocks, bits, block, columns).long(), codes)


# -- MatMulNBits


def matmul_nbits(packed: BlockedWeight, x: np.ndarray, accuracy_level: int = 0) -> np.ndarray:
    """y = x W^T by a model of this one operator."""
    arrays = {"B": packed.blocks, "scales": packed.scales}
    if packed.zero_points is not None:
        arrays["zero_points"] = packed.zero_points
    N, M = packed.blocks.shape[0], packed.in_features
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        K=M,
        N=N,
        bits=packed.bits,
        block_size=packed.block,
        accuracy_level=accuracy_level,
    )
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", size]) for n, size in (("x", M), ("y", N))]
    initializers = [numpy_helper.from_array(value.numpy(), name) for name, value in arrays.items()]
    graph = helper.make_graph([node], "one", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) + 0.3, torch.randn(7, columns, generator=generator)


CASES = [
    (bits, group, symmetric, rows, groups)
    for bits in (2, 4, 8)
    for group, groups in ((16, 3), (32, 5), (128, 1))
    for symmetric in (True, False)
    for rows in (24, 5)
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "rows", "groups"), CASES)
def test_onnxruntime_reads_the_layout(bits: int, group: int, symmetric: bool, rows: int, groups: int) -> None:
    weight, x = layer(rows, group * groups)
    quantized = Quantized.of(weight, IntegerGrid(bits, group, symmetric))
    received = torch.from_numpy(matmul_nbits(to_matmul_nbits(quantized), x.numpy()))
    assert drift(received, x @ quantized.weight.T) < TOLERANCE


def test_onnxruntime_ignores_the_rest_of_the_last_block() -> None:
    """40 input features in blocks of 32: the weight is padded for its grid, the operator reads what there is."""
    weight, x = layer(6, 40)
    padded = Quantized.of(torch.nn.functional.pad(weight, (0, 24)), IntegerGrid(4, 32))
    whole = to_matmul_nbits(padded)
    codes = unpack_blocks(whole.blocks, 4, 32, 40)
    packed = BlockedWeight(pack_blocks(codes, 4, 32), whole.scales, None, 4, 32, 40)
    assert packed.blocks.shape == (6, 2, 16)
    received = torch.from_numpy(matmul_nbits(packed, x.numpy()))
    assert drift(received, x @ padded.weight[:, :40].T) < TOLERANCE


def test_accuracy_level_4_rounds_activations_in_blocks_of_a_row() -> None:
    """A search that rounds activations by this grid sees the error that the engine will make."""
    weight, x = layer(24, 128)
    quantized = Quantized.of(weight, IntegerGrid(4, 32))
    rounded = IntegerGrid(8, 32).nearest(x)
    received = torch.from_numpy(matmul_nbits(to_matmul_nbits(quantized), x.numpy(), accuracy_level=4))
    assert drift(received, rounded @ quantized.weight.T) < TOLERANCE
    assert drift(received, x @ quantized.weight.T) > 100 * TOLERANCE


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layout_comes_back(bits: int, symmetric: bool) -> None:
    quantized = Quantized.of(layer(5, 96)[0], IntegerGrid(bits, 32, symmetric))
    packed = to_matmul_nbits(quantized)
    codes = unpack_blocks(packed.blocks, bits, 32, 96).to(torch.int16)
    assert (packed.zero_points is None) == symmetric
    if packed.zero_points is None:
        assert torch.equal(codes - 2 ** (bits - 1), quantized.codes.to(torch.int16))
    else:
        assert torch.equal(codes, quantized.codes.to(torch.int16))
        assert packed.zero_points.shape == (5, -(-3 * bits // 8))
        assert torch.equal(unpack_bits(packed.zero_points, bits, 3), quantized.scales.zero)
    assert torch.equal(packed.scales, quantized.scales.scale.to(torch.float32))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (MXFP4, r"MatMulNBits: expected integers of 2, 4 or 8 bits; received FloatGrid"),
        (IntegerGrid(3, 32), r"MatMulNBits: expected integers of 2, 4 or 8 bits; received IntegerGrid\(bits=3"),
        (IntegerGrid(4, 8), r"group: expected a power of two from 16; received 8\. Try 32, 64 or 128"),
        (IntegerGrid(4, 48), r"group: expected a power of two from 16; received 48"),
        (INT8_CHANNEL, r"group: expected a power of two from 16; received 'row'"),
    ],
)
def test_grids_without_a_layout(grid: Grid, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        to_matmul_nbits(Quantized.of(torch.ones(4, 96), grid))
