"""Every scheme of `quantize` on a small transformer with a loop: what it changes, keeps, refuses, and what runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated import drawn_without_vnni, needs_emulator
from programs import context_of, denoiser, operators, samples_of
from quantizing import quantize
from torch import nn

import stepfold
from stepfold.ir.program import Program, Stage
from stepfold.loop.errors import GateError
from stepfold.loop.metrics import drift
from stepfold.passes.base import Context, PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.quantize import inputs as inputs_module
from stepfold.passes.quantize.inputs import Inputs, Measured, Need, known_inputs
from stepfold.passes.quantize.layers import Selection, find_groups
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.scheme import RoundingScheme
from stepfold.passes.quantize.schemes import SCHEMES, mixed
from stepfold.passes.quantize.schemes.int8 import Int8
from stepfold.runtime.packing import batch_invariant
from stepfold.runtime.workshop import workshop

D, HEADS = 64, 4
LAYERS = ["q", "k", "v", "out", "up", "down"]


def bytes_of(stage: Stage) -> int:
    """Bytes of the weights a stage holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stage.tensors().values())


class Block(nn.Module):
    """A block of a diffusion transformer with outliers in one channel, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.classes = nn.Linear(1, D), nn.Embedding(4, D)
        self.modulation = nn.Linear(D, 4 * D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down, self.last = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, D)
        with torch.no_grad():
            self.modulation.bias[3] += 20

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], t [B], c [B]."""
        s1, b1, s2, b2 = self.modulation(torch.sin(self.time(t[:, None] / 1000) + self.classes(c)))[:, None].chunk(
            4, -1
        )
        h = nn.functional.layer_norm(x, (D,)) * (1 + s1) + b1
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = nn.functional.layer_norm(x, (D,)) * (1 + s2) + b2
        return self.last(torch.tanh(x + self.down(nn.functional.gelu(self.up(h), approximate="tanh"))))


VARIANTS: dict[str, dict[str, Any]] = {
    "int8 searched": {"scheme": "int8", "smooth": "search"},
    "int8 salience": {"scheme": "int8", "smooth": "salience", "activations": "static"},
    "int8 symmetric": {"scheme": "int8", "activations": "symmetric"},
    "int8 compensated": {"scheme": "int8", "rounding": "auto"},
    "int8-weights": {"scheme": "int8-weights"},
    "int4": {"scheme": "int4"},
    "int4 awq": {"scheme": "int4", "smooth": "awq"},
    "int4 repaired": {"scheme": "int4", "repair": "data-free"},
    "int4 gptq": {"scheme": "int4", "rounding": "gptq", "group": 32},
    "int4 sequential": {"scheme": "int4", "rounding": "sequential-gptq", "group": 32},
    "int4 rotated": {"scheme": "int4", "rotate": "heads"},
    "svdquant": {"scheme": "svdquant", "rank": 8, "rounding": "gptq"},
    "svdquant sequential": {"scheme": "svdquant", "rank": 8, "rounding": "sequential-gptq"},
    "svdquant int8": {"scheme": "svdquant", "rank": 8, "residual": "int8"},
    "svdquant fp8": {"scheme": "svdquant", "rank": 8, "residual": "fp8"},
    "fp8": {"scheme": "fp8"},
    "nvfp4": {"scheme": "nvfp4"},
    "codebook": {"scheme": "codebook"},
    "mixed": {"scheme": "mixed", "bits": 7.0, "group": 32},
}
"""Largest drift of samples: a few times what is measured, and far below what a wrong layout gives."""
DRIFT = {"int8": 0.04, "int8-weights": 0.03, "fp8": 0.08, "mixed": 0.08, "codebook": 0.5}


@pytest.fixture(scope="module")
def program() -> Program:
    generator = torch.Generator().manual_seed(1)
    example = (torch.randn(2, 8, D, generator=generator), torch.full((2,), 500.0), torch.arange(2))
    captured = denoiser(Block(), *example)
    return Hoist(HoistOptions()).run(captured, context_of(captured, Path("unused"))).program


