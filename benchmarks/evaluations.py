"""What an evaluation costs: programs without a schedule, so that all evaluate every call of the sampler.

Nothing is fitted to their errors. Bundles and baselines run in processes of their own and take turns. Quality is over
samples of a seed used for nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepfold.bundle import writing
from stepfold.frontend.load import load_checkpoint
from stepfold.ir.program import Program
from stepfold.passes.base import silent
from stepfold.passes.manager import run_passes
from stepfold.passes.recipe import load_recipe
from stepfold.report.bench import bench
from stepfold.runtime.compiler import Job, cache_folder, make_context, optimize
from stepfold.runtime.packing import pack
from stepfold.runtime.workshop import workshop


@dataclass(frozen=True)
class Model:
    """What is measured.

    Attributes:
        checkpoint: folder.
        steps: of its sampler.
        count: samples at once; guidance makes it twice as many rows for an evaluation.
        trained: whether its samples say anything; those of random weights are not measured, but for a single one.
    """

    checkpoint: Path
    steps: int
    count: int
    trained: bool = True


SAMPLES = 64
"""That quality is measured over."""
REFERENCE = Model(Path(__file__).resolve().parents[1] / "examples" / "mnist_dit", 50, 10)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of the folder of its bundle.
        passes: as in a recipe.
        backend: engine.
        settings: of the backend, as `--set` has them.
    """

    name: str
    passes: Sequence[Mapping[str, Any]]
    backend: str = "onnxruntime"
    settings: Sequence[tuple[str, str, Any]] = ()

    def build(self, model: Model, folder: Path) -> Path:
        """Compile it and return the bundle."""
        out = folder / self.name
        recipe = {"name": "benchmark", "passes": list(self.passes)}
        if not model.trained:
            options = {option: value for _, option, value in self.settings}
            return compiled(load_checkpoint(model.checkpoint).capture(), recipe, out, self.backend, options)
        job = Job(model.checkpoint, out, recipe=recipe, backend=self.backend, settings=self.settings)
        optimize(job, lambda task, done, total: None)
        return out


def compiled(
    original: Program, recipe: Mapping[str, Any], out: Path, backend: str, options: Mapping[str, Any] | None = None
) -> Path:
    """A bundle whose quality is not measured."""
    loaded = load_recipe(recipe)
    with workshop(backend, options) as shop:
        context = replace(make_context(original, shop, 0, None, silent), quality=None)
        program = run_passes(original, loaded.steps(), context)
        bound = shop.open(program)
        with writing(out) as folder:
            pack(folder, program, bound, shop, loaded, None, None)
    return out


def run(description: str, rows: Mapping[str, Row], baselines: Sequence[str], model: Model = REFERENCE) -> None:
    """Build the rows that the command line names, measure them in one run and print the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", default=";".join(rows))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    chosen = {name: rows[name] for name in options.rows.split(";")}
    with tempfile.TemporaryDirectory() as scratch:
        bundles = []
        for name, row in chosen.items():
            print(f"building {name}", file=sys.stderr)
            bundles.append(row.build(model, Path(scratch)))
        print("measuring", file=sys.stderr)
        found = bench(
            bundles,
            reference=model.checkpoint,
            baselines=tuple(baselines),
            count=model.count,
            quality_count=SAMPLES if model.trained else 1,
            repeats=options.repeats,
            seed=options.seed,
            cache=cache_folder(),
        ).document()
    measured = {row["name"]: row for row in found["rows"]}
    table = {name: measured[row.name] for name, row in chosen.items()} | {f"*{b}*": measured[b] for b in baselines}
    print_table(table, model)


def print_table(rows: Mapping[str, Mapping[str, Any]], model: Model) -> None:
    """Milliseconds of an evaluation, its ratio to the first baseline, quality and size."""
    whole = next(row["latency_ms"]["median"] for name, row in rows.items() if name.startswith("*"))
    print(f"| program | ms for an evaluation, batch {2 * model.count} | over plain float32 | PSNR | bytes |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        milliseconds = row["latency_ms"]["median"]
        print(
            f"| {name} | {milliseconds / model.steps:.1f} | {whole / milliseconds:.2f}x | {row['psnr_db']['mean']:.1f} dB | "
            f"{row['size_bytes'] / 1e6:.1f} MB |"
        )
