"""Sites by structure, on real classes and on small graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from graphs import traced
from zoo import ZooModel

from stepfold.ir.analysis.sites import Sites, find_sites
from stepfold.ir.analysis.sites.attention import find_attention
from stepfold.ir.analysis.sites.feed_forward import find_feed_forward
from stepfold.ir.analysis.sites.modulate import find_modulate
from stepfold.ir.analysis.sites.walk import LAYOUT, cone
from stepfold.ir.program import Program

Captured = Callable[[ZooModel], Program]

# linear, attention, feed_forward, modulate, block
COUNTS = {
    # a block: q k v out up down and the modulation; 1 patch projection is a convolution; 2 + 2 linears of output and
    # timestep embedding lie in the last norm and in each block
    "dit": (22, 2, 2, 5, 2),
    "sd3": (50, 4, 5, 13, 3),  # block 0 attends twice; the last block drops its text half
    "flux": (50, 4, 4, 11, 4),  # 2 double blocks with two feed-forwards each, 2 single ones
    "pixart": (26, 4, 3, 5, 2),  # self and cross attention; the caption projection is the third feed-forward
    "wan": (26, 4, 3, 5, 2),
    "unet": (50, 8, 4, 0, 6),
    "clip_text": (12, 2, 2, 0, 2),
    "t5_encoder": (14, 2, 2, 0, 2),
}


@pytest.mark.parametrize("model", [item for item in zoo.EACH if item.id in COUNTS])
def test_counts(model: ZooModel) -> None:
    sites = find_sites(model.program)
    assert tuple(sites.counts().values()) == COUNTS[model.name], sites.near_misses


@pytest.fixture(scope="module")
def reference(reference_program: Program) -> Sites:
    return find_sites(reference_program)


def test_reference_checkpoint(reference: Sites) -> None:
    counts = reference.counts()
    assert (counts["block"], counts["attention"], counts["feed_forward"], counts["modulate"]) == (8, 8, 8, 17)
    assert not reference.near_misses


def test_names_are_module_paths(reference: Sites) -> None:
    assert [site.name for site in reference.block] == [f"transformer_blocks.{i}" for i in range(8)]
    assert reference.attention[3].name == "transformer_blocks.3.attn1"
    assert reference.feed_forward[3].name == "transformer_blocks.3.ff.net"
    assert reference.modulate[0].name == "transformer_blocks.0.norm1.norm"
    assert "transformer_blocks.7.attn1.to_q" in {site.name for site in reference.linear}
    for kind in ("linear", "attention", "feed_forward", "modulate", "block"):
        names = [site.name for site in getattr(reference, kind)]
        assert len(set(names)) == len(names)


def test_parts_of_an_attention(reference: Sites) -> None:
    site = reference.attention[0]
    weights = {part: [str(linear.args[1].target) for linear in site.parts[part]] for part in ("q", "k", "v", "out")}
    assert weights == {
        part: [f"transformer_blocks.0.attn1.{name}.weight"]
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    }
    assert site.parts["sdpa"][0] in site.nodes and site.stage == "step"


@pytest.mark.slow
def test_joint_attention_has_two_linears_for_each() -> None:
    site = find_sites(zoo.FLUX.program).attention[0]
    assert [len(site.parts[part]) for part in ("q", "k", "v", "out")] == [2, 2, 2, 2]


@pytest.mark.slow
def test_sites_do_not_share_linears() -> None:
    """A linear belongs to one attention or one feed-forward."""
    for model in (zoo.SD3, zoo.FLUX, zoo.UNET):
        sites = find_sites(model.program)
        owned = [n for s in sites.attention for part in ("q", "k", "v", "out") for n in s.parts[part]]
        owned += [n for s in sites.feed_forward for part in ("up", "down") for n in s.parts[part]]
        assert len(set(owned)) == len(owned)


@pytest.mark.slow
def test_near_miss_of_flux_single_blocks() -> None:
    misses = [miss for miss in find_sites(zoo.FLUX.program).near_misses if miss.kind == "feed_forward"]
    assert [miss.name for miss in misses] == ["single_transformer_blocks.0", "single_transformer_blocks.1"]
    assert "it reads aten.scaled_dot_product_attention too" in misses[0].missing


class Parts(torch.nn.Module):
    """A few linears and a function of them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.c, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8, elementwise_affine=False)
        self.function = function

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.function(self, x, z)


X, Z = torch.randn(2, 3, 8), torch.randn(2, 8)
sdpa = torch.nn.functional.scaled_dot_product_attention
silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu


