"""Z-Image: a list with a latent for each sample and one with a prompt for each, cut to its own length.

The model pads a prompt to a multiple of 32 tokens, patches too, and the place of the patches is behind that. So with
prompts in one tensor [B, T, K], the tokens of a row count up to the next multiple of 32 behind its last one, and the
position of its patches depends on its mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Array = torch.Tensor
MULTIPLE = 32  # tokens; the SEQ_MULTI_OF of diffusers


def arguments(given: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The lists of a call as tensors: `x` [B, C, F, H, W], `cap_feats` [B, T, K] and `cap_feats_mask` [B, T].

    Args:
        given: arguments of the model's forward.
        tokens: number of tokens that a prompt may have.
    """
    x = given.get("x")
    if not isinstance(x, list) or isinstance(x[0], list):  # tensors already; or with images for each sample
        return dict(given)
    prompts: list[Array] = list(given["cap_feats"])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    T = _multiple(max(tokens, int(lengths.max())))
    padded = pad_sequence([*prompts, prompts[0].new_zeros(T, prompts[0].shape[1])], batch_first=True)[:-1]
    mask = torch.arange(T) < lengths[:, None]
    return {**given, "x": torch.stack(x), "cap_feats": padded, "cap_feats_mask": mask}


def forward(
    model: Any,
    x: Array,
    t: Array,
    cap_feats: Array,
    cap_feats_mask: Array,
    patch_size: int = 2,
    f_patch_size: int = 1,
    return_dict: bool = False,
    joint_attention_kwargs: Any = None,
) -> tuple[Array]:
    """What the model computes of latents and prompts.

    Args:
        model: a `ZImageTransformer2DModel`.
        x: [B, C, F, H, W] latents.
        t: [B] in 0 to 1.
        cap_feats: [B, T, K] embeddings of the prompts' tokens, T a multiple of 32.
        cap_feats_mask: [B, T] true for the tokens that a prompt has, which come first.
        patch_size: patch of height and width.
        f_patch_size: patch of frames.
        return_dict: is ignored.
        joint_attention_kwargs: is ignored; it scales adapters.
    """
    del return_dict, joint_attention_kwargs
    B, _, *sizes = x.shape
    patches = (f_patch_size, patch_size, patch_size)
    grid = [size // patch for size, patch in zip(sizes, patches, strict=True)]
    behind = (cap_feats_mask.sum(1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE  # [B]
    kind, times = f"{patch_size}-{f_patch_size}", model.t_embedder(t * model.t_scale).type_as(x)
    image, image_rotary = _image(model, x, kind, grid, patches, behind)
    for layer in model.noise_refiner:
        image = layer(image, None, image_rotary, times)
    text, text_rotary, present = _text(model, cap_feats, cap_feats_mask, behind)
    for layer in model.context_refiner:
        text = layer(text, present, text_rotary)
    both = torch.cat([image, text], dim=1)
    mask = torch.cat([torch.ones_like(image[..., 0], dtype=torch.bool), present], dim=1)
    rotary = torch.cat([image_rotary, text_rotary], dim=1)
    for layer in model.layers:
        both = layer(both, mask, rotary, times)
    N = grid[0] * grid[1] * grid[2]
    made = model.all_final_layer[kind](both, c=times)[:, :N].reshape(B, *grid, *patches, model.out_channels)
    return (made.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, model.out_channels, *sizes),)


def _image(
    model: Any, x: Array, kind: str, grid: list[int], patches: tuple[int, int, int], behind: Array
) -> tuple[Array, Array]:
    """Patches [B, N, D] of latents, padded, and their rotary embedding [B, N, d / 2]."""
    B, C = x.shape[:2]
    (F, H, W), (f, h, w) = grid, patches
    rows = x.reshape(B, C, F, f, H, h, W, w).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, F * H * W, f * h * w * C)
    embedded = model.all_x_embedder[kind](rows)
    padding = _multiple(F * H * W) - F * H * W
    padded = torch.cat([embedded, model.x_pad_token.expand(B, padding, -1)], dim=1)
    place = torch.nn.functional.pad(_places(F, H, W), (0, 0, 0, padding))  # what is padded stands at 0, 0, 0
    real = torch.arange(len(place)) < F * H * W
    first = place[:, 0] + torch.where(real, behind[:, None] + 1, 0)  # [B, N]
    return padded, _rotary(model, [first, place[:, 1].expand(B, -1), place[:, 2].expand(B, -1)])


def _text(model: Any, embeddings: Array, mask: Array, behind: Array) -> tuple[Array, Array, Array]:
    """Tokens [B, T, D], their rotary embedding [B, T, d / 2] and which of them a row has [B, T]."""
    B, T, _ = embeddings.shape
    tokens = torch.where(mask[..., None].bool(), model.cap_embedder(embeddings), model.cap_pad_token)
    place = torch.arange(T)
    nowhere, last = torch.zeros_like(place), model.axes_lens[0] - 1  # no prompt of the model reaches beyond
    rotary = _rotary(model, [values.expand(B, -1) for values in ((place + 1).clamp(max=last), nowhere, nowhere)])
    return tokens, rotary, place < behind[:, None]


def _rotary(model: Any, places: list[Array]) -> Array:
    """Complex factors [B, N, d / 2] of places [B, N] on each of three axes; in real numbers up to the last operator."""
    embedder = model.rope_embedder
    tables = embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, theta=embedder.theta)
    factors = [torch.view_as_real(table)[place] for table, place in zip(tables, places, strict=True)]
    return torch.view_as_complex(torch.cat(factors, dim=2))


def _places(F: int, H: int, W: int) -> Array:
    """[F H W, 3]: frame, row and column of each patch."""
    return torch.stack(torch.meshgrid(torch.arange(F), torch.arange(H), torch.arange(W), indexing="ij"), -1).flatten(
        0, 2
    )


def _multiple(count: int) -> int:
    """The next multiple of 32."""
    return -(-count // MULTIPLE) * MULTIPLE
