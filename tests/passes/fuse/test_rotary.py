"""Rotary position embeddings in the forms that models write them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from programs import component, context_of, operators

from stepfold.backends.onnx.precision import at_precision
from stepfold.backends.onnxruntime.lower import lower
from stepfold.backends.onnxruntime.session import open_session
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program, reference
from stepfold.ir.verify import verify
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.fuse import Fuse, FuseOptions

T, H, K = 5, 2, 6
X = torch.randn(2, T, H, K, generator=torch.Generator().manual_seed(0))
ANGLES = torch.linspace(-2, 3, T * K // 2).reshape(T, K // 2)
COSINE, SINE = ANGLES.cos(), ANGLES.sin()
DOUBLED = (COSINE.repeat_interleave(2, 1), SINE.repeat_interleave(2, 1))
FUSED = "stepfold.rotary.default"
EXACT = 1e-6


class Rotated(torch.nn.Module):
    """f(x, cosine, sine), the tables stored."""

    def __init__(self, function: Callable, *tables: torch.Tensor):
        super().__init__()
        self.function = function
        for name, table in zip(("cosine", "sine"), tables, strict=True):
            self.register_buffer(name, table)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, K] or [B, H, T, K]."""
        return self.function(x * 2, self.cosine, self.sine) + 1


def fuse(program: Program) -> PassResult:
    return Fuse(FuseOptions(rules=("rotary",))).run(program, context_of(program, Path("unused")))


def doubled(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor, tokens: int = 1) -> torch.Tensor:
    """As diffusers writes it for FLUX and others; `tokens` is their dimension."""
    turned = apply_rotary_emb(x, (c, s), sequence_dim=tokens)  # type: ignore[arg-type]
    assert isinstance(turned, torch.Tensor)
    return turned


