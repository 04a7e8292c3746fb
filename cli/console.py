"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from .streams import printable

WIDTH = 160  # columns where the output is no terminal
TOLD = "stepfold.frontend.notes"
"""The logger whose information everybody is shown, and not only who debugs."""
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # no command downloads anything
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Screen(Console):
    """A console on which names from files cannot move the cursor or set a title."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, with control characters of texts shown and not sent."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


def console() -> Screen:
    """Standard output."""
    return Screen(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def errors_console() -> Screen:
    """Standard error."""
    return Screen(stderr=True, highlight=False)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object, and nothing that is not JSON."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A table of plain text; columns named in `right` are numbers."""
    made = Table(title=escape(printable(title)), title_justify="left", title_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(printable(cell)) for cell in row))
    return made


class ProgressBars:
    """Shows the task at work from calls of (task, done, total); nothing where nobody watches."""

    def __init__(self, progress: Progress | None):
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._shown: str | None = None

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a task are done."""
        if self._progress is None:
            return
        if self._shown not in (None, task):
            self._progress.update(self._bars[self._shown], visible=False)
        if task not in self._bars:
            self._bars[task] = self._progress.add_task(escape(task), total=total)
        self._progress.update(self._bars[task], completed=done, total=total, visible=True)
        self._shown = task

    def task(self, name: str) -> Callable[[int, int], None]:
        """A function of (done, total) for one task."""
        return lambda done, total: self(name, done, total)


@contextmanager
def working() -> Iterator[ProgressBars]:
    """Show progress on a terminal, and keep what libraries print away from standard output."""
    screen = errors_console()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if not screen.is_terminal:
            yield ProgressBars(None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        progress = Progress(*columns, console=screen, transient=True, redirect_stdout=False)
        yield ProgressBars(stack.enter_context(progress))


class _Lines(logging.Handler):
    """Writes records as lines on whatever is standard error by then, so that they stand above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        errors_console().print(line, markup=False, soft_wrap=True)


@contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
    """Show stepfold's own warnings and what it ignores, and the messages of PyTorch, diffusers and others only to who debugs."""
    logger, told, root = logging.getLogger("stepfold"), logging.getLogger(TOLD), logging.getLogger()
    lines, nothing = _Lines(), logging.NullHandler()
    wanted = OFFLINE if debug else OFFLINE | QUIET
    level, added = logger.level, {name: value for name, value in wanted.items() if name not in os.environ}
    logger.addHandler(lines)
    told.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            os.environ.update(added)
            if debug:
                logger.setLevel(logging.INFO)
            else:
                warnings.simplefilter("ignore")
                root.addHandler(nothing)  # without any handler, Python prints the warnings of libraries
            yield
    finally:
        logger.removeHandler(lines)
        root.removeHandler(nothing)
        logger.setLevel(level)
        told.setLevel(logging.NOTSET)
        for name in added:
            os.environ.pop(name, None)
