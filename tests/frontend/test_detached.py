"""Tables that a model writes through `Tensor.data` are part of its captured graph."""

from __future__ import annotations

import torch

from stepfold.frontend.capture import capture

POSITIONS = 4
WIDTH = 3


class WritesThroughData(torch.nn.Module):
    """Positions behind a row of zeros, as CogVideoX makes them for a size that is not that of its configuration."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(POSITIONS * WIDTH, dtype=torch.float32).reshape(POSITIONS, WIDTH).cos()
        table = positions.new_zeros(1, 1 + POSITIONS, WIDTH)
        table.data[:, 1:].copy_(positions)
        return sample + table


def test_a_write_through_data_is_captured() -> None:
    model = WritesThroughData()
    program = capture(model, {"sample": torch.zeros(2, 1 + POSITIONS, WIDTH)})
    sample = torch.randn(3, 1 + POSITIONS, WIDTH)
    assert torch.equal(program.stages[0].graph(sample)[0], model(sample))
