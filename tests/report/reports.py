"""Hand-written reports."""

from __future__ import annotations

from typing import Any


def row(name: str, median: float, psnr: float | None = None, kind: str = "bundle", **more: Any) -> dict[str, Any]:
    """A row whose calls are the median, one below and one above."""
    calls = [0.9 * median, median, 1.1 * median]
    return {
        "name": name,
        "kind": kind,
        "latency_ms": {"median": median, "p10": calls[0], "p90": calls[2], "n": 3, "samples_ms": calls},
        "speedup": None,
        "evaluations": 8,
        "psnr_db": None if psnr is None else {"mean": psnr, "min": psnr - 5, "low": psnr - 1, "p05": psnr - 3},
        "ssim": None if psnr is None else 0.98,
        "drift": None if psnr is None else 0.01,
        "size_bytes": 1000,
        "peak_memory_bytes": 50_000_000,
        **more,
    }


def report(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A report with these rows."""
    return {
        "protocol": {
            "warmup": 1,
            "repeats": 3,
            "interleaved": True,
            "threads": 2,
            "count": 10,
            "quality_count": 64,
            "seed": 5,
            "guidance": 2.0,
            "reference": {"class": "Tiny", "weights_sha256": "ab" * 32},
        },
        "machine": {"cpu": "Test CPU", "physical_cores": 2, "memory_bytes": 8_000_000_000, "versions": {"numpy": "2"}},
        "rows": list(rows),
        "skipped": [],
        **more,
    }


def manifest(**more: Any) -> dict[str, Any]:
    """The manifest of a loop bundle with one pass, as `describe_bundle` gives it."""
    port = {"name": "hidden_states", "shape": [None, 1, 8, 8], "dtype": "float32"}
    return {
        "name": "tiny",
        "model": {"class": "Tiny", "weights_sha256": "ab" * 32},
        "recipe": {"name": "int8"},
        "backend": {"name": "onnxruntime", "version": "1.31", "device": "cpu"},
        "batch_invariant": False,
        "loop": {"sampler": {"scheduler": "EulerDiscreteScheduler", "steps": 8}, "guidance": {"scale": 2.0}},
        "quality": {
            "psnr_db": {"mean": 41.25, "min": 30.0, "low": 40.5, "p05": 33.0},
            "samples": 64,
            "set": "held-out",
        },
        "schedule": {"grid_steps": 8, "evaluations": 3, "guided_evaluations": 2, "fitted_on": "engine"},
        "schedule_file": {
            "grid_steps": 8,
            "scales": [
                {
                    "scale": 2.0,
                    "positions": [0, 2, 5],
                    "evaluations": 3,
                    "guided_evaluations": 2,
                    "fitted_on": "engine",
                }
            ],
        },
        "passes": [
            {
                "name": "quantize",
                "outcome": "changed",
                "changed": 14,
                "refused": [{"site": f"blocks.{i}", "reason": "bias is not rank 1"} for i in range(15)],
                "drift": 0.011,
                "total_drift": 0.012,
                "parameters_before": 6_120_000,
                "parameters_after": 3_600_000,
                "flops_before": 450_000_000,
                "flops_after": 450_000_000,
                "seconds": 4.2,
                "details": {},
            }
        ],
        "stages": [
            {"name": "step", "rate": "step", "file": "stages/step.onnx", "inputs": [port] * 6, "outputs": [port]}
        ],
        "files": {
            "stages/step.onnx": {"sha256": "", "bytes": 1_000_000},
            "stages/step.onnx.data": {"bytes": 2_000_000},
        },
        "frozen_dimensions": [],
        **more,
    }
