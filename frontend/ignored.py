"""Keys of a published configuration that its class does not have: left unread, as diffusers leaves them, and told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def report_ignored(where: str, class_name: str, keys: Sequence[str]) -> None:
    """Tell in one line of information which keys of a configuration are not read.

    Args:
        where: name of the component.
        class_name: class of the component.
        keys: the ones that the class does not have; nothing is said where there are none.
    """
    if keys:
        logger.info("%s: %s has no %s; ignored, as diffusers ignores them", where, class_name, ", ".join(keys))
