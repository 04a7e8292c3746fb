"""The process of one row: `python -m stepfold.report.worker`.

It reads one JSON request a line from standard input and answers on standard output with one line
`{"answer": {...}}` or `{"error": {"kind", "message"}}`, any number of `{"progress": [done, total]}` before it:

| do | other keys | answer |
|---|---|---|
| `prepare` | checkpoint, baselines, loop, call, folder | class, weights_sha256, loop, tables, reasons |
| `inspect` | checkpoint, loop, call | what `inspect --json` says |
| `build` | artifact, checkpoint, loop, call, folder, source, threads | file size of what was built |
| `open` | row, threads | evaluations, size_bytes |
| `sample` | request, start, stop, out | seconds of the call alone |
| `finish` | | peak_memory_bytes |

Arrays travel in files: requests as safetensors, samples as `.npy`; nothing is pickled. An error that is no
`StepfoldError` ends the process, and the last line of its standard error tells why.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..loop.errors import StepfoldError, UsageError
from . import work
from .machine import peak_memory_bytes
from .runners import Runner, open_bundle

Message = Mapping[str, Any]
Answer = dict[str, Any]


class Service:
    """Answers requests; `open` must come before `sample`."""

    def __init__(self, answers: TextIO):
        """Write answers to a stream that nothing else writes to."""
        self._answers = answers
        self._runner: Runner | None = None
        self._verbs: dict[str, Callable[[Message], Answer]] = {
            "prepare": self._prepare,
            "inspect": self._inspect,
            "build": self._build,
            "open": self._open,
            "sample": self._sample,
            "finish": lambda _: {"peak_memory_bytes": peak_memory_bytes()},
        }

    def answer(self, message: Message) -> None:
        """Do what a request says and write the answer."""
        try:
            self._write({"answer": self._verbs[message["do"]](message)})
        except StepfoldError as error:
            self._write({"error": {"kind": type(error).__name__, "message": str(error)}})

    def _write(self, value: Answer) -> None:
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()

    def _progress(self, done: int, total: int) -> None:
        self._write({"progress": [done, total]})

    def _prepare(self, message: Message) -> Answer:
        from .baselines.prepare import prepare

        checkpoint, folder = Path(message["checkpoint"]), Path(message["folder"])
        return prepare(checkpoint, message["baselines"], message["loop"], folder, message["call"])

    def _inspect(self, message: Message) -> Answer:
        from .baselines.prepare import inspect

        return inspect(Path(message["checkpoint"]), message["loop"], message["call"])

    def _build(self, message: Message) -> Answer:
        from .baselines.build import build

        return {"size_bytes": build(message, self._progress)}

    def _open(self, message: Message) -> Answer:
        row, threads = message["row"], int(message["threads"])
        if row["kind"] == "bundle":
            self._runner = open_bundle(Path(row["path"]), row["guidance"], threads, row["allow_native"])
        else:
            from .baselines.opening import open_baseline

            self._runner = open_baseline(row, threads)
        return {"evaluations": self._runner.evaluations, "size_bytes": self._runner.size_bytes}

    def _sample(self, message: Message) -> Answer:
        if self._runner is None:
            raise UsageError("worker: expected `open` before `sample`.")
        request = work.read(Path(message["request"]), message["start"], message["stop"])
        begin = time.perf_counter()
        samples = self._runner.sample(request)
        seconds = time.perf_counter() - begin
        if message["out"] is not None:
            np.save(message["out"], np.asarray(samples, np.float32), allow_pickle=False)
        return {"seconds": seconds}


def main() -> None:
    """Serve until standard input ends."""
    # A group of its own: the measuring process can stop and end it with all its children, Ctrl-C in a terminal does
    # not reach it, and if that process is killed the system ends a stopped group that it leaves behind.
    os.setpgid(0, 0)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    service = Service(answers)
    for line in sys.stdin:
        service.answer(json.loads(line))


if __name__ == "__main__":
    main()
