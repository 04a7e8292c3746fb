"""Whether integers are faster than floats on the engine and the processor that a bundle is built for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..base import Context
from .durations import Durations
from .layers import Group
from .realize import Realization

logger = logging.getLogger(__name__)

PAYS = 0.9
"""Share of the duration of floats above which integers do not pay: they cost quality, and little of a step is theirs."""


def does_not_pay(pairs: Sequence[tuple[Group, Realization | None]], scheme: str, context: Context) -> dict[str, object]:
    """What to record where integers are hardly faster than floats, which is also logged; nothing where they pay.

    The largest group stands for all: layers are alike, and each that is timed is compiled twice.

    Args:
        pairs: groups and what takes their place.
        scheme: name of the scheme.
        context: context of the pass; without an engine that runs here nothing is timed.
    """
    replaced = [(group, realization) for group, realization in pairs if realization is not None]
    if context.fitted_on != "engine" or not replaced:
        return {}
    group, realization = max(replaced, key=lambda pair: pair[0].source.meta["val"].numel() * len(pair[0].weight))
    times = Durations(context).of(group, {"float": None, scheme: realization})
    ratio = times[scheme] / times["float"]
    if ratio <= PAYS:
        return {}
    logger.warning(
        "quantize: %s does not pay on %s on this processor: %s took %.1f ms against %.1f ms in float, %.2f times as long. "
        "Choose another --backend, or --recipe fp32.",
        scheme,
        context.engine_name,
        group.name,
        times[scheme] / 1e6,
        times["float"] / 1e6,
        ratio,
    )
    return {"does_not_pay": {"layers": group.name, "times": round(ratio, 2)}}
