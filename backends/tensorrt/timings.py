"""The timing cache: what the builder measured of kernels, kept between builds."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...loop.errors import StepfoldError
from .provider import Message, Provider

warnings = logging.getLogger(__name__)

UNREADABLE = "deserialize timing cache"


def use_timings(config: Any, provider: Provider, path: Path | None, messages: list[Message]) -> None:
    """Give the builder the timings of earlier builds; a file that is of no use is ignored with a warning.

    Args:
        config: configuration of the builder.
        provider: whose builder it is.
        path: the file; None, or one that is not there yet, gives nothing.
        messages: what the provider logs, which is the only place where it says that a file is damaged.
    """
    if path is None:
        return
    if not provider.keeps_timings:
        warnings.warning("%s: ignored: %s measures nothing while it builds and keeps no timings.", path, provider.name)
        return
    before = len(messages)
    cache = config.create_timing_cache(_bytes(path))
    unreadable = any(UNREADABLE in message.text for message in messages[before:])
    if cache is None or unreadable or not config.set_timing_cache(cache, False):
        warnings.warning("%s: ignored: it is no timing cache of this %s and this GPU.", path, provider.name)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        warnings.warning("%s: ignored: the timing cache cannot be read: %s.", path, error.strerror)
        return b""


def keep_timings(config: Any, provider: Provider, path: Path | None) -> None:
    """Write the timings of a build; of two builds at once, those of the later one stay.

    Raises:
        StepfoldError: the file cannot be written.
    """
    if path is None or not provider.keeps_timings:
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))
        os.replace(partial, path)
    except OSError as error:
        raise StepfoldError(
            f"{path}: expected a file that can be written; received: {error.strerror}. Name another with "
            "--set tensorrt.timing_cache=FILE."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
