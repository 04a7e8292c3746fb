"""The denoiser in closed form, cut into head, body and tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from analytic import CENTERS, LABEL, STATE, TIME, inputs

from stepfold.loop.ports import BoundProgram, BoundStage, Port, Rate, bound_slots

Array = np.ndarray
BODY = "step.body"
HIDDEN, ADDED, OUT = (Port(name, STATE.shape, "float32") for name in ("h", "added", "y"))


def added(x: Array, s: Array, c: Array) -> Array:
    """What the body adds to the hidden values, from them, the time [B, 1] and classes [B]."""
    return (0.6 * np.sin(5 * x) - 0.3 * CENTERS[c] / (s + np.float32(0.1))).astype(np.float32)


def rest(h: Array, s: Array) -> Array:
    """What the tail adds."""
    return s * h


class Bodied:
    """The field of `analytic.velocity` as three slots that count their rows.

    Attributes:
        rows: name of a slot -> rows it has computed.
    """

    def __init__(
        self,
        added: Callable[[Array, Array, Array], Array] = added,
        rest: Callable[[Array, Array], Array] = rest,
    ):
        """Give the body and the tail what they add."""
        self._added, self._rest = added, rest
        self.forget()

    def forget(self) -> None:
        """Begin to count again."""
        self.rows: dict[str, int] = dict.fromkeys(("step.head", BODY, "step.tail"), 0)

    def bound(self) -> BoundProgram:
        """The slots as a program."""
        return BoundProgram(
            inputs(),
            ("y",),
            bound_slots(
                BoundStage("step.head", Rate.STEP, (STATE,), (HIDDEN,), self._head),
                BoundStage(BODY, Rate.STEP, (HIDDEN, TIME, LABEL), (ADDED,), self._body),
                BoundStage("step.tail", Rate.STEP, (HIDDEN, ADDED, TIME), (OUT,), self._tail),
            ),
            {},
        )

    def _head(self, values: Mapping[str, Array]) -> list[Array]:
        self.rows["step.head"] += len(values["x"])
        return [values["x"]]

    def _body(self, values: Mapping[str, Array]) -> list[Array]:
        self.rows[BODY] += len(values["h"])
        return [self._added(values["h"], _seconds(values["t"]), values["c"])]

    def _tail(self, values: Mapping[str, Array]) -> list[Array]:
        self.rows["step.tail"] += len(values["h"])
        return [self._rest(values["h"], _seconds(values["t"])) + values["added"]]


def _seconds(t: Array) -> Array:
    return (t / np.float32(1000.0))[:, None]
