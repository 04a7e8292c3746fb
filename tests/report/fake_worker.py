"""Speaks the protocol of `stepfold.report.worker` without an engine; the name of the bundle says how it misbehaves.

Every request is written to the file $FAKE_LOG, with the state of the other workers while this one is sampling.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def main() -> None:
    os.setpgid(0, 0)
    name = "unopened"
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "open":
            name = Path(message["row"]["path"]).name
        note(name, message)
        answer = act(name, message)
        tell(answer)


def tell(answer: dict) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def note(name: str, message: dict) -> None:
    log = Path(os.environ["FAKE_LOG"])
    others = {}
    if message["do"] == "sample" and log.exists():
        pids = {json.loads(line)["pid"] for line in log.read_text().splitlines()} - {os.getpid()}
        others = {str(pid): state(pid) for pid in pids}
    entry = {"pid": os.getpid(), "name": name, "others": others, "omp": os.environ["OMP_NUM_THREADS"], **message}
    with log.open("a") as stream:
        stream.write(json.dumps(entry) + "\n")


def state(pid: int) -> str | None:
    """The letter of /proc: T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def act(name: str, message: dict) -> dict:
    if message["do"] == "open":
        if name == "refuses":
            return {"error": {"kind": "UsageError", "message": "refuses: this engine is not installed."}}
        if name == "crashes-open":
            raise ValueError("no kernel for this operator")
        return {"answer": {"evaluations": 3, "size_bytes": 123}}
    if message["do"] == "sample":
        if name == "crashes":
            sys.stderr.write("Traceback (most recent call last):\nRuntimeError: engine fell over\n")
            sys.stderr.flush()
            os._exit(7)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if message["out"] is not None:
            noise = load_file(message["request"])["noise"][message["start"] : message["stop"]]
            np.save(message["out"], np.full_like(noise, np.nan) if name == "nan" else noise)
        tell({"progress": [1, 1]})
        return {"answer": {"seconds": 0.25 if name == "slow" else 0.002}}
    return {"answer": {"peak_memory_bytes": 4096}}


if __name__ == "__main__":
    main()
