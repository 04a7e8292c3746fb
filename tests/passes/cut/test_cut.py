"""Cut: the pieces of a network compute what the whole does, on the reference and on engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hoisting import hoist
from programs import component, context_of, denoiser, modulated, run, samples_of
from zoo import DIT, FLUX, SD3, UNET, ZooModel

from stepfold.ir.analysis.sites.block import find_blocks
from stepfold.ir.cost import program_flops, stage_flops
from stepfold.ir.cut import cut
from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program, Refusal
from stepfold.ir.variants import split
from stepfold.ir.verify import verify
from stepfold.loop.errors import UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.cut.cut import Cut, CutOptions
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.runtime.workshop import workshop

Captured = Callable[[ZooModel], Program]
EXACT, ON_ENGINES = 1e-5, 1e-4


def pieces_of(program: Program, *bodies: tuple[Any, Any]) -> PassResult:
    return Cut(CutOptions(bodies=bodies)).run(program, context_of(program, Path("unused")))


def names(program: Program) -> list[str]:
    return [slot.name for slot in program.computing]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(5), torch.nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.gelu(self.linear(self.norm(x) + shift))


class Chain(torch.nn.Module):
    """Five blocks between two layers; the shift of the blocks is of the timestep, the last layer reads the latent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.time = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5), torch.nn.Linear(1, 5)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h, shift = self.first(x), self.time(t[:, None] / 1000)[:, None]
        for block in self.blocks:
            h = block(h, shift)
        return self.last(h + 0.1 * x)


@pytest.fixture(scope="module")
def chain() -> Program:
    return hoist(denoiser(Chain(), torch.randn(2, 3, 5), torch.full((2,), 500.0), guided=False)).program


def test_one_body_by_default_is_all_but_the_first_and_the_last_block(chain: Program) -> None:
    made = Cut(CutOptions()).run(chain, context_of(chain, Path("unused")))
    verify(made.program)
    assert names(made.program) == ["step.head", "step.body", "step.tail"] and made.changed == 1
    linears = [
        sum(node.target is torch.ops.aten.linear.default for node in slot.original.graph.graph.nodes)
        for slot in made.program.computing
    ]
    assert linears == [2, 3, 2], "the first layer and block, three blocks, the last block and layer"
    assert drift(samples_of(made.program), samples_of(chain)) < EXACT
    assert program_flops(made.program) == program_flops(chain)


@pytest.mark.parametrize(
    ("bodies", "wanted"),
    [
        ([(0, 4)], ["head", "body", "tail"]),
        ([(1, 1), (3, 3)], ["head", "body_1", "between_1", "body_2", "tail"]),
        ([(0, 1), (2, 4)], ["head", "body_1", "between_1", "body_2", "tail"]),
        ([("blocks.1", "blocks.2")], ["head", "body", "tail"]),
    ],
)
def test_ranges_of_blocks(chain: Program, bodies: list[tuple[Any, Any]], wanted: list[str]) -> None:
    made = pieces_of(chain, *bodies).program
    verify(made)
    assert names(made) == [f"step.{name}" for name in wanted]
    assert outputs_drift(probe_outputs(made), probe_outputs(chain)) < EXACT


