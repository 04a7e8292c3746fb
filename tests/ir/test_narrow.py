"""Coupling groups and narrowing: what belongs together, what is refused, and that a narrowed program is a masked one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hoisting import hoist
from narrowing import EXACT, masked, some
from programs import component, denoiser
from torch import nn
from zoo import DIT, FLUX, PIXART, SD3, UNET, ZooModel

from stepfold.ir.analysis.channels import Channels, find_channels
from stepfold.ir.cost import program_flops
from stepfold.ir.narrow import narrow
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program
from stepfold.ir.verify import verify
from stepfold.loop.errors import UsageError

F = nn.functional
D, HIDDEN, H, K = 8, 10, 3, 4


class Plain(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, up: int = HIDDEN, down: int = HIDDEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, up), nn.Linear(down, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Geglu(Plain):
    """Both halves in one layer."""

    def __init__(self) -> None:
        super().__init__(up=2 * HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return x + self.down(value * F.gelu(gate))


class Swiglu(Plain):
    """A layer for each half; channels are scaled by a weight of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.scale = nn.Linear(D, HIDDEN, bias=False), nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x) * F.silu(self.gate(x)) * self.scale)


class Attention(nn.Module):
    """Query, key and value in one layer, with norms and a rotation of pairs within each head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(D, 3 * H * K), nn.Linear(H * K, D)
        self.norm = nn.RMSNorm(K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4).unbind(0)
        turned = [torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2) for part in (q, k)]
        q, k = (self.norm(part + 0.5 * other) for part, other in zip((q, k), turned, strict=True))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shared(Attention):
    """Three heads of queries, one of keys and values: all of them are one unit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, K)).transpose(1, 2) for part in self.qkv(x)[..., : 5 * K].split((12, 4, 4), -1)
        )
        return x + self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Heads and hidden channels that one layer reads, as the single blocks of FLUX have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.up, self.out = nn.Linear(D, 3 * H * K), nn.Linear(D, HIDDEN), nn.Linear(H * K + HIDDEN, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (H, K)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([heads, F.gelu(self.up(x))], dim=2))


def program_of(model: nn.Module) -> Program:
    return component(model, torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)))


def assert_narrows(program: Program, share: float = 0.6) -> tuple[Channels, Program]:
    """All kept is the same, some kept is the masked program, and the units that remain are found again."""
    channels = find_channels(program)
    whole = {group.name: range(len(group.units)) for group in channels.groups}
    assert narrow(program, whole) is program
    keep = some(channels, share)
    made = narrow(program, keep, channels)
    verify(made)
    expected = probe_outputs(masked(program, channels, keep))
    assert outputs_drift(probe_outputs(made), expected) < EXACT
    assert outputs_drift(expected, probe_outputs(program)) > 1e-3, "the removed units matter"
    assert {group.name: len(group.units) for group in find_channels(made).groups} == {
        name: len(kept) for name, kept in keep.items() if len(kept) > 1
    }
    return channels, made


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (Plain, {"up": [(6, D), (6,)], "down": [(D, 6)]}),
        (Geglu, {"up": [(12, D), (12,)], "down": [(D, 6)]}),
        (Swiglu, {"up": [(6, D), (6,)], "down": [(D, 6)], "gate": [(6, D)], "scale": [(6,)]}),
    ],
)
def test_hidden_channels(model: Callable[[], nn.Module], sizes: dict[str, list[tuple[int, ...]]]) -> None:
    channels, made = assert_narrows(program_of(model()))
    (group,) = channels.groups
    assert (group.kind, len(group.units), channels.refused) == ("hidden", HIDDEN, ())
    for name, wanted in sizes.items():
        found = {tuple(tensor.shape) for target, tensor in made.stages[0].tensors().items() if target.startswith(name)}
        assert found - {(D,)} == set(wanted), name


def test_both_halves_of_a_unit_are_coupled() -> None:
    (group,) = find_channels(program_of(Geglu())).groups
    (writer,), (reader,) = group.writers, group.readers
    assert group.rows(writer).tolist() == [*range(HIDDEN), *range(HIDDEN)]
    assert group.columns(reader).tolist() == [*range(HIDDEN)]


def test_heads_of_a_fused_projection() -> None:
    channels, made = assert_narrows(program_of(Attention()))
    (group,) = channels.groups
    assert (group.kind, len(group.units)) == ("heads", H)
    assert group.rows(group.writers[0]).tolist() == [unit for _ in range(3) for unit in range(H) for _ in range(K)]
    tensors = made.stages[0].tensors()
    assert tuple(tensors["qkv.weight"].shape) == (3 * K, D) and tuple(tensors["out.weight"].shape) == (D, K)
    assert tuple(tensors["norm.weight"].shape) == (K,), "what all heads share stays"


