"""Bits for each site: the best within the budget, never worse than one format for all."""

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.loop.errors import UsageError
from stepfold.passes.quantize.algebra.allocation import CELLS, Choice, allocate

Sites = Mapping[str, Sequence[Choice]]
FORMATS = ("int2", "int4", "int8", "float16")


@st.composite
def sites(draw: st.DrawFn, largest: int, count: int = 5) -> Sites:
    """Up to `count` sites that offer all formats, each with any cost and damage."""
    costs, damages = st.integers(0, largest), st.floats(0, 100, width=16)
    return {
        f"site{i}": [Choice(name, draw(costs), draw(damages)) for name in FORMATS]
        for i in range(draw(st.integers(1, count)))
    }


def totals(found: Sites) -> list[tuple[float, int]]:
    """Damage and cost of every combination."""
    return [(sum(c.damage for c in each), sum(c.cost for c in each)) for each in product(*found.values())]


def lowest(found: Sites) -> int:
    return sum(min(choice.cost for choice in choices) for choices in found.values())


@given(sites(20), st.integers(0, 60))
def test_it_is_the_best(found: Sites, spare: int) -> None:
    budget = lowest(found) + spare
    received = allocate(found, budget)
    assert received.cost <= budget and list(received.choices) == list(found)
    assert all(received.choices[site] in choices for site, choices in found.items())
    best = min(damage for damage, cost in totals(found) if cost <= budget)
    assert received.damage == pytest.approx(best, abs=1e-9)


@given(sites(1_000_003 * 7, count=12), st.floats(0, 1))
def test_large_costs_are_rounded_but_the_budget_holds(found: Sites, part: float) -> None:
    """Costs without a common factor: never above the budget, never worse than one format for all."""
    highest = sum(max(choice.cost for choice in choices) for choices in found.values())
    budget = round(lowest(found) + part * (highest - lowest(found)))
    received = allocate(found, budget)
    assert received.cost <= budget
    for name in FORMATS:
        uniform = [next(c for c in choices if c.name == name) for choices in found.values()]
        if sum(choice.cost for choice in uniform) <= budget:
            assert received.damage <= sum(choice.damage for choice in uniform)


@given(sites(10**9, count=4), st.floats(0, 1))
def test_rounding_costs_little(found: Sites, part: float) -> None:
    """At most what the best combination loses with a budget that is one cell a site smaller."""
    highest = sum(max(choice.cost for choice in choices) for choices in found.values())
    budget = round(lowest(found) + part * (highest - lowest(found)))
    reduced = budget - len(found) * -(-budget // CELLS)
    possible = [damage for damage, cost in totals(found) if cost <= reduced]
    if possible:
        assert allocate(found, budget).damage <= min(possible) + 1e-9


def test_by_hand() -> None:
    """Eight bytes: the fragile site gets 6, the robust one 2. Uniform 4 would have damage 4 + 1, uniform 2 more."""
    fragile = [Choice("int2", 2, 9.0), Choice("int4", 4, 4.0), Choice("int8", 6, 0.5)]
    robust = [Choice("int2", 2, 1.5), Choice("int4", 4, 1.0), Choice("int8", 6, 0.9)]
    received = allocate({"fragile": fragile, "robust": robust}, 8)
    assert [choice.name for choice in received.choices.values()] == ["int8", "int2"]
    assert (received.cost, received.damage) == (8, 2.0)


def test_of_equals_the_cheapest() -> None:
    choices = [Choice("int8", 8, 1.0), Choice("int4", 4, 1.0)]
    assert allocate({"a": choices, "b": choices}, 16).cost == 8


THIRD = 333_337  # three of them are the budget, but rounded up to its 10 000 cells they no longer fit


def test_what_rounding_leaves_is_spent() -> None:
    """Formats of different names, so that no format is shared by all sites."""
    found = {site: [Choice(f"low {site}", 1, 10.0), Choice(f"middle {site}", THIRD, 1.0)] for site in "abc"}
    assert allocate(found, 3 * THIRD).damage == 3


def test_one_format_for_all_is_seen_where_rounding_hides_it() -> None:
    """Rounded costs allow a high, a middle and a low; what is left of the budget changes none of them."""
    formats = [Choice("low", 1, 10.0), Choice("middle", THIRD, 1.0), Choice("high", 600_000, 0.9)]
    received = allocate({site: formats for site in "abc"}, 3 * THIRD)
    assert [choice.name for choice in received.choices.values()] == ["middle"] * 3


def test_sites_may_offer_different_formats() -> None:
    received = allocate({"a": [Choice("int4", 4, 1.0)], "b": [Choice("int8", 8, 1.0), Choice("fp8", 8, 0.5)]}, 12)
    assert [choice.name for choice in received.choices.values()] == ["int4", "fp8"]


def test_no_sites_need_nothing() -> None:
    assert dict(allocate({}, 0).choices) == {}


@pytest.mark.parametrize(
    ("found", "budget", "message"),
    [
        (
            {"a": [Choice("int4", 4, 1.0)]},
            3,
            r"budget: expected at least 4, the cheapest choices; received 3\. Raise it",
        ),
        ({"a": []}, 3, r"a: expected at least one choice; received none"),
        (
            {"a": [Choice("int4", -1, 1.0)]},
            3,
            r"a: expected a cost from 0 and a finite damage; received Choice\(name='int4'",
        ),
        ({"a": [Choice("int4", 1, float("nan"))]}, 3, r"a: expected a cost from 0 and a finite damage"),
    ],
)
def test_errors(found: Sites, budget: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(found, budget)
