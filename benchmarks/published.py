"""Pipeline folders against the pipelines themselves: which run in diffusers, which become exact bundles, which are refused.

    python benchmarks/published.py [FOLDER_OF_FOLDERS] [--only REGEX] [--rows FILE.jsonl] [--steps N] [--pixels N]

Without an argument, folders of random weights are made of the configurations in `benchmarks/published/`, once, under the
system's temporary folder. Everything goes through the command line: `stepfold optimize` with `passes: [hoist]`, which
changes no arithmetic, few steps and small images. A bundle is exact where its proof against the pipeline's own code and
its samples against the full loop both reach 100 dB. Rows that are in the file of `--rows` are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "published"
MADE = Path(tempfile.gettempdir()) / "stepfold-published"
PACKAGES = ("stepfold", "torch", "diffusers", "transformers", "onnxruntime")
EXACT_DB = 100.0  # a relative error of about 1e-5
SECONDS = 1200  # that one folder may take
CALL_OF_A_PIPELINE = "--call-of"
RECIPE = "name: exact\npasses: [hoist]\n"
LARGER: Mapping[str, int] = {"StableCascadePriorPipeline": 256}
"""Pipelines whose latents are smaller than those of others, and the size of their images."""
SHORTER: Mapping[str, int] = {"TextToVideoSDPipeline": 4}
"""Pipelines whose frames do not come in groups, and how many they make."""


@dataclass(frozen=True)
class Row:
    """What became of a folder.

    Attributes:
        name: The folder's.
        pipeline: Class of the pipeline.
        runs: Why it does not run in diffusers; empty where it does.
        outcome: `exact`, `wrong`, `refused` (exit code 2) or `failed`.
        latent_db: PSNR of the proof against the pipeline; None without a bundle.
        image_db: PSNR of the proof's images; None without a decoder.
        quality_db: PSNR of the bundle's samples against the full loop.
        reason: The error of stepfold, where there is no bundle.
    """

    name: str
    pipeline: str
    runs: str
    outcome: str
    latent_db: float | None = None
    image_db: float | None = None
    quality_db: float | None = None
    reason: str = ""


def small_call(pipeline: type[Any], steps: int, pixels: int) -> dict[str, Any]:
    """Arguments of a pipeline's call that keep it short: its names, as its signature has them."""
    parameters, name = inspect.signature(pipeline.__call__).parameters, pipeline.__name__
    size = LARGER.get(name, pixels)
    wanted = {
        "num_inference_steps": steps,
        "height": size,
        "width": size,
        "num_frames": SHORTER.get(name, 9),
        "use_resolution_binning": False,
    }
    both = {"height", "width"} <= parameters.keys()
    return {key: v for key, v in wanted.items() if key in parameters and (both or key not in ("height", "width"))}


OPTIONS = {"num_inference_steps": "--steps", "height": "--height", "width": "--width", "num_frames": "--frames"}


def words(call: Mapping[str, Any]) -> list[str]:
    """A call as options of stepfold."""
    found: list[str] = []
    for name, value in call.items():
        found += [OPTIONS[name], str(value)] if name in OPTIONS else ["--call", f"{name}={json.dumps(value)}"]
    return found


def run_pipeline(folder: Path, steps: int, pixels: int) -> dict[str, Any]:
    """Run a folder in diffusers with a prompt, and with an image where it asks for one; in a process of its own."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    answer: dict[str, Any] = {"pipeline": name, "call": {}, "runs": ""}
    try:
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        answer |= {"pipeline": type(pipeline).__name__, "call": small_call(type(pipeline), steps, pixels)}
        call_pipeline(pipeline, answer["call"], torch.full((1, 3, pixels, pixels), 0.5))
    except Exception as error:  # noqa: BLE001 (whatever a pipeline raises is its reason)
        answer["runs"] = reason_of(error)
        answer["call"] = answer["call"] or small_call(class_today(folder), steps, pixels)
    return answer


def class_today(folder: Path) -> type[Any]:
    """The class that a pipeline of another time has by now, for what its call is named; any where there is none."""
    import diffusers

    from stepfold.frontend.components import read_index
    from stepfold.loop.errors import UsageError

    try:
        found = getattr(diffusers, read_index(folder).class_name, None)
    except UsageError:
        found = None
    return found if isinstance(found, type) else diffusers.StableDiffusionPipeline


def call_pipeline(pipeline: Any, call: Mapping[str, Any], image: Any) -> None:
    """Call a pipeline, with an image [1, 3, H, W] only where it does not run without one.

    Raises:
        Exception: The pipeline does not run; without an image, where it takes none.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    given = {"prompt": "a photo of a cat", "class_labels": [1], "control_mode": 0}
    images = {"image": image, "control_image": image, "mask_image": image[:, :1]}
    known = {name: value for name, value in given.items() if name in parameters}
    pictured = {name: value for name, value in images.items() if name in parameters}
    try:
        pipeline(**known, **call)
    except Exception:
        if not pictured:
            raise
        pipeline(**known, **pictured, **call)