def written_out_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


FEED_FORWARDS = {
    "plain": lambda m, x, z: m.b(gelu(m.a(x))),
    "geglu": lambda m, x, z: m.b(torch.cat([h * gelu(g) for h, g in [m.a(x).chunk(2, -1)]] * 2, -1)),
    "swiglu": lambda m, x, z: m.c(silu(m.a(x)) * m.b(x)),
    "written_out": lambda m, x, z: m.b(written_out_gelu(m.a(x))),
}


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_feed_forward_forms(name: str) -> None:
    found = find_feed_forward(traced(Parts(FEED_FORWARDS[name]), X, Z).graph.graph)
    assert len(found.sites) == 1 and not found.near_misses
    assert len(found.sites[0].parts["up"]) == (2 if name == "swiglu" else 1)


def test_a_timestep_embedding_is_no_feed_forward() -> None:
    found = find_feed_forward(traced(Parts(lambda m, x, z: x + m.b(silu(m.a(z)))[:, None]), X, Z).graph.graph)
    assert not found.sites and not found.near_misses


NEAR_FEED_FORWARDS = {
    "residual": (
        lambda m, x, z: m.b(gelu(m.a(x)) + x),
        "a second linear that reads the activation alone: it reads input",
    ),
    "two_inputs": (lambda m, x, z: m.c(gelu(m.a(x)) * m.b(x * 2)), "they read different values"),
}


@pytest.mark.parametrize("name", NEAR_FEED_FORWARDS)
def test_feed_forward_near_misses(name: str) -> None:
    function, missing = NEAR_FEED_FORWARDS[name]
    found = find_feed_forward(traced(Parts(function), X, Z).graph.graph)
    assert not found.sites and missing in found.near_misses[0].missing


ATTENTION_NEAR_MISSES = {
    "key": (lambda m, x, z: sdpa(m.a(x), gelu(x), m.c(x)), "a linear that makes k: it comes from aten.gelu"),
    "query": (lambda m, x, z: sdpa(x, m.b(x), m.c(x)), "a linear that makes q: it comes from input"),
    "written_out": (
        lambda m, x, z: (m.a(x) @ m.b(x).transpose(1, 2) * 0.3).softmax(-1) @ m.c(x),
        "it is written out as matmul, softmax, matmul",
    ),
}


@pytest.mark.parametrize("name", ATTENTION_NEAR_MISSES)
def test_attention_near_misses(name: str) -> None:
    function, missing = ATTENTION_NEAR_MISSES[name]
    found = find_attention(traced(Parts(function), X, Z).graph.graph)
    assert not found.sites and missing in found.near_misses[0].missing


def test_a_rotary_embedding_written_in_place_is_passed() -> None:
    """CogView4 turns its image tokens only."""

    def function(m: Parts, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        query = m.a(x)
        query[:, 1:] = query[:, 1:] * 2
        return sdpa(query, m.b(x), m.c(x))

    found = find_attention(traced(Parts(function), X, Z).graph.graph)
    assert len(found.sites) == 1 and not found.near_misses


def test_modulate_parts() -> None:
    before = traced(Parts(lambda m, x, z: m.norm(x) * (1 + m.a(z))[:, None] + m.b(z)[:, None]), X, Z)
    site = find_modulate(before.graph.graph).sites[0]
    assert site.parts["scale"][0].target is torch.ops.aten.linear.default
    shift = site.parts["shift"][0]
    assert {str(node.args[1].target) for node in cone(shift, LAYOUT, ()).sources} == {"b.weight"}


MODULATE_NEAR_MISSES = {
    "no_shift": (lambda m, x, z: m.a(m.norm(x) * (1 + z[:, None])), "a shift: nothing is added to the product"),
    "no_one": (lambda m, x, z: m.norm(x) * z[:, None] + z[:, None], "(1 + scale): the factor is not one plus a value"),
}


@pytest.mark.parametrize("name", MODULATE_NEAR_MISSES)
def test_modulate_near_misses(name: str) -> None:
    function, missing = MODULATE_NEAR_MISSES[name]
    found = find_modulate(traced(Parts(function), X, Z).graph.graph)
    assert not found.sites and found.near_misses[0].missing == missing


def test_an_affine_norm_is_no_modulation() -> None:
    """Scale and shift that are weights belong to the norm."""
    weight = torch.randn(8)
    before = traced(Parts(lambda m, x, z: m.norm(x) * (1 + weight) + weight), X, Z)
    found = find_modulate(before.graph.graph)
    assert not found.sites and not found.near_misses
