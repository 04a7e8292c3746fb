"""The latent in the order of the denoiser, where a pipeline hands its scheduler the same numbers in another."""

from __future__ import annotations

import torch

from stepfold.frontend.arrangement import arranged
from stepfold.frontend.recorder import Call, Step

B, C, F, H, W = 2, 3, 4, 5, 6


def recorded(x: torch.Tensor, sample: torch.Tensor) -> Step:
    """A step whose denoiser gets half of the latent [B, ...] in two branches, and a text besides."""
    arguments = {"text": torch.randn(2 * B, 7, 8), "x": 0.5 * torch.cat([x, x]), "t": torch.ones(2 * B)}
    call = Call(arguments, torch.randn(2 * B, *x.shape[1:]))
    return Step([call], 1.0, sample + 1, sample, {}, sample + 2)


def test_frames_in_the_rows_become_an_axis() -> None:
    x = torch.randn(B, C, F, H, W)
    rows = x.transpose(1, 2).reshape(B * F, C, H, W)  # as TextToVideoSDPipeline gives them to its scheduler
    found = arranged(recorded(x, rows), B)
    for name, offset in (("sample", 0), ("guided", 1), ("result", 2)):
        torch.testing.assert_close(getattr(found, name), x + offset)


def test_an_axis_of_one_frame_comes_back() -> None:
    x = torch.randn(B, C, 1, H, W)  # as ZImagePipeline gives them to its denoiser
    found = arranged(recorded(x, x.squeeze(2)), B)
    torch.testing.assert_close(found.sample, x)


def test_what_does_not_follow_the_latent_is_left_alone() -> None:
    x = torch.randn(B, C, F, H, W)
    shuffled = x.transpose(1, 2).reshape(B * F, C, H, W).flip(1)
    for step in (recorded(x, shuffled), recorded(x, x), Step(sample=x)):
        assert arranged(step, B) is step
