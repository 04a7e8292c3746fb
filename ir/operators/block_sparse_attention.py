"""Attention in which each block of queries reads some blocks of keys, and all of a text beside them."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from .record import Arguments, operator


def _shape(
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
    text = query.shape[2] - image
    inside = slice(start, start + image)
    blocks = [_in_blocks(x[:, :, inside].index_select(2, order), block) for x in (query, key, value)]
    keys, values = (_gathered(x, kept) for x in blocks[1:])
    outside = slice(0, start) if start else slice(image, None)
    if text:
        keys, values = (
            torch.cat((gathered, _repeated(x[:, :, outside], gathered)), dim=2)
            for gathered, x in ((keys, key), (values, value))
        )
    within = None if mask is None else _of_blocks(mask, order, kept, inside, outside, query.shape[1])
    merged = scaled_dot_product_attention(blocks[0], keys, values, within, scale=scale)
    result = merged.reshape(*query.shape[:2], image, value.shape[3]).index_select(2, inverse)
    if not text:
        return result
    words = scaled_dot_product_attention(query[:, :, outside], key, value, mask, scale=scale)
    return torch.cat((words, result) if start else (result, words), dim=2)


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[B, H, I, K] -> [B, H I / block, block, K]."""
    B, H, image, K = x.shape
    return x.reshape(B, H * (image // block), block, K)


def _gathered(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The blocks [B, H n, block, K] of keys that each block of queries reads: [B, H n, m block, K]."""
    B, rows, block, K = x.shape
    _, n, m = kept.shape
    H = rows // n
    first = torch.arange(H).reshape(H, 1, 1) * n
    chosen = (kept + first).reshape(-1)  # of one group, each head adds its own first block
    return x.index_select(1, chosen).reshape(B, H * n, m * block, K)


def _repeated(x: torch.Tensor, gathered: torch.Tensor) -> torch.Tensor:
    """The text [B, H, L, K] for every block of queries: [B, H n, L, K]."""
    B, H, L, K = x.shape
    n = gathered.shape[1] // H
    return x.unsqueeze(2).expand(B, H, n, L, K).reshape(B, H * n, L, K)


def _of_blocks(
    mask: torch.Tensor, order: torch.Tensor, kept: torch.Tensor, inside: slice, outside: slice, heads: int
) -> torch.Tensor:
    """The mask [B, H n, 1, m block + L] of the keys that each block of queries reads."""
    (B, _, _, T), (groups, n, m) = mask.shape, kept.shape
    block, text = order.shape[0] // n, T - order.shape[0]
    image = mask[:, 0, 0, inside].index_select(1, order).reshape(B, n, block)
    found = image.index_select(1, kept.reshape(-1)).reshape(B, groups, n, m * block)
    if text:
        words = mask[:, 0, 0, outside].reshape(B, 1, 1, text).expand(B, groups, n, text)
        found = torch.cat((found, words), dim=3)
    width = m * block + text
    return found.expand(B, heads, n, width).reshape(B, heads * n, 1, width)
