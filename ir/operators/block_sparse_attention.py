"""Attention in which each block of queries reads some blocks of keys, and all of a text beside them."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from .record import Arguments, operator

CHUNK_BYTES = 128 << 20
"""Logits of one sample that are held at once, in float32; the blocks of queries are taken in as many turns as that needs."""


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _flops(node: fx.Node) -> int:
    query, _, value, order, _, kept = (argument.meta["val"].shape for argument in node.args[:6])  # type: ignore[union-attr]
    B, H, T, K = query
    image, block = order[0], node.args[8]
    text = T - image
    pairs = image * (kept[2] * block + text) + text * T
    return 2 * B * H * pairs * (K + value[3])


def _examples() -> list[Arguments]:
    found = list[Arguments]()
    for text, start, groups, masked in ((0, 0, 1, False), (3, 3, 1, False), (3, 0, 2, True)):
        query, key, value = (torch.randn(2, 2, 16 + text, 8) for _ in range(3))
        order = torch.randperm(16)
        kept = torch.stack([torch.randperm(4)[:2] for _ in range(groups * 4)]).reshape(groups, 4, 2)
        mask = torch.rand(2, 1, 1, 16 + text) > 0.2 if masked else None
        found.append((query, key, value, order, order.argsort(), kept, mask, start, 4, 8**-0.5))
    return found


@operator(shape=_shape, examples=_examples, flops=_flops)
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    kept: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    block: int,
    scale: float,
) -> torch.Tensor:
    """`softmax(scale q k' + mask) v`, where the mask leaves out the blocks of keys that `kept` does not name.

    Of T tokens, I are those of an image, one after the other from `start` on, and the others are text. A query of the image
    reads the keys of its blocks and of the whole text; a query of the text reads everything. Blocks are runs of `block` tokens
    in the order that `order` brings the image into, such as that of tiles. The form of STA (arXiv 2502.04507) and of
    DraftAttention (arXiv 2505.14708) in standard operators: the keys of a block of queries are gathered, and what remains is
    one small dense attention for each block.

    Args:
        query: [B, H, T, K].
        key: [B, H, T, K].
        value: [B, H, T, V].
        order: [I] int64; image token that stands at each place of the blocks.
        inverse: [I] int64; place of each image token.
        kept: [G, I / block, m] int64; m blocks of keys that each block of queries reads, each at most once. G is 1 where
            all heads read the same, or H.
        mask: [B, 1, 1, T] which keys may be read at all, such as those of words that are no padding: False leaves a key out,
            numbers are added to the logits; None for all.
        start: place of the first image token; 0, or the length of a text in front.
        block: tokens of a block.
        scale: multiplies the logits.

    Returns:
        [B, H, T, V].
    """
    image = order.shape[0]
    outside = slice(0, start) if start else slice(image, None)
    blocks = [_in_blocks(x[:, :, start : start + image].index_select(2, order), block) for x in (query, key, value)]
    words = [x[:, :, outside] for x in (key, value)]
    within = None if mask is None else _of_blocks(mask, order, kept, slice(start, start + image), outside)
    parts = list[torch.Tensor]()
    for rows, heads, chosen in _chunks(kept, query.shape[1], block, words[0].shape[2]):
        keys, values = (_read(x, chosen, text, heads) for x, text in zip(blocks[1:], words, strict=True))
        allowed = None if within is None else _rows_of(within, rows)
        parts.append(scaled_dot_product_attention(blocks[0][:, rows], keys, values, allowed, scale=scale))
    merged = torch.cat(parts, dim=1)
    result = merged.reshape(*query.shape[:2], image, value.shape[3]).index_select(2, inverse)
    if not words[0].shape[2]:
        return result
    read = scaled_dot_product_attention(query[:, :, outside], key, value, mask, scale=scale)
    return torch.cat((read, result) if start else (result, read), dim=2)


def _chunks(kept: torch.Tensor, heads: int, block: int, text: int) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The blocks of queries of all heads, as many at once as keep the logits small.

    Returns:
        For each chunk its rows among the H n blocks, the head of each, and the blocks of keys that each reads [rows, m].
    """
    _, n, m = kept.shape
    first = torch.arange(heads).reshape(heads, 1, 1) * n
    chosen = (kept + first).reshape(heads * n, m)  # of one group, each head adds its own first block
    of_head = torch.arange(heads).repeat_interleave(n)
    most = max(1, CHUNK_BYTES // (4 * block * (m * block + text)))
    starts = range(0, heads * n, most)
    return [(slice(i, min(i + most, heads * n)), of_head[i : i + most], chosen[i : i + most]) for i in starts]


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[B, H, I, K] -> [B, H I / block, block, K]."""
    B, H, image, K = x.shape
    return x.reshape(B, H * (image // block), block, K)


def _read(x: torch.Tensor, chosen: torch.Tensor, text: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """What some blocks of queries read: their blocks of keys [B, H n, block, K], and the text [B, H, L, K] of their head.

    Returns:
        [B, rows, m block + L, K].
    """
    B, _, block, K = x.shape
    rows, m = chosen.shape
    gathered = x.index_select(1, chosen.reshape(-1)).reshape(B, rows, m * block, K)
    return torch.cat((gathered, text.index_select(1, heads)), dim=2) if text.shape[2] else gathered


def _of_blocks(
    mask: torch.Tensor, order: torch.Tensor, kept: torch.Tensor, inside: slice, outside: slice
) -> torch.Tensor:
    """The mask [B, G n, 1, m block + L] of the keys that each block of queries reads."""
    (B, _, _, T), (groups, n, m) = mask.shape, kept.shape
    block, text = order.shape[0] // n, T - order.shape[0]
    image = mask[:, 0, 0, inside].index_select(1, order).reshape(B, n, block)
    found = image.index_select(1, kept.reshape(-1)).reshape(B, groups * n, 1, m * block)
    words = mask[:, :, :, outside].expand(B, groups * n, 1, text)
    return torch.cat((found, words), dim=3)


def _rows_of(mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """The rows of a mask [B, G n, 1, keys] that some blocks of queries have; heads of one group share them."""
    numbers = torch.arange(rows.start, rows.stop) % mask.shape[1]
    return mask.index_select(1, numbers)