def test_one_layer_reads_two_groups() -> None:
    channels, _ = assert_narrows(program_of(Fused()))
    assert sorted((group.kind, len(group.units)) for group in channels.groups) == [("heads", H), ("hidden", HIDDEN)]
    hidden = next(group for group in channels.groups if group.kind == "hidden")
    assert hidden.columns(hidden.readers[0]).tolist() == [-1] * (H * K) + [*range(HIDDEN)]


class Gated(nn.Module):
    """Hidden channels are scaled by the timestep; keys and values come from a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.up, self.down = nn.Linear(1, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, H * K) for _ in range(4))
        self.out = nn.Linear(H * K, D)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(y).unflatten(-1, (H, K)).transpose(1, 2) for f, y in ((self.q, x), (self.k, c), (self.v, c)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)) * self.time(t[:, None] / 1000)[:, None])


def test_ports_and_tables_of_hoisted_stages() -> None:
    """Keys and values of a condition are made once a request, the scale of each channel lies in a table."""
    x, c = torch.randn(2, 5, D), torch.randn(2, 4, D)
    program = hoist(denoiser(Gated(), x, torch.full((2,), 500.0), c, guided=False)).program
    (table,) = program.tables.values()
    channels, made = assert_narrows(program)
    assert sorted((group.kind, len(group.units)) for group in channels.groups) == [("heads", H), ("hidden", HIDDEN)]
    (narrower,) = made.tables.values()
    assert (table.shape[-1], narrower.shape[-1]) == (HIDDEN, 6)
    once = {str(port) for stage in made.stages for port in stage.outputs if stage.name == "once"}
    assert all(str(K) in port and str(H * K) not in port for port in once) and len(once) == 2


class Normed(Plain):
    """A norm over the hidden channels changes with each of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.layer_norm(F.gelu(self.up(x)), (HIDDEN,)))


class Mixed(Plain):
    """An operator that mixes channels in a way nobody follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)).cumsum(-1))


class Returned(Plain):
    """The hidden channels are an output too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.gelu(self.up(x))
        return self.down(hidden), hidden


class Added(Plain):
    """A residual of unknown origin reaches the hidden channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)) + x.repeat(1, 1, 2)[..., :HIDDEN])


class Tied(Plain):
    """The weight after the activation is that before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(self.up(x)), self.up.weight.t())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            Normed,
            "at layer_norm: it holds a single unit, or all as one|at linear: it holds a single unit, or all as one",
        ),
        (Mixed, "at cumsum: channels cannot be followed through aten.cumsum"),
        (Returned, "at gelu: the program returns it as y1"),
        (Added, "which no linear layer writes"),
        (Shared, "at .*: it holds a single unit, or all as one"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_node(model: Callable[[], nn.Module], reason: str) -> None:
    channels = find_channels(program_of(model()))
    (refusal,) = channels.refused
    assert channels.groups == () and re.search(reason, refusal.reason), refusal


def test_a_computed_weight_has_no_units() -> None:
    assert find_channels(program_of(Tied())).groups == ()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"ups": [0]}, r"expected the name of a group of channels; received 'ups'"),
        ({"": []}, r"expected some of its units, 0 to 9; received \[\]\. A layer cannot be left empty"),
        ({"": [10]}, r"expected some of its units, 0 to 9; received \[10\]"),
    ],
)
def test_units_that_are_none(keep: dict[str, list[int]], message: str) -> None:
    program = program_of(Plain())
    (group,) = find_channels(program).groups
    with pytest.raises(UsageError, match=message):
        narrow(program, {name or group.name: kept for name, kept in keep.items()})


def test_the_program_is_left_alone() -> None:
    program = program_of(Plain())
    before = {name: tensor.clone() for name, tensor in program.stages[0].tensors().items()}
    narrow(program, some(find_channels(program)))
    assert all(torch.equal(before[name], tensor) for name, tensor in program.stages[0].tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("hoisted", [False, True], ids=["plain", "hoisted"])
@pytest.mark.parametrize("model", [DIT, SD3, FLUX, PIXART, UNET], ids=str)
def test_published_families(model: ZooModel, hoisted: bool) -> None:
    """Joint blocks, double and single streams, masks for each head, GEGLU between convolutions."""
    program = hoist(model.program).program if hoisted else model.program
    channels, made = assert_narrows(program)
    assert channels.refused == () and {group.kind for group in channels.groups} == {"hidden", "heads"}
    assert program_flops(made) < program_flops(program)


@pytest.mark.slow
def test_the_reference_checkpoint(reference_program: Program) -> None:
    program = hoist(reference_program).program
    channels, _ = assert_narrows(program, share=0.75)
    kinds = [group.kind for group in channels.groups]
    assert kinds.count("hidden") == kinds.count("heads") > 1