def pairs(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """As Wan writes it."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = even * c - odd * s
    out[..., 1::2] = even * s + odd * c
    return out


def slices(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Every second feature, terms and factors the other way round."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([c * even - s * odd, c * odd + s * even], -1).flatten(3)


BESIDE_HEADS = (COSINE[None, :, None], SINE[None, :, None])
LONGER = (BESIDE_HEADS[0].repeat(1, 2, 1, 1)[:, T - 1 :], BESIDE_HEADS[1].repeat(1, 2, 1, 1)[:, T - 1 :])
FORMS: dict[str, tuple[Callable, tuple[torch.Tensor, torch.Tensor], torch.Tensor, bool]] = {
    "FLUX": (doubled, DOUBLED, X, False),
    "CogVideoX": (lambda x, c, s: doubled(x, c, s, tokens=2), DOUBLED, X.transpose(1, 2).contiguous(), True),
    "Wan": (pairs, BESIDE_HEADS, X, False),
    "QwenImage": (
        lambda x, c, s: apply_rotary_emb_qwen(x, torch.complex(c, s), use_real=False),
        (COSINE, SINE),
        X,
        False,
    ),
    "slices": (slices, BESIDE_HEADS, X, False),
    "heads first": (pairs, (COSINE, SINE), X.transpose(1, 2).contiguous(), True),
    "a part of a longer table": (lambda x, c, s: slices(x, c[:, 1:], s[:, 1:]), LONGER, X, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_before_and_expected(form: str) -> None:
    function, tables, x, heads_first = FORMS[form]
    before = component(Rotated(function, *tables), x)
    result = fuse(before)
    assert operators(result.program.step) == ["mul.Tensor", FUSED, "add.Tensor"]
    assert (result.changed, result.refused) == (1, ())
    (node,) = [n for n in result.program.step.graph.graph.nodes if n.target is torch.ops.stepfold.rotary.default]
    assert [table.meta["shape"] for table in node.args[1:3]] == [(T, K // 2)] * 2 and node.args[3] is heads_first
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < EXACT
    assert fuse(result.program).identity
    verify(result.program)


def test_in_double_precision() -> None:
    """The rewrite itself has no error: what there is in float32 is rounding."""
    function, tables, x, _ = FORMS["FLUX"]
    before = component(Rotated(function, *tables), x).step
    after = fuse(component(Rotated(function, *tables), x)).program.step
    for stage in (before, after):
        stage.graph.double()
    wanted = before.graph(X.double())[0].numpy()
    assert wanted.dtype == np.float64
    np.testing.assert_allclose(after.graph(X.double())[0].numpy(), wanted, rtol=1e-13, atol=1e-13)


def test_equal_tables_are_stored_once() -> None:
    """Query and key, each with tables of its own that hold the same."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = (Rotated(doubled, *(table.clone() for table in DOUBLED)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.query(x) * self.key(x * 2)

    result = fuse(component(Both(), X))
    assert result.changed == 2
    assert [tuple(tensor.shape) for tensor in result.program.step.tensors().values()] == [(T, K // 2)] * 2


@pytest.mark.parametrize("form", ["FLUX", "CogVideoX"])
def test_one_operator_of_the_engine(form: str, tmp_path: Path) -> None:
    function, tables, x, _ = FORMS[form]
    stage = fuse(component(Rotated(function, *tables), x)).program.step
    file = lower(stage, tmp_path)
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert [kind for kind in kinds if kind != "Reshape"] == ["Mul", "RotaryEmbedding", "Add"]
    call = open_session(file, stage.inputs, stage.outputs, threads=1)
    for batch in (1, 3):
        feed = {"x": np.random.default_rng(batch).standard_normal((batch, *x.shape[1:])).astype(np.float32)}
        np.testing.assert_allclose(call(feed)[0], reference(stage)(feed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    """Tables are weights: they follow what they multiply."""
    function, tables, x, _ = FORMS["FLUX"]
    stage = fuse(component(Rotated(function, *tables), x)).program.step
    feed = {"x": x.numpy()}
    received = reference(at_precision(stage, dtype))(feed)[0]
    np.testing.assert_allclose(received, reference(stage)(feed)[0], atol=0.1)


NEAR: dict[str, tuple[Callable, tuple[torch.Tensor, torch.Tensor], str]] = {
    "computed tables": (lambda x, c, s: pairs(x, c * x[:1, :1, :1, :1], s), BESIDE_HEADS, "its tables are computed, not stored"),
    "tables for each head": (
        pairs,
        (COSINE[None, :, None].repeat(1, 1, H, 1), SINE[None, :, None].repeat(1, 1, H, 1)),
        "its tables differ between heads or samples",
    ),
    "one angle for all tokens": (pairs, (COSINE[:1], SINE[:1]), "its tables differ between heads or samples"),
    "two angles in a pair": (
        doubled,
        (torch.linspace(0, 1, T * K).reshape(T, K), DOUBLED[1]),
        "its tables differ within a pair of features",
    ),
    "tables of more digits": (slices, (BESIDE_HEADS[0].double(), BESIDE_HEADS[1].double()), "its tables are of another type"),
    "five dimensions": (
        lambda x, c, s: pairs(x[:, None], c, s)[:, 0],
        BESIDE_HEADS,
        "what it turns is not [B, T, H, K] or [B, H, T, K]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case: str) -> None:
    function, tables, reason = NEAR[case]
    before = component(Rotated(function, *tables), X)
    result = fuse(before)
    assert result.changed == 0 and [refusal.reason for refusal in result.refused] == [reason]
    assert operators(result.program.step) == operators(before.step)


OTHERWISE: dict[str, Callable] = {
    "the other direction": lambda x, c, s: _mixed(x, c, s, sign=-1),
    "another source": lambda x, c, s: _mixed(x, c, s, other=x.flip(1)),
    "halves of a head": lambda x, c, s: torch.cat(
        [x[..., : K // 2] * c - x[..., K // 2 :] * s, x[..., : K // 2] * s + x[..., K // 2 :] * c], -1
    ),
    "one table for both": lambda x, c, s: _mixed(x, c, s, imaginary=c),
}


def _mixed(
    x: torch.Tensor,
    c: torch.Tensor,
    s: torch.Tensor,
    sign: int = 1,
    other: torch.Tensor | None = None,
    imaginary: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nearly a rotation."""
    even, odd = x[..., 0::2], (x if other is None else other)[..., 1::2]
    last = even * (s if imaginary is None else imaginary)
    return torch.stack([even * c - odd * s, last + odd * c if sign > 0 else last - odd * c], -1).flatten(3)


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_no_rotation_does_not_begin(case: str) -> None:
    result = fuse(component(Rotated(OTHERWISE[case], *BESIDE_HEADS), X))
    assert (result.changed, result.refused) == (0, ())
