"""Attention with its head split and merge: before and after, and what is nearly that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import component, context_of, operators
from torch.nn import functional as F

from stepfold.ir.cost import stage_flops
from stepfold.ir.edit import copy_graph
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program
from stepfold.ir.verify import verify
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.attention import FuseAttention
from stepfold.passes.fuse.fuse import Fuse, FuseOptions

H, K, T = 2, 4, 5
D = H * K
X = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1))
EXACT = 1e-6


def split(x: torch.Tensor, heads: int = H) -> torch.Tensor:
    """[B, T, D] -> [B, H, T, K]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, K] -> [B, T, D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return cross(x, x, **options)


def cross(x: torch.Tensor, keys: torch.Tensor, **options: Any) -> torch.Tensor:
    return merge(F.scaled_dot_product_attention(split(x.sin()), split(keys.cos()), split(keys.exp()), **options)) + 1


def fuse(program: Program, **options: Any) -> PassResult:
    return Fuse(FuseOptions.model_validate(options)).run(program, context_of(program, Path("unused")))


def fused_call(result: PassResult) -> Any:
    (node,) = [n for n in result.program.step.graph.graph.nodes if n.target is torch.ops.stepfold.attention.default]
    return node


# -- what is fused


def test_before_and_expected() -> None:
    """merge(sdpa(split(q), split(k), split(v))) -> attention(q, k, v, heads)."""
    before = component(lambda x: attend(x), X)
    layout = ["reshape.default", "transpose.int"]
    assert operators(before.step) == [
        "sin.default", *layout, "cos.default", *layout, "exp.default", *layout,
        "scaled_dot_product_attention.default", "transpose.int", "reshape.default", "add.Tensor",
    ]  # fmt: skip
    result = fuse(before)
    assert operators(result.program.step) == [
        "sin.default", "cos.default", "exp.default", "stepfold.attention.default", "add.Tensor",
    ]  # fmt: skip
    assert (result.changed, result.refused) == (1, ())
    assert result.details == {"rules": {"rms_norm": 0, "rotary": 0, "attention": 1}}
    verify(result.program)


def windows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [5 B, H, T / 5, K], a part of the tokens at a time in the batch dimension."""
    return x.reshape(5 * x.shape[0], T // 5, H, K).transpose(1, 2)


def normed(x: torch.Tensor) -> torch.Tensor:
    """A norm of each head between the split and the transpose."""
    return F.layer_norm(x.reshape(x.shape[0], -1, H, K), (K,)).transpose(1, 2)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Behind the transpose, all tokens but the first two turn by one angle, as CogVideoX has text in front."""
    heads = F.layer_norm(split(x), (K,))
    angles = torch.linspace(0, 1, (T - 2) * K // 2).reshape(T - 2, K // 2)
    pairs = heads[:, :, 2:].unflatten(-1, (-1, 2))
    even, odd, c, s = pairs[..., 0], pairs[..., 1], angles.cos(), angles.sin()
    rotated = torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(3)
    return torch.cat([heads[:, :, :2], rotated], 2)


MODELS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], int, float]] = {
    "self": (lambda x: attend(x), (X,), H, K**-0.5),
    "scaled": (lambda x: attend(x, scale=0.25), (X,), H, 0.25),
    "cross": (lambda x, text: cross(x, text), (X, TEXT), H, K**-0.5),  # keys of another length
    "explicit defaults": (lambda x: attend(x, attn_mask=None, dropout_p=0.0, is_causal=False), (X,), H, K**-0.5),
    "positional": (
        lambda x: merge(F.scaled_dot_product_attention(split(x), split(x * 2), split(x * 3), None, 0.0, False)),
        (X,),
        H,
        K**-0.5,
    ),
    "one head": (
        lambda x: merge(F.scaled_dot_product_attention(split(x, 1), split(x * 2, 1), split(x * 3, 1))),
        (X,),
        1,
        D**-0.5,
    ),
    "narrow values": (
        lambda x: merge(F.scaled_dot_product_attention(split(x), split(x * 2), split(x[:, :, :6] * 3))),
        (X,),
        H,
        K**-0.5,
    ),
    "negative dimensions": (
        lambda x: (
            F.scaled_dot_product_attention(
                *(y.reshape(y.shape[0], T, H, K).transpose(-3, -2) for y in (x, x * 2, x * 3))
            )
            .transpose(-2, -3)
            .reshape(x.shape[0], T, D)
        ),
        (X,),
        H,
        K**-0.5,
    ),
    "permuted": (
        lambda x: (
            F.scaled_dot_product_attention(
                *(y.reshape(y.shape[0], T, H, K).permute(0, 2, 1, 3) for y in (x, x * 2, x * 3))
            )
            .permute(0, 2, 1, 3)
            .reshape(x.shape[0], T, D)
        ),
        (X,),
        H,
        K**-0.5,
    ),
    "heads are normed": (
        lambda x: merge(F.scaled_dot_product_attention(normed(x), normed(x * 2), split(x))),
        (X,),
        H,
        K**-0.5,
    ),
    "text beside image": (
        lambda x, text: merge(
            F.scaled_dot_product_attention(
                *(
                    torch.cat([y.reshape(y.shape[0], -1, H, K) for y in (text * i, x)], 1).transpose(1, 2)
                    for i in (1, 2, 3)
                )
            )
        ),
        (X, TEXT),
        H,
        K**-0.5,
    ),
    "heads are normed behind the transpose": (
        lambda x: merge(
            F.scaled_dot_product_attention(F.layer_norm(split(x), (K,)), F.rms_norm(split(x * 2), (K,)), split(x))
        ),
        (X,),
        H,
        K**-0.5,
    ),
    "text is joined behind the transpose": (
        lambda x, text: merge(
            F.scaled_dot_product_attention(
                *(torch.cat([F.rms_norm(split(text * i), (K,)), split(x)], 2) for i in (1, 2, 3))
            )
        ),
        (X, TEXT),
        H,
        K**-0.5,
    ),
    "a part is turned": (
        lambda x: merge(F.scaled_dot_product_attention(turned(x), turned(x * 2), split(x))),
        (X,),
        H,
        K**-0.5,
    ),
    "windows": (
        lambda x: merge(F.scaled_dot_product_attention(windows(x), windows(x * 2), windows(x * 3))),
        (X,),
        H,
        K**-0.5,
    ),
    "flattened": (
        lambda x: (
            F.scaled_dot_product_attention(*(y.unflatten(2, (H, K)).transpose(1, 2) for y in (x, x * 2, x * 3)))
            .transpose(1, 2)
            .flatten(2, 3)
        ),
        (X,),
        H,
        K**-0.5,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_with_the_same_numbers(name: str) -> None:
    function, examples, heads, scale = MODELS[name]
    before = component(function, *examples)
    result = fuse(before)
    assert result.details["rules"]["attention"] == 1, result.refused
    assert "transpose.int" not in operators(result.program.step)
    assert "scaled_dot_product_attention.default" not in operators(result.program.step)
    assert fused_call(result).args[3:] == (heads, pytest.approx(scale))
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < EXACT
    assert stage_flops(result.program.step) == stage_flops(before.step)
    verify(result.program)


def test_two_attentions_in_a_row() -> None:
    before = component(lambda x: attend(attend(x)), X)
    result = fuse(before)
    assert result.changed == 2
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < EXACT


def test_a_second_run_changes_nothing() -> None:
    result = fuse(component(lambda x: attend(x), X))
    again = fuse(result.program)
    assert (again.changed, again.identity) == (0, True)
    assert str(again.program.step.graph.graph) == str(result.program.step.graph.graph)


def test_the_argument_is_not_changed() -> None:
    before = component(lambda x: attend(x), X)
    text = str(before.step.graph.graph)
    fuse(before)
    assert str(before.step.graph.graph) == text


def test_a_value_that_another_operator_reads_is_kept_for_it() -> None:
    """The split queries are returned too."""

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = split(x)
        return merge(F.scaled_dot_product_attention(q, split(x * 2), split(x * 3))), q * 2

    before = component(f, X)
    result = fuse(before)
    assert result.changed == 1 and operators(result.program.step).count("transpose.int") == 1
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < EXACT


# -- near misses


def swapped_merge(x: torch.Tensor) -> torch.Tensor:
    """Heads and tokens are not swapped back before the reshape."""
    attention = F.scaled_dot_product_attention(split(x), split(x * 2), split(x * 3))
    return attention.reshape(x.shape[0], T, D)


def rotated(x: torch.Tensor) -> torch.Tensor:
    return merge(F.scaled_dot_product_attention(split(x) * 2 + 1, split(x), split(x)))


NEAR = {
    "mask": (lambda x: attend(x, attn_mask=torch.ones(T, T).tril().bool()), "it has a mask"),
    "causal": (lambda x: attend(x, is_causal=True), "it is causal or has dropout"),
    "work between split and attention": (rotated, "query, key or value is not a plain head split"),
    "something else reads the norm": (
        lambda x: (
            merge(F.scaled_dot_product_attention(norm := F.layer_norm(split(x), (K,)), split(x), split(x))),
            norm + 1,
        ),
        "query, key or value is not a plain head split",
    ),
    "a norm over tokens too": (
        lambda x: merge(F.scaled_dot_product_attention(F.layer_norm(split(x), (T, K)), split(x), split(x))),
        "query, key or value is not a plain head split",
    ),
    "joined along the heads": (
        lambda x: merge(
            F.scaled_dot_product_attention(*(torch.cat([split(y[..., :4], 1), split(y[..., 4:], 1)], 1) for y in (x,) * 3))
        ),
        "query, key or value is not a plain head split",
    ),
    "heads of two widths": (
        lambda x: merge(
            F.scaled_dot_product_attention(split(x, 4), split(x[:, :, :4], 2), split(x[:, :, :4], 2), enable_gqa=True)
        ),
        "query, key and value have different numbers of heads",
    ),
    "split of a part": (
        lambda x: merge(
            F.scaled_dot_product_attention(
                *(y.reshape(y.shape[0], T, D).unflatten(1, (T, 1)).reshape(y.shape[0], H, T, K) for y in (x, x, x))
            )
        ),
        "query, key or value is not a plain head split",
    ),
    "never merged": (lambda x: F.scaled_dot_product_attention(split(x), split(x * 2), split(x * 3)) * 2, "its output is not a plain head merge"),
    "merged without a swap": (swapped_merge, "its output is not a plain head merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_says_what_was_missing(name: str) -> None:
    function, reason = NEAR[name]
    before = component(function, X)
    result = fuse(before)
    assert result.changed == 0 and not result.identity
    assert [refusal.reason for refusal in result.refused] == [reason]
    assert result.refused[0].site.startswith("attention: ")
    assert operators(result.program.step) == operators(before.step)
    for received, wanted in zip(probe_outputs(result.program), probe_outputs(before), strict=True):
        np.testing.assert_array_equal(received, wanted)


def test_one_refused_one_fused() -> None:
    result = fuse(component(lambda x: attend(attend(x, is_causal=True)), X))
    assert result.changed == 1
    assert [refusal.reason for refusal in result.refused] == ["it is causal or has dropout"]


def test_a_rule_changes_the_graph_it_is_given() -> None:
    stage = component(lambda x: attend(x), X).step
    graph = copy_graph(stage)
    for node, original in zip(graph.graph.nodes, stage.graph.graph.nodes, strict=True):
        node.meta = dict(original.meta)
    applied = FuseAttention().apply(graph)
    assert (len(applied.made), applied.refused) == (1, ())
    assert [n for n in graph.graph.nodes if n.target is torch.ops.stepfold.attention.default]
