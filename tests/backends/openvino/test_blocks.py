"""Weights of few bits in blocks: what OpenVINO computes with them, and that they stay in their few bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import block, needs_vnni, tokens
from programs import context_of, denoiser, samples_of
from stages import floats, one_call

import stepfold
from stepfold.backends.onnx.blocks import BLOCKED_LINEAR, block_size, blocked_layers
from stepfold.backends.openvino.blocks import BlockedSite, blocked_sites, misfits, rounds_blocked_activations
from stepfold.backends.openvino.lower import GROUP_PROPERTY, lower, prepare
from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.backends.openvino.precision import integer_sites
from stepfold.bundle.verify import verify
from stepfold.ir.blocked import pack_bits
from stepfold.ir.program import Program, Stage, reference
from stepfold.loop.errors import StepfoldError
from stepfold.loop.metrics import drift
from stepfold.loop.noise import noise
from stepfold.loop.ports import StageCallable
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.runtime.engine import open_stage

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

FLOAT, LEVEL = 1e-5, 1e-3
OPTIONS = OpenvinoOptions()
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4"},
    "int8-weights": {"scheme": "int8-weights"},
    "svdquant": {"scheme": "svdquant", "rank": 4},
}
Session = Callable[..., StageCallable]


def quantized(program: Program, cache: Path, **options: Any) -> Stage:
    operation = Quantize(QuantizeOptions.model_validate(options))
    return operation.run(program, context_of(program, cache)).program.step


def layer(bits: int, size: int, zeros: bool, rounds: bool, rows: bool = False) -> Stage:
    """One product of three blocks, whose zero points do not fill their bytes in 4 bits."""
    M, N = 3 * size, 24
    generator = torch.Generator().manual_seed(bits)
    blocks = torch.randint(0, 256, (N, 3, size * bits // 8), dtype=torch.uint8, generator=generator)
    zero_points = pack_bits(torch.randint(0, 2**bits, (N, 3), generator=generator), bits) if zeros else None
    weights = [blocks, torch.rand(N, 3, generator=generator), zero_points, torch.linspace(-1, 1, N)]
    port = floats(None, M) if rows else floats(None, 4, M)
    return one_call(BLOCKED_LINEAR, [port], weights, (bits, size, rounds))


def received(opened: Session, stage: Stage, batch: int) -> tuple[np.ndarray, np.ndarray]:
    shape = [batch if size is None else size for size in stage.inputs[0].shape]
    values = {"x": np.random.default_rng(batch).standard_normal(shape).astype(np.float32)}
    return opened(stage)(values)[0], reference(prepare(stage, OPTIONS))(values)[0]


@pytest.mark.parametrize(
    ("bits", "size", "zeros", "rows"),
    [(2, 32, False, False), (4, 16, True, False), (4, 64, False, True), (4, 64, True, False), (8, 64, True, True)],
)
def test_float_activations(opened: Session, bits: int, size: int, zeros: bool, rows: bool) -> None:
    stage = layer(bits, size, zeros, rounds=False, rows=rows)
    assert drift(*received(opened, stage, 1)) < FLOAT


@needs_vnni
@pytest.mark.parametrize(("bits", "size", "rows"), [(4, 16, False), (4, 64, True), (8, 64, False)])
def test_rounded_activations(opened: Session, bits: int, size: int, rows: bool) -> None:
    stage = layer(bits, size, False, rounds=True, rows=rows)
    got, wanted = received(opened, stage, 5)
    assert (
        drift(got, wanted) < FLOAT < LEVEL < drift(got, received(opened, layer(bits, size, False, False, rows), 5)[0])
    )


@needs_vnni
@pytest.mark.parametrize("name", SCHEMES)
def test_what_the_pass_makes(opened: Session, tmp_path: Path, name: str) -> None:
    """Layers of 32 and 128 features: blocks of 32 and 64, so activations are rounded in groups of 32."""
    program = block()
    stage = quantized(program, tmp_path, **SCHEMES[name])
    call, prepared = opened(stage), reference(prepare(stage, OPTIONS))
    assert {block_size(node) for node in blocked_layers(stage)} == {32, 64}
    assert {block_size(node) for node in blocked_layers(prepare(stage, OPTIONS))} == {32}
    for batch in (1, 5):
        values = {stage.inputs[0].name: tokens(batch)}
        (got,), (exact,) = call(values), program.bind().evaluate(values)
        assert drift(got, prepared(values)[0]) < LEVEL < drift(got, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_float_activations_stay_float_and_weights_stay_small(tmp_path: Path, opened: Session, name: str) -> None:
    stage = quantized(block(), tmp_path, **SCHEMES[name], activations="float")
    values = {stage.inputs[0].name: tokens(2)}
    assert drift(opened(stage)(values)[0], reference(stage)(values)[0]) < FLOAT
    core = openvino.Core()
    (tmp_path / "stage").mkdir()
    file = lower(stage, tmp_path / "stage", options=OPTIONS)
    model = core.compile_model(core.read_model(file), "CPU", SETTINGS)
    assert model.get_property(GROUP_PROPERTY) == 0, "its default would round activations"
    element = "u8" if name == "int8-weights" else "u4"
    found = [node for node in model.get_runtime_model().get_ops() if node.get_input_size() > 1]
    assert [node.get_input_element_type(1).get_type_name() for node in found].count(element) == 6
    assert file.with_suffix(".bin").stat().st_size < (1.2 if element == "u8" else 0.9) * 12288 + 4 * 32 * 12 * 12


def test_bfloat16(opened: Session, tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    options = OpenvinoOptions(precision="bf16")
    stage = quantized(block(), tmp_path, scheme="int4", activations="float")
    values = {stage.inputs[0].name: tokens(2)}
    got, prepared = opened(stage, options)(values)[0], reference(prepare(stage, options))(values)[0]
    assert drift(got, reference(stage)(values)[0]) < 2e-2 and drift(got, prepared) < 2e-2


@needs_vnni
def test_a_sample_does_not_depend_on_its_batch_mates(opened: Session, tmp_path: Path) -> None:
    stage = quantized(block(), tmp_path, scheme="int4")
    name, call, mates = stage.inputs[0].name, opened(stage), tokens(3)
    louder = np.concatenate([mates[:1], 50 * mates[1:]])
    np.testing.assert_array_equal(call({name: mates})[0][:1], call({name: louder})[0][:1])


# -- what is refused


def two(first: bool, second: bool) -> Stage:
    """Two layers of a block, of which one rounds its activations, and four that do not."""
    stage = quantized(block(), Path("/nonexistent"), scheme="int4", activations="float")
    for node, rounds in zip(blocked_layers(stage)[:2], (first, second), strict=True):
        node.update_arg(7, rounds)
    return stage


def test_float_and_rounded_activations_in_one_stage(tmp_path: Path) -> None:
    with pytest.raises(
        StepfoldError, match=r"float ones here and in 4 more, and 8-bit ones in 1\. Choose --set"
    ) as caught:
        lower(two(True, False), tmp_path, options=OPTIONS)
    assert "node blocked_linear_default_1 (key; " in str(caught.value)


@needs_vnni
def test_zero_points_that_do_not_fill_their_bytes_keep_activations_in_float(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match="keep activations in float"):
        lower(layer(4, 64, zeros=True, rounds=True), tmp_path, options=OPTIONS)


def test_weights_that_are_unpacked(tmp_path: Path) -> None:
    """The last block is cut off, and the engine keeps the weight in float."""
    blocks = torch.randint(0, 256, (5, 2, 8), dtype=torch.uint8)
    stage = one_call(BLOCKED_LINEAR, [floats(None, 3, 20)], [blocks, torch.rand(5, 2), None, None], (4, 16, False))
    with pytest.raises(StepfoldError) as caught:
        lower(stage, tmp_path, options=OPTIONS)
    text = str(caught.value)
    assert "expected weights in blocks and activations in float; OpenVINO would compute it otherwise" in text
    assert "it is a FullyConnected of f32 and f32, with unpacked weights (1 of 1 layers)" in text


@needs_vnni
def test_what_a_compiled_model_computes_otherwise(tmp_path: Path) -> None:
    core = openvino.Core()
    model = core.read_model(lower(quantized(block(), tmp_path, scheme="int4"), tmp_path, options=OPTIONS))
    sites = blocked_sites(model)
    assert [(site.element, site.width, site.block) for site in sites] == [("u4", 32, 32)] * 5 + [("u4", 128, 32)]
    assert integer_sites(model) == []
    everything = frozenset(site.weight for site in sites)
    grouped = core.compile_model(model, "CPU", SETTINGS)
    assert misfits(grouped, sites, everything, SETTINGS, 32) == {}
    assert set(misfits(grouped, sites, frozenset(), SETTINGS, 32).values()) == {
        "its activations are rounded to 8 bits in groups of 32"
    }
    plain = core.compile_model(model, "CPU", {**SETTINGS, GROUP_PROPERTY: 0})
    assert misfits(plain, sites, frozenset(), SETTINGS, 0) == {}
    assert len(misfits(plain, sites, everything, SETTINGS, 0)) == 6
    lost = BlockedSite("codes", ("no_such_product",), "u4", 32, 32)
    assert misfits(plain, [lost], frozenset(), SETTINGS, 0) == {"codes": "no layer of the compiled model has its name"}


@needs_vnni
@pytest.mark.parametrize(
    ("element", "block", "group", "integers"),
    [("u4", 16, 16, True), ("u4", 64, 64, True), ("u8", 64, 64, True), ("u4", 64, 32, True), ("u4", 64, 0, False)],
)
def test_activations_are_rounded_where_the_group_fits(element: str, block: int, group: int, integers: bool) -> None:
    assert rounds_blocked_activations(element, 2 * block, block, group, SETTINGS) is integers


# -- bundles


class Tokens(torch.nn.Module):
    """x [B, 4, 32], t [B], c [B] -> [B, 4, 32]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.labels = torch.nn.Embedding(4, 32)
        self.modulation = torch.nn.Linear(32, 32)
        self.up, self.down, self.out = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift = self.modulation(torch.sin(t[:, None] / 1000 + self.labels(c)))
        return self.out(torch.tanh(x + self.down(torch.relu(self.up(x + shift[:, None])))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "svdquant"])
def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the recipes w4-gptq and w4-svdquant build it, with float activations."""
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    program = denoiser(Tokens(), torch.randn(2, 4, 32), torch.tensor([500.0, 2.0]), torch.tensor([0, 1]))
    recipe = {
        "passes": [
            "hoist",
            {"quantize": {**SCHEMES[name], "rounding": "gptq", "activations": "float", "hoisted": "int8"}},
        ]
    }
    small, _ = stepfold.apply(program, recipe, backend="openvino")
    folder = stepfold.lower(small, "openvino", out=tmp_path / "bundle")
    engine = stepfold.load(folder, threads=1)
    latents, labels = noise(3, (5, 4, 32)), np.resize(program.example["c"].numpy(), 5)
    assert engine.manifest.batch_invariant
    got = engine.sample(latents, c=labels)
    assert drift(got, samples_of(small)) < FLOAT < drift(got, samples_of(program))
    np.testing.assert_array_equal(got[:1], engine.sample(latents[:1], c=labels[:1]))
    assert verify(folder, open_stage) == ([], [])
