"""What a method that fills a slot from its earlier outputs owes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ....loop.recurrence import Array


@dataclass(frozen=True)
class Normal:
    """Normal equations of a slot: what it computes, in terms of what it computed before.

    Attributes:
        gram: [m, m] inner products of the m anchors, over all samples and both branches.
        right: [m] inner products of the anchors with the output that is to be replaced.
    """

    gram: Array
    right: Array


@dataclass(frozen=True)
class Seen:
    """What a method knows where it fills a slot.

    Attributes:
        call: grid call of the evaluation.
        anchors: [m] grid calls of the computed outputs that it may weigh, the newest last.
        normal: computes the slot there on the calibration samples, in the state that the loop has come to.
    """

    call: int
    anchors: Array
    normal: Callable[[], Normal]


class Method(ABC):
    """Fills a slot with a weighted sum of its own earlier outputs.

    Attributes:
        name: name of the method in recipes.
        source: paper it comes from.
        reach: how many earlier outputs it weighs at most.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    reach: ClassVar[int]

    @abstractmethod
    def weights(self, seen: Seen) -> Array:
        """The weights [m] of the anchors."""
