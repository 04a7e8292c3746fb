"""Operators that read of a tensor its shape or type only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import traced
from hoisting import assert_same_samples, hoist
from programs import denoiser

from stepfold.frontend.repairs.shapes_only import FilledLike, GivenLike
from stepfold.loop.ports import Rate

X, Y = torch.randn(2, 3, 4), torch.randn(2, 1, 4)
FORMS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], type]] = {
    "zeros_like": (lambda x, y: y + torch.zeros_like(x), FilledLike),
    "ones_like of a type": (lambda x, y: y + torch.ones_like(x, dtype=torch.int64), FilledLike),
    "full_like": (lambda x, y: y + torch.full_like(x, 2.5), FilledLike),
    "new_zeros": (lambda x, y: y + x.new_zeros(x.shape[0], 1, 4), FilledLike),
    "new_ones": (lambda x, y: y + x.new_ones(4), FilledLike),
    "new_full": (lambda x, y: y + x.new_full((3, 4), 2.5), FilledLike),
    "type_as": (lambda x, y: (2 * y).double().type_as(x), GivenLike),
    "expand_as": (lambda x, y: (2 * y).expand_as(x), GivenLike),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_read_of_a_tensor_is_written_out(name: str) -> None:
    function, repair = FORMS[name]
    before = traced(function, X, Y)
    wanted = before(X, Y)[0]
    assert len(repair().apply(before.graph).made) in (0, 1)  # export may have written it out itself
    before.graph.graph.eliminate_dead_code()
    before.propagate()
    x = before.graph.graph.find_nodes(op="placeholder")[0]
    assert all(user.target is torch.ops.aten.sym_size.int for user in x.users)
    three = [torch.cat([value, value[:1]]) for value in (X, Y)]
    torch.testing.assert_close(before(*three)[0], torch.cat([wanted, wanted[:1]]), rtol=0, atol=0)
    assert len(repair().apply(before.graph).made) == 0


def test_a_condition_is_hoisted_that_reads_the_shape_of_the_latent() -> None:
    """A mask of tokens and patches, as Z-Image has one."""

    def model(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x * t[:, None] + torch.sin(torch.cat([torch.ones_like(2 * x), c], dim=1)).mean(1, keepdim=True)

    program = denoiser(model, torch.randn(2, 4), torch.full((2,), 500.0), torch.randn(2, 3))
    result = hoist(program)
    (once,) = [stage for stage in result.program.stages if stage.rate is Rate.ONCE]
    assert [port.name for port in once.inputs] == ["c"]
    assert_same_samples(program, result.program)
