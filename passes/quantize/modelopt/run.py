"""Run modelopt's ONNX quantizer in its own environment: a model and calibration batches in, a Q/DQ model out."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ....loop.errors import StepfoldError, UsageError

Array = np.ndarray
Batch = Mapping[str, Array]
Mode = Literal["int8", "fp8", "int4"]
METHODS: dict[str, tuple[str, ...]] = {
    "int8": ("max", "entropy"),
    "fp8": ("max", "entropy"),
    "int4": ("rtn_dq", "awq_lite", "awq_clip"),
}
"""Ways to choose scales, the default first. Entropy clips what is rare, and diffusion does not forgive that."""
WORKER = Path(__file__).with_name("worker.py")
TAIL = 12  # lines of the child's standard error in a message
TIMEOUT = 3600.0  # seconds
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quantizer:
    """How modelopt is to quantize.

    Attributes:
        mode: number format: `int8` and `fp8` quantize weights and activations, `int4` weights in groups of 128.
        method: one of `METHODS[mode]`; None takes the first.
        excluded: names of nodes that stay in floating point.
        timeout: seconds after which the work is given up.
    """

    mode: Mode = "int8"
    method: str | None = None
    excluded: tuple[str, ...] = ()
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if self.mode not in METHODS:
            raise UsageError(f"modelopt: mode: expected one of {', '.join(METHODS)}; received {self.mode!r}.")
        if self.method is not None and self.method not in METHODS[self.mode]:
            raise UsageError(
                f"modelopt: method: expected one of {', '.join(METHODS[self.mode])} for {self.mode}; received "
                f"{self.method!r}."
            )


def quantize_onnx(
    model: Path,
    out: Path,
    batches: Sequence[Batch],
    python: Path,
    quantizer: Quantizer | None = None,
    progress: Progress = lambda task, done, total: None,
) -> None:
    """Quantize the matrix products of an ONNX model that have a stored weight.

    Args:
        model: a float ONNX file of standard operators, with its external data in `<model>.data` if it has some.
        out: the Q/DQ file; replaced only when the work is done.
        batches: values of every model input, one mapping for each call that calibrates.
        python: interpreter of the environment, see `environment.find`.
        quantizer: what to do; int8 with `max` by default.
        progress: called with (task, done, total).

    Raises:
        UsageError: no batches.
        StepfoldError: modelopt failed or took too long; the message ends with what it said.
    """
    if not batches:
        raise UsageError("modelopt: expected at least one calibration batch; received none.")
    quantizer = quantizer or Quantizer()
    with tempfile.TemporaryDirectory(prefix=".modelopt-", dir=out.parent) as name:
        scratch = Path(name)
        result = scratch / "result" / out.name
        settings = _write_settings(scratch, model, result, batches, quantizer)
        _work([str(python), "-I", str(WORKER), str(settings)], scratch, model, quantizer, progress)
        if not result.exists():
            raise _failed(quantizer, model, "it wrote no model", scratch)
        data = result.with_name(f"{out.name}.data")
        if data.exists():
            os.replace(data, out.with_name(data.name))
        os.replace(result, out)  # last: it is what readers look for


def _write_settings(scratch: Path, model: Path, result: Path, batches: Sequence[Batch], quantizer: Quantizer) -> Path:
    """Everything the worker reads, in a folder of its own: modelopt writes beside the model it is given."""
    result.parent.mkdir()
    data = model.with_name(f"{model.name}.data")
    for file in (model, data) if data.exists() else (model,):
        shutil.copyfile(file, scratch / file.name)
    arrays = {f"{i}/{name}": value for i, batch in enumerate(batches) for name, value in batch.items()}
    np.savez(scratch / "batches.npz", **arrays)  # type: ignore[arg-type]
    document: dict[str, Any] = {
        "model": str(scratch / model.name),
        "out": str(result),
        "batches": str(scratch / "batches.npz"),
        "mode": quantizer.mode,
        "method": quantizer.method or METHODS[quantizer.mode][0],
        "operators": ["MatMul", "Gemm"],
        "excluded": list(quantizer.excluded),
        "external_data": data.exists(),
    }
    path = scratch / "settings.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def _work(command: list[str], scratch: Path, model: Path, quantizer: Quantizer, progress: Progress) -> None:
    """Run the worker to its end; whatever interrupts the wait ends it as well."""
    with (scratch / "stderr").open("wb") as errors:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, cwd=scratch, text=True, start_new_session=True
            )
        except OSError as error:
            raise StepfoldError(f"modelopt: expected to start {command[0]}; received: {error}.") from error
    try:
        _follow(process, time.monotonic() + quantizer.timeout, f"modelopt {quantizer.mode}", progress)
    except TimeoutError:
        raise _failed(quantizer, model, f"it was not done after {quantizer.timeout:g} s", scratch) from None
    finally:
        _end(process)
    if process.returncode != 0:
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise _failed(quantizer, model, f"its process {how}", scratch)


def _follow(process: subprocess.Popen[str], deadline: float, task: str, progress: Progress) -> None:
    """Pass on progress until the worker ends.

    Raises:
        TimeoutError: it was not done by the deadline.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    assert process.stdout is not None
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            break
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a foreign Python may print anything
            done, total = json.loads(line)["progress"]
            progress(task, done, total)
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _read(stream: Any, lines: queue.SimpleQueue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # the stream is closed when the wait was given up
        for line in stream:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """End the worker and whatever it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a process group of its own
            else:
                process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _failed(quantizer: Quantizer, model: Path, what: str, scratch: Path) -> StepfoldError:
    lines = (scratch / "stderr").read_text(errors="replace").strip().splitlines()
    said = "\n".join(line.split("\r")[-1] for line in lines[-TAIL:]) or "(nothing on standard error)"
    return StepfoldError(f"modelopt {quantizer.mode} on {model.name}: {what}. It said:\n{said}")
