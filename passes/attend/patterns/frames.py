"""The query's own frames and some frames that all queries read."""

from __future__ import annotations

import torch

from ....loop.errors import UsageError
from .pattern import Pattern, Place


class Frames(Pattern):
    """The tiles of the same frames, and those of frames spread evenly over the video."""

    name = "frames"
    source = "Efficient-vDiT, arXiv 2502.06155, section 3: the diagonal and reference frames of the attention tile"

    def kept(self, place: Place) -> torch.Tensor:
        """The own frame, and as many others as the share allows."""
        frames, height, width = place.tiles.counts
        of_frame, several = height * width, place.most // (height * width)
        if frames < 2 or several < 1:
            raise UsageError(
                f"pass sparsify_attention: pattern 'frames': expected a video, and a share of at least one of its {frames} "
                f"groups of frames; received {place.keep:g}. Choose the pattern window."
            )
        rows = []
        for own in range(frames):
            others = [frame for frame in _spread(frames, several) if frame != own]
            chosen = sorted([own, *others][:several])
            rows.append(torch.cat([torch.arange(of_frame) + frame * of_frame for frame in chosen]))
        return torch.stack(rows).repeat_interleave(of_frame, dim=0)[None]


def _spread(frames: int, several: int) -> list[int]:
    """More than enough frames, the most even choice first."""
    first = [round(i * (frames - 1) / max(1, several - 1)) for i in range(several)]
    return list(dict.fromkeys([*first, *range(frames)]))
