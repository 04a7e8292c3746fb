"""FLOPs, quality and time of an evaluation of pruned programs of the reference checkpoint, nothing trained.

    python benchmarks/prune.py [--rows "least squares;4 of 8 blocks"] [--repeats 15] [--seed 12345]

Quality is that of samples over all 50 steps of the sampler, of a seed used for nothing else, on ONNX Runtime in float32.
An evaluation is one of ten samples with guidance; the programs of both engines take turns. Prints the table of
docs/passes/prune.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepfold.frontend.load import load_checkpoint
from stepfold.ir.cost import program_flops
from stepfold.ir.program import Program
from stepfold.loop.ports import BoundProgram
from stepfold.passes.base import silent
from stepfold.passes.manager import run_passes
from stepfold.passes.recipe import load_recipe
from stepfold.runtime.compiler import make_context
from stepfold.runtime.workshop import workshop

REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "mnist_dit"
ENGINES = ("onnxruntime", "openvino")
BATCH = 20
"""Ten samples, each with and without its class."""
SAME = {"distribute": "uniform"}
ROWS: Mapping[str, Mapping[str, Any] | None] = {
    "whole": None,
    "fluctuation, none": {**SAME, "compensate": "none"},
    "fluctuation, mean": {**SAME, "compensate": "mean"},
    "fluctuation, least squares": SAME,
    "wanda, none": {**SAME, "criterion": "wanda", "compensate": "none"},
    "wanda, least squares": {**SAME, "criterion": "wanda"},
    "magnitude, none": {**SAME, "criterion": "magnitude", "compensate": "none"},
    "magnitude, least squares": {**SAME, "criterion": "magnitude"},
    "fluctuation, least squares, by sensitivity": {},
    "half of the channels": {"ratio": 0.5},
    "5 of 6 heads": {"keep": {"heads": 0.83}, "distribute": "uniform"},
    "0.7 of the FLOPs": {"budget": {"flops": 0.7}},
    "7 of 8 blocks": {"method": "depth", "ratio": 0.125},
    "6 of 8 blocks": {"method": "depth", "ratio": 0.25},
}
"""Options of `prune`; a quarter of the hidden channels goes unless they say otherwise."""


@dataclass(frozen=True)
class Made:
    """A pruned program and what its record says.

    Attributes:
        program: program to time.
        psnr_db: mean PSNR of held-out samples; None for the whole program.
    """

    program: Program
    psnr_db: float | None


def made(names: Sequence[str], seed: int) -> dict[str, Made]:
    """The programs of some rows."""
    original, found = load_checkpoint(REFERENCE).capture(), dict[str, Made]()
    with workshop(ENGINES[0]) as shop:
        context = make_context(original, shop, seed, None, silent)
        whole = run_passes(original, load_recipe({"passes": [{"hoist": {}}]}).steps(), context)
        for name in names:
            print(f"pruning: {name}", file=sys.stderr, flush=True)
            options = ROWS[name]
            if options is None:
                found[name] = Made(whole, None)
                continue
            program = run_passes(whole, load_recipe({"passes": [{"prune": dict(options)}]}).steps(), context)
            found[name] = Made(program, program.records[-1].psnr_db)
            print(f"  {found[name].psnr_db:.1f} dB", file=sys.stderr, flush=True)
    return found


def milliseconds(programs: Mapping[str, Program], engine: str, repeats: int) -> dict[str, float]:
    """Median time of an evaluation of each program, one after the other in every round."""
    with workshop(engine) as shop:
        bound = {name: shop.open(program) for name, program in programs.items()}
        inputs = {name: _batch(program) for name, program in programs.items()}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for round_number in range(repeats + 2):
            for name in programs:
                taken = _time(bound[name], inputs[name])
                if round_number > 1:
                    times[name].append(taken)
    return {name: 1e3 * float(np.median(listed)) for name, listed in times.items()}


def _batch(program: Program) -> dict[str, np.ndarray]:
    return {name: np.resize(value.numpy(), (BATCH, *value.shape[1:])) for name, value in program.example.items()}


def _time(bound: BoundProgram, inputs: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    bound.evaluate(dict(inputs), 0)
    return time.perf_counter() - start


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=";".join(ROWS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    found = made(options.rows.split(";"), options.seed)
    programs = {name: item.program for name, item in found.items()}
    times = {engine: milliseconds(programs, engine, options.repeats) for engine in ENGINES}
    whole = program_flops(next(iter(programs.values())))
    print("| program | FLOPs | PSNR, held out | ms on ONNX Runtime | ms on OpenVINO |")
    print("|---|---|---|---|---|")
    for name, item in found.items():
        quality = "reference" if item.psnr_db is None else f"{item.psnr_db:.1f} dB"
        cells = " | ".join(f"{times[engine][name]:.1f}" for engine in ENGINES)
        print(f"| {name} | {program_flops(item.program) / whole:.2f} | {quality} | {cells} |")


if __name__ == "__main__":
    main()