def test_a_body_returns_what_it_adds(chain: Program) -> None:
    """With the body left out, which adds nothing then, the blocks around it see each other."""
    made = pieces_of(chain, (1, 3)).program
    bound = made.bind()
    body = next(slot for slot in bound.slots if slot.name == "step.body")
    (added,) = body.outputs
    assert added.shape == (None, 3, 5)
    whole = chain.bind().evaluate({name: value.numpy() for name, value in chain.example.items()}, 0)[0]
    skipped = _evaluated(made, skip="step.body")
    rest = Chain()
    rest.blocks = torch.nn.ModuleList([rest.blocks[0], rest.blocks[4]])
    x, t = chain.example["x"], torch.full((2,), float(chain.recurrence.timesteps[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        np.testing.assert_allclose(skipped, rest(x, t).numpy(), rtol=1e-4, atol=1e-5)
    assert drift(skipped, whole) > 1e-2


def _evaluated(program: Program, skip: str) -> np.ndarray:
    """One evaluation with the outputs of a slot replaced by zeros."""

    def call(stage: Any) -> Any:
        from stepfold.ir.program import reference

        real = reference(stage)
        return (lambda values: [np.zeros_like(v) for v in real(values)]) if stage.name == skip else real

    inputs = {name: value.numpy() for name, value in program.example.items()}
    return program.bound_by(call).evaluate(inputs, 0)[0]


def test_weights_are_shared_with_the_whole(chain: Program) -> None:
    made = pieces_of(chain, (1, 3)).program
    whole = {tensor.data_ptr() for tensor in chain.step.tensors().values()}
    assert {tensor.data_ptr() for stage in made.steps for tensor in stage.tensors().values()} <= whole
    assert made.parameters() == chain.parameters()


@pytest.mark.slow
@pytest.mark.parametrize("model", [DIT, SD3, FLUX, UNET], ids=str)
def test_published_families(model: ZooModel) -> None:
    """Double streams, skip connections of a UNet, conditions of every rate."""
    program = hoist(model.program).program
    blocks = find_blocks(program.step.graph.graph).sites
    made = pieces_of(program, (1, max(1, len(blocks) - 2))).program
    verify(made)
    assert outputs_drift(probe_outputs(made), probe_outputs(program)) < EXACT
    counted = [stage_flops(stage) for stage in made.steps]
    assert sum(counted) == stage_flops(program.step) and min(counted) > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("model", [DIT, SD3, UNET], ids=str)
def test_engines_compute_the_pieces(model: ZooModel, backend: str) -> None:
    program = hoist(model.program).program
    blocks = find_blocks(program.step.graph.graph).sites
    made = pieces_of(program, (1, max(1, len(blocks) - 2))).program
    with workshop(backend) as shop:
        assert drift(samples_of(made, shop.open(made), 2), samples_of(program, count=2)) < ON_ENGINES


def test_layers_of_all_pieces_are_quantized(chain: Program) -> None:
    """As they are in the whole: the same layers, the same codes, and the last one left alone."""
    settings = QuantizeOptions(min_tokens=1)
    whole, cut_first = (
        Quantize(settings).run(program, context_of(program, Path("unused")))
        for program in (chain, pieces_of(chain, (1, 3)).program)
    )
    assert cut_first.details["sites"] == whole.details["sites"] and whole.changed == 6
    assert [r.site for r in cut_first.refused] == [r.site for r in whole.refused] == ["last"]
    assert drift(samples_of(cut_first.program), samples_of(whole.program)) < 1e-3


def test_a_second_cut_changes_nothing(chain: Program) -> None:
    result = run(chain, Cut(CutOptions()), Cut(CutOptions()))
    assert [record.outcome for record in result.records] == ["changed", "identity"]


def test_a_second_cut_into_other_bodies_is_refused(chain: Program) -> None:
    once = pieces_of(chain, (1, 1), (3, 3)).program
    assert pieces_of(once, ("blocks.1", "blocks.1"), (3, 3)).identity
    with pytest.raises(UsageError, match=r"the bodies of the cut before it, .*blocks\.1.*; received .*blocks\.2"):
        pieces_of(once, (1, 2))


class Crossed(Chain):
    """The second block reads what the fourth computes."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.blocks[3](self.first(x), t[:, None, None])
        return self.last(self.blocks[2](self.blocks[0](h, h), h))


def test_bodies_that_are_not_in_order_are_refused() -> None:
    program = denoiser(Crossed(), torch.randn(2, 3, 5), torch.full((2,), 500.0), guided=False)
    late, early = (
        [node for site in find_blocks(program.step.graph.graph).sites if site.name == name for node in site.nodes]
        for name in ("blocks.2", "blocks.3")
    )
    refused = cut(program, [late, early])
    assert isinstance(refused, Refusal) and "blocks" in refused.site


BAD: dict[str, list[tuple[Any, Any]]] = {
    r"expected numbers of the 5 blocks, blocks\.0 to blocks\.4; received 5": [(1, 5)],
    r"received -6": [(-6, 2)],
    r"the model has no block 'blocks\.7'; did you mean": [("blocks.7", 2)],
    r"ranges of the blocks .* in their order \(5 blocks\).*received \[3, 1\]": [(3, 1)],
    r"received \[2, 3\], which is none after block 2": [(1, 2), (2, 3)],
}


@pytest.mark.parametrize("message", BAD)
def test_ranges_that_are_none(chain: Program, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pieces_of(chain, *BAD[message])


def test_a_network_without_blocks_or_loop(chain: Program) -> None:
    operation = Cut(CutOptions())
    assert operation.not_applicable(modulated()) == "the program has no repeated blocks"
    assert operation.not_applicable(component(torch.nn.Linear(4, 4), torch.randn(2, 4))) == "the program has no loop"
    with pytest.raises(UsageError, match="Put cut before quantize"):
        operation.requires(split(chain, range(1)))
    with pytest.raises(UsageError, match="Put hoist before cut"):
        run(chain, Cut(CutOptions()), hoist_pass())


def hoist_pass() -> Any:
    from stepfold.passes.hoist.hoist import Hoist, HoistOptions

    return Hoist(HoistOptions())
