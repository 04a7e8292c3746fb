"""A small denoiser to calibrate: what its layers read is known, and collecting takes a moment."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from programs import denoiser

from stepfold.calibration.plan import Settings
from stepfold.calibration.run import Outcome, calibrate, prepare
from stepfold.ir.program import Program

Array = np.ndarray
TOKENS, WIDTH, INNER = 3, 5, 7
CALLS = 4
SHARDS = 3  # of 20 samples


class Network(torch.nn.Module):
    """y = second(tanh(first(x))) + third(x) + time(t / 1000) + c / 10; x [B, 3, 5] is read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(WIDTH, INNER)
        self.second = torch.nn.Linear(INNER, WIDTH)
        self.third = torch.nn.Linear(WIDTH, WIDTH)
        self.time = torch.nn.Linear(1, WIDTH)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, 3, 5], t [B], c [B] -> [B, 3, 5]."""
        inner = torch.tanh(self.first(x + 0.1 * c[:, None, None]))
        return self.second(inner) + self.third(x) + self.time(t[:, None] / 1000)[:, None]


def network_program(module: torch.nn.Module | None = None, **more: Any) -> Program:
    """The program of a network: four guided Euler calls."""
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return denoiser(module or Network(), x, torch.full((2,), 500.0), torch.arange(2), **more)


@cache
def standard() -> Program:
    """The program of `Network`, captured once."""
    return network_program()


def silent(task: str, done: int, total: int) -> None:
    """Report to nobody."""


def calibrated(program: Program, out: Path, samples: int | None = 20, **settings: Any) -> Outcome:
    """Calibrate a program in this process."""
    return calibrate(prepare(program, Settings(samples=samples, **settings)), out, silent)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
