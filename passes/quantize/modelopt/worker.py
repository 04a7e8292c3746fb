"""Runs modelopt's ONNX quantizer, in the environment that has it. Imports nothing of stepfold.

    python -I worker.py SETTINGS.json

Settings: `model`, `out`, `batches` (files), `mode`, `method`, `operators`, `excluded`, `external_data`. Batches are an
.npz whose keys are `<number>/<input>`. Standard output gets one JSON object a line: `{"progress": [done, total]}`;
everything that libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def main(path: str) -> None:
    """Quantize as the settings file says."""
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    quantize(settings, protocol)


def quantize(settings: dict[str, Any], protocol: Any) -> None:
    """Call modelopt; the result takes its place when it is complete."""
    from modelopt.onnx.quantization import quantize as modelopt_quantize  # pyright: ignore[reportMissingImports]

    out = Path(settings["out"])
    with np.load(settings["batches"], allow_pickle=False) as archive:
        modelopt_quantize(
            settings["model"],
            quantize_mode=settings["mode"],
            calibration_method=settings["method"],
            calibration_data_reader=make_reader(archive, protocol),
            calibration_eps=["cpu"],
            op_types_to_quantize=settings["operators"],
            nodes_to_exclude=settings["excluded"],
            high_precision_dtype="fp32",
            mha_accumulation_dtype="fp32",
            use_external_data_format=settings["external_data"],
            output_path=str(out.with_name("unfinished.onnx")),
            log_level="WARNING",
        )
    finish(out)


def finish(out: Path) -> None:
    """Move the result to its place; external data, if any, keeps its name, which the model refers to."""
    import onnx

    unfinished = out.with_name("unfinished.onnx")
    data = unfinished.with_name("unfinished.onnx_data")
    if data.exists():
        model = onnx.load(str(unfinished), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{out.name}.data"
        onnx.save(model, str(unfinished))
        os.replace(data, f"{out}.data")
    os.replace(unfinished, out)


def make_reader(archive: Any, protocol: Any) -> Any:
    """A calibration data reader of ONNX Runtime that loads one batch at a time and reports how far it is."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    numbers = sorted({int(key.partition("/")[0]) for key in archive.files})

    def batch(number: int) -> dict[str, np.ndarray]:
        prefix = f"{number}/"
        return {key.removeprefix(prefix): archive[key] for key in archive.files if key.startswith(prefix)}

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for done, number in enumerate(numbers):
            yield batch(number)
            protocol.write(json.dumps({"progress": [done + 1, len(numbers)]}) + "\n")
            protocol.flush()

    class Reader(CalibrationDataReader):
        """Goes through the batches as often as asked."""

        def __init__(self) -> None:
            self.rewind()

        def __len__(self) -> int:
            return len(numbers)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

        def get_first(self) -> dict[str, np.ndarray]:
            return batch(numbers[0])

        def rewind(self) -> None:
            self._batches = batches()

    return Reader()


if __name__ == "__main__":
    main(sys.argv[1])
