"""The standard streams, signals and temporary folder of a command, whatever its caller made of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from ..loop.errors import UsageError
from ..loop.held import is_utf8

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
STREAMS = 3  # standard input, output and error
TEMPORARY = ("TMPDIR", "TEMP", "TMP")  # where Python looks for it
STOPS = ("SIGTERM", "SIGHUP")
BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROL = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), *BIDIRECTIONAL)
    if chr(code) not in "\n\t"
}
"""Characters that a terminal acts on, with how they are shown instead."""


def printable(text: str) -> str:
    """Text from a file or a name, without what a terminal would act on."""
    return text.translate(CONTROL)


def mend_streams() -> None:
    """Open what is closed to nothing, so that no other file takes its number, and show what an encoding lacks as `\\u`."""
    for number in range(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def require_utf8_temporary_folder() -> None:
    """Refuse a folder for temporary files that engines, which take paths as text, could not use.

    Raises:
        UsageError: the environment names one.
    """
    for name in TEMPORARY:
        folder = os.environ.get(name)
        if folder and not is_utf8(Path(folder)):
            raise UsageError(f"{name}: expected a folder whose path is UTF-8 text; received {folder!r}. Set another.")


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep the standard output for results: what a library in another language prints there goes to standard error.

    Such libraries (`tokenizers` is one) write to the file descriptor and know nothing of `sys.stdout`, so it is the
    descriptor that leads elsewhere for as long as a command runs, and results get one of their own. A standard output
    that somebody put in its place, as tests do, is left alone.
    """
    original = sys.stdout
    try:
        redirected = original.fileno() == STANDARD_OUTPUT
    except (OSError, ValueError, AttributeError):
        redirected = False
    if not redirected:
        yield
        return
    original.flush()
    kept = os.dup(STANDARD_OUTPUT)
    results = open(  # noqa: SIM115 (closed below, where its errors are those of a closed pipe)
        kept, "w", encoding=original.encoding, errors=original.errors, buffering=1 if original.isatty() else -1
    )
    os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)
    sys.stdout = results
    try:
        yield
    finally:
        sys.stdout = original
        os.dup2(kept, STANDARD_OUTPUT)
        with suppress(OSError):  # told when it was flushed
            results.close()


@contextmanager
def stopped_like_interrupted() -> Iterator[None]:
    """Let a request to end do what Ctrl-C does: what is half-written is removed, and the error is one line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in found}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # `nohup` and others keep theirs
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is signal.SIG_DFL:
                signal.signal(number, handler)
