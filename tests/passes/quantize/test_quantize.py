"""Linear layers in 8 bits: which, how, and what the engine makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, context_of, denoiser, operators, samples_of
from quantizing import BLOCK, SITES, counted, quantize, sites

from stepfold.backends.registry import get
from stepfold.ir.program import Program, Refusal
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.quantize.algebra.grids import INT8_CHANNEL, Quantized
from stepfold.passes.quantize.algebra.int8 import to_products
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

LAST = "the last layer: nothing after it damps its error"


@pytest.mark.parametrize(
    ("engine", "form"), [("openvino", "symmetric"), ("tensorrt", "symmetric"), ("onnxruntime", "dynamic")]
)
def test_activations_are_those_that_the_engine_is_fastest_with(hoisted: Program, engine: str, form: str) -> None:
    context = context_of(hoisted, Path("unused"), activations=get(engine).activations)
    result = quantize(hoisted, context, activations="auto")
    assert result.details["activations"] == form and result.details["sites"] == SITES


# -- which layers


def test_every_layer_of_the_block_and_why_not_the_others(dynamic: PassResult) -> None:
    stage = dynamic.program.step
    assert list(sites(stage)) == SITES and dynamic.changed == len(SITES)
    assert dynamic.details["sites"] == SITES
    assert dynamic.refused == (Refusal("proj_out_2", LAST),)
    assert counted(stage) == {
        "stepfold.quantize_dynamic.default": 4,  # one for q, k and v together
        "stepfold.qlinear.default": 6,
        "linear.default": 1,
    }


def test_other_stages_are_left_alone(hoisted: Program, dynamic: PassResult) -> None:
    for before, after in zip(hoisted.stages[:-1], dynamic.program.stages[:-1], strict=True):
        assert after is before


def test_layers_that_read_one_value_share_its_quantization(dynamic: PassResult) -> None:
    found = sites(dynamic.program.step)
    q, k, v, out = (found[name].args[:3] for name in SITES[:4])
    assert q == k == v != out


def test_modulation_without_hoisting_gains_nothing(tiny_program: Program) -> None:
    """With one row per sample, reading the weights dominates."""
    refused = {refusal.site: refusal.reason for refusal in quantize(tiny_program).refused}
    assert refused[f"{BLOCK}.norm1.linear"] == "1 row per sample: reading the weights dominates, not arithmetic"
    assert refused["proj_out_1"] == refused[f"{BLOCK}.norm1.linear"]
    assert (
        quantize(tiny_program, min_tokens=1).changed == len(SITES) + 6
    )  # two embedders of two layers, two modulations


@pytest.mark.parametrize(
    ("options", "expected", "reason"),
    [
        ({"skip": [f"{BLOCK}.ff.*"]}, SITES[:4], "skipped by the recipe"),
        ({"include": ["*.to_q", "*.to_k"]}, SITES[:2], "not included"),
        ({"include": ["*.attn1.*"], "skip": ["*.to_v"]}, [*SITES[:2], SITES[3]], "skipped by the recipe"),
        ({"min_tokens": 17}, [], "16 rows per sample: reading the weights dominates, not arithmetic"),
    ],
)
def test_include_and_skip(hoisted: Program, options: dict[str, Any], expected: list[str], reason: str) -> None:
    result = quantize(hoisted, **options)
    assert list(sites(result.program.step)) == expected and result.changed == len(expected)
    assert reason in {refusal.reason for refusal in result.refused}
    assert len(result.refused) == 7 - len(expected)


def outcome(program: Program, *passes: dict[str, Any], optional: bool = False) -> str:
    """What the manager records of the last of several quantizations."""
    steps = [Step(Quantize(QuantizeOptions.model_validate(options)), optional) for options in passes]
    return run_passes(program, steps, context_of(program, Path("unused"))).records[-1].outcome


def test_a_recipe_that_leaves_nothing_fails(hoisted: Program) -> None:
    with pytest.raises(StepfoldError, match=r"pass quantize: expected to change something.*to_q: skipped by"):
        outcome(hoisted, {"skip": ["*"]})


@pytest.mark.parametrize("option", ["include", "skip"])
@pytest.mark.parametrize("optional", [False, True])
def test_a_pattern_that_matches_nothing_is_an_error(hoisted: Program, option: str, optional: bool) -> None:
    """One of several too, and where the layers are quantized already."""
    first, wrong = {"include": [f"{BLOCK}.attn1.*"]}, {option: ["*", f"{BLOCK}.at1.to_q*"]}
    with pytest.raises(UsageError, match=rf"option '{option}': .*at1.to_q\*', which matches none.*{BLOCK}.attn1.to_q"):
        outcome(hoisted, first, wrong, optional=optional)


def test_patterns_match_letter_by_letter_and_name_layers_of_the_captured_model(
    hoisted: Program, tiny_program: Program
) -> None:
    """Those of the timestep have left the program with hoisting; to protect them is no mistake."""
    context = context_of(tiny_program, Path("unused"))
    assert quantize(hoisted, context, skip=["*.timestep_embedder.*"]).changed == len(SITES)
    with pytest.raises(UsageError, match="which matches none"):
        quantize(hoisted, context, skip=["*.Attn1.*"])


def test_what_was_quantized_otherwise_is_no_identity(hoisted: Program) -> None:
    int8, int4 = {"include": ["*.attn1.*"]}, {"scheme": "int4", "group": 16, "include": ["*.attn1.*"]}
    assert outcome(hoisted, int8, int8) == "identity"
    with pytest.raises(StepfoldError, match=r"attn1.to_q: quantized before, in another way: int8, activations dynamic"):
        outcome(hoisted, int8, int4)


@pytest.mark.parametrize(
    "last",
    [
        lambda y: y.chunk(2, 1)[0],
        lambda y: y.unbind(1)[0],
        lambda y: y[:, :1].squeeze(1),
        lambda y: torch.stack([y, y], -1)[..., 0],
        lambda y: torch.einsum("btd->bdt", y),
        lambda y: torch.nn.functional.pixel_shuffle(y[:, :, :, None], 2),
    ],
    ids=["chunk", "unbind", "squeeze", "stack", "einsum", "pixel_shuffle"],
)
def test_the_last_layer_is_found_behind_any_layout(last: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    result = quantize(component(lambda x: last(model(x)), torch.randn(2, 4, 4)))
    assert result.changed == 1 and [refusal.reason for refusal in result.refused] == [LAST]


def test_a_layer_whose_output_is_contracted_is_not_the_last() -> None:
    model = torch.nn.Linear(4, 8)
    result = quantize(component(lambda x: torch.einsum("btd->bt", model(x)), torch.randn(2, 4, 4)))
    assert result.changed == 1 and result.refused == ()


def test_a_weight_that_is_computed_is_refused() -> None:
    program = component(
        lambda x, w: torch.tanh(torch.nn.functional.linear(x, w.sum(0))), torch.randn(2, 3, 4), torch.randn(2, 4, 4)
    )
    assert quantize(program).refused == (Refusal("linear", "its weight is computed, not stored"),)


def test_a_component_is_quantized_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4), torch.nn.Tanh())
    result = quantize(component(model, torch.randn(2, 3, 4)))
    assert result.changed == 2 and result.refused == ()


# -- the numbers


def test_weights_are_the_formula(hoisted: Program, dynamic: PassResult) -> None:
    before = hoisted.step.tensors()
    stage = dynamic.program.step
    for name, node in sites(stage).items():
        q, scale = to_products(Quantized.of(before[f"{name}.weight"], INT8_CHANNEL))
        weight, weight_scale, bias = (stage.tensors()[str(a.target)] for a in node.args[3:6])  # type: ignore[union-attr]
        assert torch.equal(weight, q) and torch.equal(weight_scale, scale)
        assert torch.equal(bias, before[f"{name}.bias"])


def test_float_weights_leave(hoisted: Program, dynamic: PassResult) -> None:
    """D = 16: the six layers have 4 D D + 8 D D weights; their scales are new, 4 D + 4 D + D."""
    assert {f"{name}.weight" for name in SITES}.isdisjoint(dynamic.program.step.tensors())
    assert dynamic.program.parameters() - hoisted.parameters() == 4 * 16 + 4 * 16 + 16
    int8 = [t for t in dynamic.program.step.tensors().values() if t.dtype == torch.int8]
    assert sum(tensor.numel() for tensor in int8) == 12 * 16 * 16


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_drift_is_that_of_8_bits(hoisted: Program, activations: str) -> None:
    steps = [Step(Quantize(QuantizeOptions.model_validate({"activations": activations})))]
    (record,) = run_passes(hoisted, steps, context_of(hoisted, Path("unused"))).records
    assert 1e-5 < record.drift < 0.03
    assert record.flops_before == record.flops_after


def test_max_drift_is_kept(hoisted: Program) -> None:
    steps = [Step(Quantize(QuantizeOptions(max_drift=1e-5)))]
    with pytest.raises(StepfoldError, match=r"exceeds 1e-05, its max_drift; raise max_drift or exclude sites"):
        run_passes(hoisted, steps, context_of(hoisted, Path("unused")))


def test_samples_are_near(tiny_program: Program, dynamic: PassResult, static: PassResult) -> None:
    wanted = samples_of(tiny_program)
    assert max(drift(samples_of(result.program), wanted) for result in (dynamic, static)) < 0.05


def test_a_second_run_changes_nothing(dynamic: PassResult) -> None:
    again = quantize(dynamic.program)
    assert (again.changed, again.identity, again.program) == (0, True, dynamic.program)


# -- smoothing, as far as its figures go


def test_smoothing_keeps_the_network(hoisted: Program, tiny_program: Program) -> None:
    result = quantize(hoisted, smooth=0.5)
    assert result.changed == len(SITES)
    assert drift(samples_of(result.program), samples_of(tiny_program)) < 0.05


# -- models of other kinds


def test_smoothing_divides_tables(tmp_path: Path) -> None:
    """A modulation of the timestep alone becomes a table when it is hoisted."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.time, self.body, self.out = torch.nn.Linear(1, 16), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            scale, shift = self.time(t[:, None] / 1000).chunk(2, 1)
            x = torch.nn.functional.layer_norm(x, (8,)) * scale[:, None] + shift[:, None]
            return torch.tanh(self.out(torch.relu(self.body(x))))

    program = denoiser(Model(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 5.0))
    steps = [Step(Hoist(HoistOptions())), Step(Quantize(QuantizeOptions(smooth=0.5)))]
    *_, record = run_passes(program, steps, context_of(program, tmp_path)).records
    assert record.drift < 0.03


