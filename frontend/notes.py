"""What a person is told about a published folder that says more, or says it otherwise, than its libraries take."""

from __future__ import annotations

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)


def report_ignored(where: str, class_name: str, keys: Sequence[str]) -> None:
    """Tell in one line which keys of a configuration are not read, as diffusers does not read them.

    Args:
        where: name of the component.
        class_name: class of the component.
        keys: the ones that the class does not have; nothing is said where there are none.
    """
    if keys:
        logger.info("%s: %s has no %s; ignored, as diffusers ignores them", where, class_name, ", ".join(keys))


def report_renamed(where: str, old: str, new: str) -> None:
    """Tell in one line that a class is read under the name that it has today.

    Args:
        where: the component, or the file that names the class.
        old: its name in the folder.
        new: its name in the installed library.
    """
    logger.info("%s: %s is read as %s", where, old, new)


def report_left_out(name: str, class_name: str, is_there: bool) -> None:
    """Tell in one line that a component of the folder is not part of the bundle.

    Args:
        name: name of the component.
        class_name: class of the component.
        is_there: whether the folder has it.
    """
    beside = "" if is_there else "; the folder lacks it"
    logger.info("%s (%s): left out of the bundle, which neither checks nor reads images%s", name, class_name, beside)
