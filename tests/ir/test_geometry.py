"""Where the tokens of an attention lie, found by trying."""

from __future__ import annotations

import pytest
import torch
from programs import denoiser
from torch import nn
from zoo import DIT, FLUX, HUNYUANVIDEO, PIXART, SD3, WAN, ZooModel

from stepfold.ir.analysis.geometry import Geometry, Grid, find_geometries
from stepfold.ir.names import module_path
from stepfold.ir.program import Program

FAMILIES: list[tuple[ZooModel, Grid | None, dict[str, Geometry]]] = [
    (
        SD3,
        None,
        {
            "transformer_blocks.0.attn": Geometry((1, 4, 4), 0, 22),
            "transformer_blocks.0.attn2": Geometry((1, 4, 4), 0, 16),
        },
    ),
    (
        FLUX,
        (1, 4, 4),
        {
            "transformer_blocks.0.attn": Geometry((1, 4, 4), 6, 22),
            "single_transformer_blocks.1.attn": Geometry((1, 4, 4), 6, 22),
        },
    ),
    (PIXART, None, {"transformer_blocks.1.attn1": Geometry((1, 4, 4), 0, 16)}),
    (WAN, None, {"blocks.1.attn1": Geometry((2, 4, 4), 0, 32)}),
    (HUNYUANVIDEO, None, {"single_transformer_blocks.0.attn": Geometry((2, 4, 4), 0, 38)}),
]
REFUSED = {
    "transformer_blocks.0.attn2": "it has 16 queries and 6 keys",
    "blocks.0.attn2": "it has 32 queries and 6 keys",
    "context_embedder.token_refiner.refiner_blocks.0.attn": "none of its tokens depends on the latent",
}


def found(program: Program, grid: Grid | None = None) -> dict[str, Geometry | str]:
    return {module_path(node): geometry for node, geometry in find_geometries(program, grid).items()}


def test_a_dit() -> None:
    received = found(DIT.program)
    assert list(received.values()) == [Geometry((1, 4, 4), 0, 16)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "grid", "wanted"), FAMILIES, ids=lambda value: str(value) if isinstance(value, ZooModel) else ""
)
def test_families(model: ZooModel, grid: Grid | None, wanted: dict[str, Geometry]) -> None:
    received = found(model.program, grid)
    assert wanted.items() <= received.items()
    assert all(
        isinstance(value, Geometry) or REFUSED[name] == value for name, value in received.items() if name in REFUSED
    )


class Attending(nn.Module):
    """One attention over patches of 2 by 2 of a latent [B, 3, 4, 8], and 3 words behind or in front of them."""

    def __init__(self, text_first: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.words = nn.Parameter(torch.randn(1, 3, 8))
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 12)
        self.text_first = text_first

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        image, text = self.tokens(x), self.words.expand(x.shape[0], -1, -1)
        parts = (text, image) if self.text_first else (image, text)
        h = torch.cat(parts, dim=1)
        h = h + self.attend(h)
        h = h[:, 3:] if self.text_first else h[:, :8]
        pixels = self.out(h).unflatten(1, (2, 4)).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(x.shape) + 0 * t[:, None, None, None]


class ByColumns(Attending):
    """Its tokens go down the columns."""

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x).transpose(2, 3).flatten(2).transpose(1, 2)


class Mixing(Attending):
    """A convolution over tokens mixes neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(x)).flatten(2).transpose(1, 2)


class Scattered(Attending):
    """Words stand between the tokens of the image."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        image, text = self.tokens(x), self.words.expand(x.shape[0], -1, -1)
        h = torch.cat((image[:, :4], text, image[:, 4:]), dim=1)
        h = (h + self.attend(h))[:, :8]
        pixels = self.out(h).unflatten(1, (2, 4)).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(x.shape) + 0 * t[:, None, None, None]


def program_of(model: nn.Module) -> Program:
    return denoiser(model, torch.randn(2, 3, 4, 8), torch.full((2,), 500.0), guided=False)


@pytest.mark.parametrize(("first", "start"), [(True, 3), (False, 0)])
def test_text_in_front_or_behind(first: bool, start: int) -> None:
    assert list(found(program_of(Attending(first))).values()) == [Geometry((1, 2, 4), start, 11)]


@pytest.mark.parametrize(
    ("model", "grid", "reason"),
    [
        (ByColumns(), None, "its tokens are not those of a grid in order, or an operator mixes neighbours"),
        (Mixing(), None, "its tokens are not those of a grid in order, or an operator mixes neighbours"),
        (Scattered(), None, "the tokens of the image do not follow each other"),
        (Attending(), (1, 3, 3), "the grid [1, 3, 3] has 9 tokens, and the image has 8"),
        (Attending(), (1, 4, 2), "its tokens are not those of a grid in order, or an operator mixes neighbours"),
    ],
    ids=["columns", "neighbours", "scattered", "another grid", "another shape"],
)
def test_what_no_grid_explains(model: nn.Module, grid: Grid | None, reason: str) -> None:
    assert list(found(program_of(model), grid).values()) == [reason]