def test_smoothing_leaves_inputs_of_the_program(tmp_path: Path) -> None:
    """Nothing computes them, so they can only be divided where they are read."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.body(torch.nn.functional.layer_norm(x, (8,)) * scale + shift))

    torch.manual_seed(0)
    program = component(Model(), torch.randn(2, 4, 8), 3 * torch.rand(2, 1, 8), torch.randn(2, 1, 8))
    steps = [Step(Quantize(QuantizeOptions(smooth=0.5)))]
    (record,) = run_passes(program, steps, context_of(program, tmp_path)).records
    assert record.drift < 0.03


def test_a_layer_called_twice_has_two_ranges(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            first = torch.tanh(self.layer(100 * x) + t[:, None, None] / 1000)
            return torch.tanh(self.layer(first))

    program = denoiser(Twice(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 5.0))
    steps = [Step(Quantize(QuantizeOptions(activations="static")))]
    (record,) = run_passes(program, steps, context_of(program, tmp_path)).records
    assert record.drift < 0.1


def test_a_layer_that_reads_another_one() -> None:
    """As cross-attention reads the projected caption: what the second reads is replaced before it is."""
    torch.manual_seed(0)
    program = component(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.ReLU()),
                        torch.randn(2, 3, 8))  # fmt: skip
    for activations in ("dynamic", "static"):
        result = quantize(program, activations=activations)
        assert result.changed == 2 and operators(result.program.step).count("stepfold.qlinear.default") == 2
        inputs = {name: value.numpy() for name, value in program.example.items()}
        assert drift(result.program.bind().evaluate(inputs)[0], program.bind().evaluate(inputs)[0]) < 0.02
