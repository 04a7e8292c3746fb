"""Seeded choices of rows, independent of shards."""

from __future__ import annotations

import pytest
import torch

from stepfold.calibration.sampling import ROWS, TOKENS, draw_rows, gram_tokens


def rows(draws, values: torch.Tensor, calls: int, branches: int, shard: int) -> torch.Tensor:
    """What is kept of values [B, T, M] that are the same at all calls, sample by sample, in shards of this size."""
    kept = []
    for first in range(0, len(values), shard):
        part = values[first : first + shard]
        kept += [draws.rows(part, k, b, first) for k in range(calls) for b in range(branches)]
    return torch.cat(kept)


@pytest.mark.parametrize(("samples", "calls", "branches"), [(32, 50, 2), (3, 4, 2), (1, 1, 1), (700, 1, 1)])
def test_at_most_so_many_rows_spread_evenly(samples: int, calls: int, branches: int) -> None:
    draws = draw_rows(0, samples, calls, branches)
    cells = samples * calls * branches
    total = draws.count(0, samples)
    assert ROWS / 2 < total <= ROWS or total == cells
    counts = [
        sum(chosen == sample for chosen, _ in draws.places.get((k, b), ()))
        for sample in range(samples)
        for k in range(calls)
        for b in range(branches)
    ]
    assert max(counts) - min(counts) <= 1


def test_shards_do_not_matter() -> None:
    draws = draw_rows(5, 12, 3, 2)
    values = torch.arange(12 * 40 * 1.0).reshape(12, 40, 1)
    whole, cut = rows(draws, values, 3, 2, 12), rows(draws, values, 3, 2, 5)
    assert sorted(whole.flatten().tolist()) == sorted(cut.flatten().tolist())
    assert draws.count(0, 5) + draws.count(5, 12) == draws.count(0, 12)


def test_of_a_seed() -> None:
    assert draw_rows(0, 8, 50, 2) == draw_rows(0, 8, 50, 2) != draw_rows(1, 8, 50, 2)


def test_one_token_is_kept_once() -> None:
    draws = draw_rows(0, 2, 2, 1)
    assert len(draws.rows(torch.zeros(2, 1, 3), 0, 0, 0)) == 2


def test_few_tokens_enter_the_gram_matrix_all() -> None:
    values = torch.randn(2, TOKENS, 3)
    assert torch.equal(gram_tokens(values, 0, (0, 0, 0, 0)), values.reshape(-1, 3))


def test_of_many_tokens_a_seeded_choice_of_each_sample() -> None:
    values = torch.arange(2 * 2 * TOKENS * 1.0).reshape(2, 2 * TOKENS, 1)
    chosen = gram_tokens(values, 0, (0, 1, 2, 0)).reshape(2, TOKENS)
    for sample, ids in enumerate(chosen):
        assert len(set(ids.tolist())) == TOKENS
        assert bool((ids // (2 * TOKENS) == sample).all())
    assert torch.equal(chosen.flatten(), gram_tokens(values, 0, (0, 1, 2, 0)).flatten())
    assert not torch.equal(chosen[0] % (2 * TOKENS), chosen[1] % (2 * TOKENS))


@pytest.mark.parametrize("other", [(1, 1, 2, 0), (0, 0, 2, 0), (0, 1, 3, 0)])
def test_site_branch_and_call_choose_others(other: tuple[int, int, int, int]) -> None:
    values = torch.arange(2 * TOKENS * 1.0).reshape(1, -1, 1)
    assert not torch.equal(gram_tokens(values, 0, (0, 1, 2, 0)), gram_tokens(values, 0, other))


def test_the_tokens_of_a_sample_do_not_depend_on_its_shard() -> None:
    values = torch.arange(3 * 2 * TOKENS * 1.0).reshape(3, 2 * TOKENS, 1)
    whole = gram_tokens(values, 7, (0, 0, 0, 10)).reshape(3, -1)
    assert torch.equal(whole[1:].flatten(), gram_tokens(values[1:], 7, (0, 0, 0, 11)).flatten())


def test_more_rows_where_they_are_asked_for() -> None:
    values = torch.arange(4 * TOKENS * 1.0).reshape(1, -1, 1)
    assert [len(gram_tokens(values, 0, (0, 0, 0, 0), most)) for most in (8, 2 * TOKENS, 9 * TOKENS)] == [
        8,
        2 * TOKENS,
        4 * TOKENS,
    ]
