"""Sparse attention in a program: what it computes, what is refused, and what engines make of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import calls, run, samples_of
from torch.nn.functional import scaled_dot_product_attention
from zoo import DIT, FLUX, HUNYUANVIDEO, SD3, WAN, ZooModel

from stepfold.ir.cost import stage_flops
from stepfold.ir.edit import copy_graph, finish
from stepfold.ir.operators.block_sparse_attention import block_sparse_attention
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program, attribute
from stepfold.ir.verify import verify
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.attend.sparsify import SparsifyAttention, SparsifyOptions
from stepfold.passes.hoist.hoist import Hoist
from stepfold.passes.manager import Step
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.recipe import load_recipe
from stepfold.runtime.workshop import workshop

SAME = 1e-5
SMALL = {"tile": (1, 2, 2), "force": True}
FAMILIES: dict[str, tuple[ZooModel, dict[str, Any]]] = {
    "joint, image first": (SD3, SMALL),
    "joint, text first": (FLUX, SMALL | {"grid": (1, 4, 4)}),
    "video": (WAN, SMALL | {"pattern": "frames", "keep": 0.5}),
    "video with text": (HUNYUANVIDEO, SMALL),
}


def sparse(program: Program, **options: Any) -> Program:
    return run(program, SparsifyAttention(SparsifyOptions.model_validate(SMALL | options)))


def masked(program: Program) -> Program:
    """The program with dense attention under the mask that each sparse one stands for."""
    stages = []
    for stage in program.steps:
        graph = copy_graph(stage)
        for node in graph.graph.find_nodes(op="call_function", target=block_sparse_attention.overload):
            order, _, kept = (attribute(graph, argument.target) for argument in node.args[3:6])
            given, start, block, scale = node.args[6:]
            query = node.args[0].meta["val"]
            graph.register_buffer(
                f"mask_{node.name}", mask_of(order, kept, start, block, query.shape[2], query.shape[1])
            )
            with graph.graph.inserting_before(node):
                mask = graph.graph.get_attr(f"mask_{node.name}")
                if given is not None:  # of keys
                    mask = graph.graph.call_function(torch.ops.aten.logical_and.default, (mask, given))
                new = graph.graph.call_function(
                    torch.ops.aten.scaled_dot_product_attention.default, (*node.args[:3], mask), {"scale": scale}
                )
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
        stages.append(finish(stage, graph))
    return program.with_stages(stages)


def mask_of(order: torch.Tensor, kept: torch.Tensor, start: int, block: int, tokens: int, heads: int) -> torch.Tensor:
    """[1, H, T, T] whether a query reads a key."""
    image = len(order)
    block_of = order.argsort() // block  # of each token
    allowed = torch.zeros(len(kept), image // block, image // block, dtype=torch.bool).scatter_(2, kept, True)
    mask = torch.ones(heads, tokens, tokens, dtype=torch.bool)
    inside = slice(start, start + image)
    mask[:, inside, inside] = allowed[:, block_of][:, :, block_of].expand(heads, -1, -1)
    return mask[None]


# -- the operator


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    heads, blocks, block, text = (draw(st.integers(1, n)) for n in (3, 5, 4, 4))
    text, groups = text - 1, draw(st.sampled_from([1, heads]))
    start = draw(st.sampled_from([0, text]))
    m = draw(st.integers(1, blocks))
    torch.manual_seed(draw(st.integers(0, 1000)))
    query, key, value = (torch.randn(2, heads, blocks * block + text, 4) for _ in range(3))
    order = torch.randperm(blocks * block)
    kept = torch.stack([torch.randperm(blocks)[:m] for _ in range(groups * blocks)]).reshape(groups, blocks, m)
    mask = draw(st.sampled_from([None, torch.rand(2, 1, 1, blocks * block + text) > 0.3]))
    if mask is not None:
        mask[..., torch.isin(torch.arange(mask.shape[-1]) - start, order[:1])] = True  # no query without any key
    return query, key, value, order, kept, mask, start, block


@pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_the_operator_is_dense_attention_under_a_mask(
    monkeypatch: pytest.MonkeyPatch, chunk: int, case: tuple[Any, ...]
) -> None:
    """In one turn, in several, and with a turn for each block of queries."""
    monkeypatch.setattr("stepfold.ir.operators.block_sparse_attention.CHUNK_BYTES", chunk)
    query, key, value, order, kept, keys, start, block = case
    received = block_sparse_attention(query, key, value, order, order.argsort(), kept, keys, start, block, 0.5)
    mask = mask_of(order, kept, start, block, query.shape[2], query.shape[1])
    mask = mask if keys is None else mask & keys
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    asking = mask.any(-1).expand(wanted.shape[:3])  # a query without any key has no answer
    torch.testing.assert_close(received[asking], wanted[asking], rtol=SAME, atol=SAME)


# -- the pass


def test_all_blocks_kept_is_dense() -> None:
    made = sparse(DIT.program, keep=1.0)
    verify(made)
    assert len([node for node in calls(made.step) if node.target is block_sparse_attention.overload]) == 2
    assert outputs_drift(probe_outputs(made), probe_outputs(DIT.program)) < SAME


@pytest.mark.parametrize("pattern", ["window", "cross", "bank"])
def test_sparse_is_dense_under_its_mask(pattern: str) -> None:
    made = sparse(DIT.program, pattern=pattern, keep=0.75 if pattern == "cross" else 0.5)
    assert outputs_drift(probe_outputs(made), probe_outputs(masked(made))) < SAME
    assert outputs_drift(probe_outputs(made), probe_outputs(DIT.program)) > 100 * SAME


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model, options = FAMILIES[name]
    program = run(model.program, Step(Hoist(Hoist.options_type()), optional=True))
    everything = sparse(program, **options | {"keep": 1.0})
    assert outputs_drift(probe_outputs(everything), probe_outputs(program)) < SAME
    made = sparse(program, **options)
    assert outputs_drift(probe_outputs(made), probe_outputs(masked(made))) < SAME


def test_flops_are_those_of_the_pairs_that_are_kept() -> None:
    """Attention of 16 tokens, 2 heads of 16: at half of the blocks it costs half."""
    pairs = 2 * 2 * 16 * 16 * (16 + 16)  # of one attention; there are two
    whole, half = stage_flops(DIT.program.step), stage_flops(sparse(DIT.program, keep=0.5).step)
    assert whole - half == 2 * pairs // 2


def test_the_record_says_what_was_kept() -> None:
    (record,) = sparse(DIT.program).records
    assert record.changed == 2 and record.details["sites"] == {
        f"step: transformer_blocks.{i}.attn1": {"grid": [1, 4, 4], "text": 0, "tile": [1, 2, 2], "blocks": 4, "kept": 1}
        for i in range(2)
    }


def test_a_second_run_changes_nothing() -> None:
    once = sparse(DIT.program)
    again = sparse(once)
    assert [record.outcome for record in again.records] == ["changed", "identity"]
    with pytest.raises(StepfoldError, match="expected to change something, changed nothing"):
        sparse(once, keep=0.5)


def test_a_part_of_the_loop_stays_dense() -> None:
    """The first quarter of the calls has a stage of its own, which is what it was."""
    made = sparse(DIT.program, part=(0.25, 1.0))
    (slot,) = made.computing
    assert slot.by_call == (0, 0, *[1] * 6)
    targets = [{node.target for node in calls(stage)} for stage in slot.variants]
    assert [block_sparse_attention.overload in found for found in targets] == [False, True]
    assert slot.variants[0] is DIT.program.step
    assert drift(samples_of(made), samples_of(sparse(DIT.program))) > 0


def test_attentions_are_left_alone_where_the_recipe_says() -> None:
    made = sparse(DIT.program, skip=("transformer_blocks.0.*",))
    (record,) = made.records
    assert record.changed == 1
    assert [(refusal.site, refusal.reason) for refusal in record.refused] == [
        ("transformer_blocks.0.attn1", "skipped by the recipe")
    ]


def test_the_bank_is_that_of_the_calibration_samples(tmp_path: Path) -> None:
    """Of equal cost, it is nearer to dense attention than a window is, and the same seed gives the same blocks."""
    window, bank, again = (sparse(DIT.program, pattern=pattern, keep=0.5) for pattern in ("window", "bank", "bank"))
    wanted = probe_outputs(DIT.program)
    assert outputs_drift(probe_outputs(bank), wanted) < outputs_drift(probe_outputs(window), wanted)
    tables = [
        [
            attribute(made.step.graph, node.args[5].target)
            for node in calls(made.step)
            if node.target is block_sparse_attention.overload
        ]
        for made in (bank, again)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*tables, strict=True))
    assert tables[0][0].shape == (2, 4, 2), "each head has its own"


def test_layers_around_sparse_attention_are_quantized_as_they_were_around_dense() -> None:
    """The same layers, and smoothing reaches the value projection through either attention."""
    settings = Quantize(QuantizeOptions(min_tokens=1, smooth=0.5))
    dense, thinned = (run(program, settings).records[-1] for program in (DIT.program, sparse(DIT.program, keep=1.0)))
    assert dense.details["sites"] == thinned.details["sites"]
    assert dense.refused == thinned.refused, "a scale that no layer takes is refused by name"


# -- refusals and errors


def test_attention_that_is_cheap_is_not_worth_it() -> None:
    with pytest.raises(
        StepfoldError, match=r"attention is [\d.]+% of the FLOPs of an evaluation, below 10%; `force: true`"
    ):
        sparse(DIT.program, force=False)


def test_no_tile_divides_the_grid() -> None:
    with pytest.raises(StepfoldError, match=r"no tile of 16 to 256 tokens divides its grid of \[1, 4, 4\]"):
        sparse(DIT.program, tile=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tile": (1, 3, 2)},
            r"'tile': expected frames, height and width that divide the grid of \[1, 4, 4\] tokens; received \[1, 3, 2\]",
        ),
        ({"skip": ("blocks.*",)}, r"'skip': no attention matches 'blocks\.\*'"),
        ({"part": (0.0, 0.01)}, r"'part': expected at least one of the 8 calls"),
        ({"pattern": "cross"}, r"'keep': expected at least 0\.75"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"pass sparsify_attention: option {message}"):
        sparse(DIT.program, **options)


def test_a_grid_that_is_not_that_of_the_model() -> None:
    with pytest.raises(StepfoldError, match=re.escape("the grid [1, 8, 8] has 64 tokens, and the image has 16")):
        sparse(DIT.program, grid=(1, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "windw"}, "'pattern': expected a pattern: window, cross, frames, bank; received 'windw'"),
        ({"keep": 0}, "'keep': expected greater than 0; received 0"),
        ({"keep": 1.5}, "'keep': expected less than or equal to 1; received 1.5"),
        ({"tile": [1, 0, 2]}, r"'tile': expected frames, height and width of at least 1; received \[1, 0, 2\]"),
    ],
)
def test_an_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"recipe: pass sparsify_attention: option {message}"):
        load_recipe({"passes": [{"sparsify_attention": options}]}).steps()


def test_a_component_has_no_grid() -> None:
    program = replace(DIT.program, loop=None, recurrence=None)
    assert SparsifyAttention(SparsifyOptions()).not_applicable(program) == "the program has no loop"


# -- engines


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("pattern", ["window", "bank"])
def test_engines_compute_it_by_its_portable_form(backend: str, pattern: str) -> None:
    program = sparse(DIT.program, pattern=pattern, keep=0.5)
    with workshop(backend) as shop:
        received = samples_of(program, shop.open(program), 3)
    assert drift(received, samples_of(program, count=3)) < SAME