@pytest.fixture(scope="module")
def context(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_of(program, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def results(program: Program, context: Context) -> dict[str, PassResult]:
    made: dict[str, PassResult] = {}

    class Lazy(dict[str, PassResult]):
        def __missing__(self, name: str) -> PassResult:
            made[name] = self[name] = quantize(program, context, **VARIANTS[name])
            return made[name]

    return Lazy()


def test_every_scheme_is_tried() -> None:
    """But modelopt, which needs an environment of its own and has its tests beside it."""
    assert {options["scheme"] for options in VARIANTS.values()} == set(SCHEMES) - {"modelopt"}
    assert set(QuantizeOptions.model_fields["scheme"].annotation.__args__) == set(SCHEMES)  # type: ignore[union-attr]


def test_schemes_that_read_repair_can_say_what_weights_become() -> None:
    """Otherwise the option would be ignored."""
    assert {name for name, kind in SCHEMES.items() if "repair" in kind.reads} == {
        name for name, kind in SCHEMES.items() if issubclass(kind, RoundingScheme)
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_samples_are_near(program: Program, results: dict[str, PassResult], name: str) -> None:
    result = results[name]
    assert result.details["sites"] == LAYERS and result.changed == len(LAYERS)
    received = drift(samples_of(result.program), samples_of(program))
    assert 1e-5 < received < DRIFT.get(VARIANTS[name]["scheme"], 0.2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_second_run_changes_nothing(context: Context, results: dict[str, PassResult], name: str) -> None:
    program = results[name].program
    again = quantize(program, context, **VARIANTS[name])
    assert (again.changed, again.identity, again.program) == (0, True, program)


OPERATORS_OF = {"int8 searched", "int4", "svdquant", "fp8", "nvfp4", "codebook"}
"""One variant for each kind of operators; the others run the same ones with other numbers."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OPERATORS_OF else pytest.mark.slow) for name in VARIANTS]
)
def test_the_engine_equals_the_reference(results: dict[str, PassResult], name: str) -> None:
    """In ONNX Runtime, over the whole loop; values near a rounding step may fall on its other side.

    Batches are whole, because the reference has one scale for a batch where the scales are dynamic.
    """
    program = results[name].program
    with workshop("onnxruntime", {"rows": None}) as shop:
        assert drift(samples_of(program, shop.open(program)), samples_of(program)) < 1e-2


EMULATED = (
    "int8 searched",
    "int8 symmetric",
    "int8-weights",
    "int4",
    "svdquant int8",
    "fp8",
    "nvfp4",
    "codebook",
    "mixed",
)
"""One variant of each scheme, and each kind of activations."""


@pytest.fixture(scope="module")
def bundles(results: dict[str, PassResult], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: stepfold.lower(results[name].program, out=folder / name) for name in EMULATED}


@pytest.mark.slow
@needs_emulator
def test_without_vnni_samples_are_the_same(bundles: dict[str, Path]) -> None:
    """The same bundle over a loop: kernels of another processor round a few activations to the neighbouring level."""
    noise = np.random.default_rng(3).standard_normal((4, 8, D)).astype(np.float32)
    request = {"noise": noise, "c": np.arange(4)}
    received = drawn_without_vnni(bundles, request)
    for name, path in bundles.items():
        wanted = stepfold.load(path, threads=1).sample(**request)
        assert np.abs(received[name] - wanted).max() <= 1e-3 * np.ptp(wanted), name


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_record_says_is_plain(results: dict[str, PassResult], name: str) -> None:
    assert json.loads(json.dumps(results[name].details))["scheme"] == VARIANTS[name]["scheme"]


def test_only_scales_of_a_whole_tensor_couple_a_batch(results: dict[str, PassResult]) -> None:
    coupled = {name for name in VARIANTS if not batch_invariant(results[name].program.stages)}
    assert coupled == {"int8 searched", "int8 compensated", "svdquant int8", "mixed"}


# -- what each adds


@pytest.fixture(scope="module")
def nearest_drift(program: Program, results: dict[str, PassResult]) -> float:
    return drift(samples_of(results["int4"].program), samples_of(program))


@pytest.mark.parametrize("name", ["int4 awq", "svdquant"])
def test_a_method_beats_rounding_to_nearest(
    program: Program, results: dict[str, PassResult], nearest_drift: float, name: str
) -> None:
    assert drift(samples_of(results[name].program), samples_of(program)) < 0.9 * nearest_drift


def test_rounding_is_compensated_where_enough_is_known(program: Program) -> None:
    """`auto` is `gptq` with a Gram matrix and nearest without."""
    group = find_groups(program.step, Selection(("*",), (), 2), lambda _: None)[0][0]
    M = group.weight.shape[1]
    rows = torch.randn(8 * M, M, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)
    bare = Inputs(rows.amin(dim=0)[None], rows.amax(dim=0)[None], torch.ones(M))
    known = replace(bare, moments=Measured((rows.T @ rows).double() / len(rows)))

    def rounded(rounding: str, inputs: Inputs) -> torch.Tensor:
        return torch.cat(list(Int8(QuantizeOptions(rounding=rounding)).rounded(group, inputs)))  # type: ignore[arg-type]

    assert torch.equal(rounded("auto", known), rounded("gptq", known))
    assert torch.equal(rounded("auto", bare), rounded("nearest", known))
    errors = [torch.linalg.norm(rows @ (rounded(r, known) - group.weight).T) for r in ("auto", "nearest")]
    assert errors[0] < 0.5 * errors[1]


def test_the_widest_gram_matrices_are_left_out_first(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = find_groups(program.step, Selection(("*",), (), 2), lambda _: None)[0]
    widths = sorted({group.source: group.weight.shape[1] for group in groups}.values())
    monkeypatch.setattr(inputs_module, "GRAM_BYTES", 4 * sum(width**2 for width in widths[:-1]))
    found = known_inputs(program, groups, Need.GRAMS, context)
    without = {group.weight.shape[1] for group in groups if not found[group.key].has_gram}
    assert without == {widths[-1]} and widths[-1] > widths[-2]


def test_a_repair_without_data(results: dict[str, PassResult]) -> None:
    """On inputs of another draw the pair is nearer to the unrounded one, and no store was made."""
    before, after = results["int4 repaired"].details["repaired"][""]
    assert 0 < after < 0.95 * before


def test_the_branch_is_two_plain_layers(results: dict[str, PassResult]) -> None:
    """q, k and v share the way down: 4 groups of 6 layers, 4 down and 6 up, and the last layer."""
    found = Counter(operators(results["svdquant"].program.step))
    assert found["linear.default"] == 4 + 6 + 1 and found["stepfold.blocked_linear.default"] == 6


def test_what_an_activation_writes_is_shifted_for_symmetric_codes(results: dict[str, PassResult]) -> None:
    assert results["int8 symmetric"].details["shifted"].keys() == {"down"}
    assert operators(results["int8 symmetric"].program.step).count("sub.Tensor") == 1


def test_mixed_spends_what_it_may(program: Program, context: Context, results: dict[str, PassResult]) -> None:
    details = results["mixed"].details
    assert details["bits"] <= 7.0 and set(details["formats"]) == {"q", "out", "up", "down"}
    wide = quantize(program, context, scheme="mixed", bits=32.0)
    assert wide.changed == 0 and set(wide.details["formats"].values()) == {"float"}


@pytest.mark.parametrize(
    ("bits", "uniform"), [(5.0, {"scheme": "int4", "rounding": "gptq"}), (8.6, {"scheme": "int8"})]
)
def test_mixed_is_no_worse_than_uniform(
    program: Program, context: Context, bits: float, uniform: dict[str, Any]
) -> None:
    """On samples that chose nothing, at the bits of the uniform format or less; 16 of them differ by a fifth."""
    mixed, same = quantize(program, context, scheme="mixed", bits=bits), quantize(program, context, **uniform)
    wanted = samples_of(program, count=64)
    errors = [drift(samples_of(result.program, count=64), wanted) for result in (mixed, same)]
    assert errors[0] <= 1.02 * errors[1]


def test_mixed_needs_its_smallest_format(program: Program, context: Context) -> None:
    with pytest.raises(GateError, match=r"bits: expected at least 4\.50 bits a weight.*received 2\.00\. Raise it"):
        quantize(program, context, scheme="mixed", bits=2.0)


@pytest.mark.parametrize(("time", "allowed"), [(1.0, {"float", "int8"}), (0.75, {"float", "int8"}), (0.5, {"int8"})])
def test_mixed_spends_time(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch, time: float, allowed: set[str]
) -> None:
    """On an engine whose 4 bits are slow they are never chosen, and half the time buys integers only."""
    durations = {"float": 1000, "int8": 500, "int4": 1500}
    monkeypatch.setattr(mixed.Durations, "of", lambda self, group, formats: durations)
    details = quantize(program, replace(context, fitted_on="engine"), scheme="mixed", time=time).details
    assert details["time"] <= time and set(details["formats"].values()) <= allowed
    assert 8 < details["bits"] <= 32


def test_mixed_needs_the_time_of_its_fastest_formats(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    durations = {"float": 1000, "int8": 500, "int4": 1500}
    monkeypatch.setattr(mixed.Durations, "of", lambda self, group, formats: durations)
    with pytest.raises(
        GateError, match=r"time: expected at least 0\.50 of the time of layers in floats.*received 0\.40"
    ):
        quantize(program, replace(context, fitted_on="engine"), scheme="mixed", time=0.4)


@pytest.mark.slow
def test_mixed_spends_time_measured_on_the_engine(program: Program, tmp_path: Path) -> None:
    """All of the time is always enough, and a second build decides the same."""
    with workshop("onnxruntime") as shop:
        context = replace(
            context_of(program, tmp_path), engine=shop.open, engine_name="onnxruntime", fitted_on="engine"
        )
        first, second = (quantize(program, context, scheme="mixed", time=1.0).details for _ in range(2))
    assert first == second and 0 < first["time"] <= 1.0
    assert len(list((tmp_path / "durations").iterdir())) == 4  # q, k and v; out; up; down


def test_weights_get_smaller(program: Program, results: dict[str, PassResult]) -> None:
    """Bytes of the six layers against float32: 2 bits, 4 bits, 4 bits with E4M3 scales, 8 bits."""
    floats = bytes_of(program.step)
    quantized = 4 * (4 * D * D + 4 * D * D)
    for name, bits in {"codebook": 2, "int4": 4.5, "nvfp4": 4.5, "fp8": 8, "int8-weights": 8.5}.items():
        saved = floats - bytes_of(results[name].program.step)
        extra = 6 * 4 * 256 * 4 if name == "codebook" else 0  # a codebook of each layer
        assert saved == pytest.approx(quantized * (1 - bits / 32) - extra, rel=0.03), name


# -- stages that run once a request


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_weights_of_hoisted_stages(program: Program, context: Context, bits: str) -> None:
    result = quantize(program, context, hoisted=bits)
    assert result.details["hoisted_sites"] == ["modulation"] and result.changed == len(LAYERS) + 1
    stage, before = (p.stages[-2] for p in (result.program, program))
    assert "stepfold.blocked_linear.default" in operators(stage)
    assert bytes_of(stage) < bytes_of(before) / (3 if bits == "int8" else 6)
    assert drift(samples_of(result.program), samples_of(program)) < (0.03 if bits == "int8" else 0.3)


# -- wrong options


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