def reason_of(error: Exception) -> str:
    """The first line of an error, with its class."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]


def try_folder(folder: Path, steps: int, pixels: int) -> Row:
    """Run a folder in diffusers, and compile it."""
    asked = [sys.executable, __file__, CALL_OF_A_PIPELINE, str(folder), "--steps", str(steps), "--pixels", str(pixels)]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=SECONDS)
    answer = json.loads(ran.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as made:
        recipe = Path(made) / "exact.yaml"
        recipe.write_text(RECIPE)
        command = [sys.executable, "-m", "stepfold", "optimize", str(folder), "--out", str(Path(made) / "bundle")]
        built = subprocess.run(
            [*command, "--recipe", str(recipe), "--json", *words(answer["call"])],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    said = built.stderr.replace(f"{folder}: ", "").replace(str(folder), folder.name)
    return row_of(folder.name, answer, built.returncode, built.stdout, said)


def row_of(name: str, answer: Mapping[str, Any], code: int, out: str, err: str) -> Row:
    """The row of a folder from what its two processes said."""
    if code != 0:
        errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
        outcome = "refused" if code == 2 else "failed"
        return Row(name, answer["pipeline"], answer["runs"], outcome, reason=errors[0] if errors else err[-200:])
    document = json.loads(out)
    proof, quality = document["proof"] or {}, document["quality"] or {}
    samples = quality.get("latent_psnr_db") or quality.get("psnr_db") or {}  # of the loop, not of images
    figures = (proof.get("latent_db"), proof.get("image_db"), samples.get("min"))
    exact = figures[0] is not None and all(figure is None or figure >= EXACT_DB for figure in figures)
    return Row(name, answer["pipeline"], answer["runs"], "exact" if exact else "wrong", *figures)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown, and a line that counts them."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    lines = [
        "| folder | pipeline | runs in diffusers | bundle | latents, dB | images, dB | samples, dB | reason |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(number(value) for value in (row.latent_db, row.image_db, row.quality_db))
        reason = shorten(row.reason.replace("|", "\\|"), 240, placeholder=" ...")
        lines.append(
            f"| {row.name} | {row.pipeline} | {row.runs or 'yes'} | {row.outcome} | {figures} | {reason or '-'} |"
        )
    running = [row for row in rows if not row.runs]
    counts = {kind: sum(row.outcome == kind for row in running) for kind in ("exact", "wrong", "refused", "failed")}
    share = 100 * counts["exact"] / len(running) if running else 0.0
    counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return "\n".join(
        [*lines, "", f"{len(rows)} folders, {len(running)} run in diffusers: {counted} ({share:.0f} % exact)."]
    )


def versions() -> str:
    """What the rows were made with, as a sentence."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES) + "."


def made_folders(only: str) -> Iterator[Path]:
    """Tiny folders of the checkpoints whose names match, each made when it is asked for and kept as long as it would
    be made the same."""
    from tiny.folders import Checkpoint, make_once

    maker = b"".join(file.read_bytes() for file in sorted((HERE / "tiny").glob("*.py"))) + versions().encode()
    for file in sorted(CHECKPOINTS.glob("*.json"), key=lambda file: file.stem):
        if re.search(only, file.stem):
            of_these = hashlib.sha256(maker + file.read_bytes()).hexdigest()[:12]
            yield make_once(Checkpoint.read(file), MADE / of_these / file.stem)


def found_folders(folders: Path, only: str) -> Iterator[Path]:
    """Pipeline folders in a folder whose names match."""
    for folder in sorted(path for path in folders.iterdir() if (path / "model_index.json").is_file()):
        if re.search(only, folder.name):
            yield folder


def tried(folders: Iterator[Path], file: Path | None, steps: int, pixels: int) -> list[Row]:
    """A row for each folder; those in the file are taken from there, the others are added to it."""
    known: dict[str, Row] = {}
    if file is not None and file.is_file():
        known = {row["name"]: Row(**row) for row in map(json.loads, file.read_text().splitlines())}
    rows = []
    for folder in folders:
        row = known.get(folder.name) or try_folder(folder, steps, pixels)
        if file is not None and folder.name not in known:
            with file.open("a") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
        print(f"{row.name}: {row.outcome} {row.latent_db or row.reason[:100]}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="?", help="folder of pipeline folders (default: tiny ones are made)"
    )
    parser.add_argument("--only", default="", help="regular expression that names have to match")
    parser.add_argument("--rows", type=Path, help="file of rows, one JSON object a line, to read and to add to")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument(CALL_OF_A_PIPELINE, dest="alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.alone:
        print(json.dumps(run_pipeline(given.folders, given.steps, given.pixels)))
        return 0
    folders = made_folders(given.only) if given.folders is None else found_folders(given.folders, given.only)
    rows = tried(folders, given.rows, given.steps, given.pixels)
    print(f"{table(rows)}\n\nMade with {versions()}")
    return 1 if any(row.outcome == "wrong" and not row.runs for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
