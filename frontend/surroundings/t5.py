"""T5 and UMT5 as the only text encoder of a pipeline."""

from __future__ import annotations

import torch


class T5Conditions(torch.nn.Module):
    """Token numbers [B, T] -> `encoder_hidden_states` [B, T, C], and `encoder_attention_mask` [B, T] where it is asked."""

    def __init__(
        self,
        encoder: torch.nn.Module,
        *,
        reads_mask: bool = True,
        zeroed: bool = False,
        mask: torch.dtype | None = None,
    ):
        """Say what a pipeline makes of the encoder.

        Args:
            encoder: T5.
            reads_mask: whether it is told which tokens are padding.
            zeroed: whether zeros stand in the place of padding.
            mask: dtype of the mask that the denoiser is given; None where it is given none.
        """
        super().__init__()
        self.encoder = encoder
        self.reads_mask, self.zeroed, self.mask = reads_mask, zeroed, mask

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The conditions by name."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask if self.reads_mask else None)[0]
        if self.zeroed and attention_mask is not None:
            hidden = hidden.masked_fill(attention_mask[:, :, None] == 0, 0.0)
        if self.mask is None or attention_mask is None:
            return {"encoder_hidden_states": hidden}
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": attention_mask.clone().to(self.mask)}
