"""The measuring side of a worker: start it, ask it, keep it quiet, end it.

Engines disturb each other by a factor of two when they share a process, because their thread pools keep spinning
after a call. So each row has a process of its own, and while one works all others are stopped with SIGSTOP: a pause
between turns would have to be longer than the longest spin of any engine, and would still let background threads in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..loop.errors import StepfoldError

COMMAND = (sys.executable, "-m", "stepfold.report.worker")
LONGEST_REASON = 400  # characters of a reason in a report
OnProgress = Callable[[int, int], None]


class WorkerError(StepfoldError):
    """A worker refused a request or died; `kind` is the class of its error, None when it died."""

    def __init__(self, reason: str, kind: str | None = None):
        super().__init__(reason)
        self.kind = kind


class Worker:
    """One child process that answers requests, one JSON object a line; it is stopped between two of them."""

    def __init__(self, name: str, threads: int, folder: Path, command: Sequence[str] = COMMAND):
        """Start the process.

        Args:
            name: name for its error file.
            threads: number of threads of its engine.
            folder: folder for its standard error.
            command: what to start; `stepfold.report.worker` describes what it must answer.
        """
        self.name = name
        self._errors = folder / f"{name.replace('/', '_').replace(':', '_')}.stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment(threads)
            )

    def request(self, message: Mapping[str, Any], on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Ask for something and wait for the answer.

        Args:
            message: `{"do": verb, ...}`.
            on_progress: called with (done, total) as the worker reports it.

        Raises:
            WorkerError: it refused, or it died; then the last line of its standard error says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerError(self._obituary()) from None
        while line := self._process.stdout.readline():
            answer = json.loads(line)
            if "progress" in answer:
                if on_progress is not None:
                    on_progress(*answer["progress"])
                continue
            self._stop()
            if "error" in answer:
                raise WorkerError(answer["error"]["message"], answer["error"]["kind"])
            return answer["answer"]
        raise WorkerError(self._obituary())

    def close(self) -> None:
        """End the process and everything it started."""
        self._signal(signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()

    def _stop(self) -> None:
        """Stop the process and wait until every thread of it stands still."""
        self._signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # macOS has it from Python 3.13 on; the signal takes effect a moment later there
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        """Signal the worker with its children: it makes itself the leader of a process group when it starts."""
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                self._process.send_signal(number)

    def _obituary(self) -> str:
        """How the process ended, with the last line it wrote to its standard error."""
        self._signal(signal.SIGCONT)
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f"its process {how}: {lines[-1].strip()}"[:LONGEST_REASON] if lines else f"its process {how}"


class Workers(contextlib.AbstractContextManager["Workers"]):
    """All processes of one bench; leaving the block ends every one of them, an interruption included."""

    def __init__(self, threads: int, folder: Path, command: Sequence[str] = COMMAND):
        """See `Worker`."""
        self._threads, self._folder, self._command = threads, folder, command
        self._all: list[Worker] = []

    def start(self, name: str) -> Worker:
        """Start one more worker."""
        worker = Worker(name, self._threads, self._folder, self._command)
        self._all.append(worker)
        return worker

    def once(self, name: str, message: Mapping[str, Any], on_progress: OnProgress | None = None) -> dict[str, Any]:
        """One request to a worker of its own, ended afterwards; raises as `Worker.request` does."""
        worker = self.start(name)
        try:
            return worker.request(message, on_progress)
        finally:
            worker.close()

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.close()


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment with every thread pool that starts on its own set to the same size."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}
