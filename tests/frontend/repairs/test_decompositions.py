"""What needs no repair because the capture never decomposes it."""

import torch
from graphs import traced


def test_linspace_stays_exact() -> None:
    """The default decomposition moves rotary angles by 5e-5."""
    before = traced(lambda x: x * torch.linspace(0, 1000, 7).cos(), torch.randn(2, 7))
    assert "linspace.default" in before.calls()
    x = torch.randn(3, 7)
    torch.testing.assert_close(before(x)[0], x * torch.linspace(0, 1000, 7).cos(), rtol=0, atol=0)


def test_group_norm_of_a_permuted_tensor_stays_whole() -> None:
    """The default decomposition raises on it."""
    norm = torch.nn.GroupNorm(2, 4)

    class Permuted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.permute(0, 2, 1))

    before = traced(Permuted(), torch.randn(2, 5, 4))
    assert "group_norm.default" in before.calls()
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(before(x)[0], norm(x.permute(0, 2, 1)), rtol=0, atol=0)
