"""What the command lines of training scripts have in common: options, steps with saves between, Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType

import numpy as np
from averaged import Model, Training

from stepfold.loop.errors import StepfoldError

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@contextmanager
def interruption() -> Iterator[Event]:
    """Inside, Ctrl-C (or a termination) sets the event: the step at hand is finished, so that the state is whole."""
    event = Event()

    def remember(number: int, frame: FrameType | None) -> None:
        event.set()

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all training scripts have, but for those of their output."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST's four original .gz files")
    source.add_argument("--smoke", action="store_true", help="a tiny model on generated data, for a few steps")
    parser.add_argument("--seed", type=natural, default=0, help="of initialization and batches (default 0)")
    parser.add_argument("--every", type=positive, help="steps between two saves (default: a twentieth of all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    return parser


def exit_code(work: Callable[[], bool], out: Path | None) -> int:
    """Run a script; its exit code, an error said in one line.

    Args:
        work: what the script does; False where it was interrupted.
        out: folder that it writes, for messages.
    """
    try:
        return 0 if work() else INTERRUPTED
    except StepfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # disk full, no right to write: the files of the last save stand
        print(f"error: {out}: {error}", file=sys.stderr)
        return StepfoldError.exit_code


def natural(text: str) -> int:
    """A whole number of 0 or more, or argparse's error."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more; received {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more, or argparse's error."""
    if (number := natural(text)) == 0:
        raise argparse.ArgumentTypeError("expected a whole number of 1 or more; received 0")
    return number


def walk(
    training: Training[Model],
    steps: int,
    every: int,
    advance: Callable[[], float],
    save: Callable[[], None],
    report: Callable[[], str],
) -> bool:
    """Train up to a number of steps, saving on the way; whether it got there.

    Args:
        training: the run; it may have steps behind it.
        steps: in all.
        every: steps between two saves.
        advance: takes a step; its loss.
        save: writes the files of the run.
        report: words for the line that a save prints.
    """
    losses = []
    with interruption() as interrupted:
        while training.step < steps and not interrupted.is_set():
            losses.append(advance())
            if training.step % every == 0 or training.step == steps:
                save()
                print(f"step {training.step} loss {np.mean(losses):.4f} {report()}", flush=True)
                losses.clear()
        if 0 < training.step < steps:
            save()
    if training.step < steps:
        print(f"interrupted after step {training.step} of {steps}; the same command goes on from there", flush=True)
    return training.step >= steps
