"""A tiny bundle, written by hand: `sample = x * weight + shift`, `shift = embedding[class] * timestep / 1000`."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from stepfold.bundle import Manifest, Probe, Tables, write_manifest, write_probe, write_schedule, write_tables, writing
from stepfold.loop.budget import QualityBudget
from stepfold.loop.plan import fold
from stepfold.loop.recurrence import Recurrence

if TYPE_CHECKING:
    from stepfold.ir.program import Program

settings.register_profile("stepfold", deadline=None, derandomize=True)  # no absolute times, the same cases each run
settings.load_profile("stepfold")
gc.disable()  # while packages are imported: what they make stays, and would be searched again and again


def pytest_collection_finish() -> None:
    """Search for garbage seldom, and never among half a million objects of PyTorch and the model libraries."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


UNTIL = "TESTS_UNTIL"
"""Environment variable: seconds since the epoch after which no test begins. `.ci/run` has a limit, and machines differ."""
OUT_OF_TIME = "out of time: the run was to begin no test after this moment"


@pytest.hookimpl(tryfirst=True)  # before fixtures, which may be the long part
def pytest_runtest_setup() -> None:
    """Skip what would begin too late."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests did not begin; a skipped one is easily overlooked."""
    late = [one for one in terminalreporter.stats.get("skipped", []) if OUT_OF_TIME in str(one.longrepr)]
    if late:
        terminalreporter.section("out of time")
        terminalreporter.write_line(f"{len(late)} tests were not run. `make test-all` runs them.")


LATENT = (1, 2, 2)
EMBEDDING = np.array([[0.1], [0.2], [0.3], [0.4], [-0.5]], np.float32)  # the last row is the unconditional one
WEIGHT = np.array([[0.5, -0.25], [0.125, 1.0]], np.float32)
STEPS = 4
TIMESTEPS = np.array([1000.0, 750.0, 500.0, 250.0])
LOOP = {
    "inputs": {"hidden_states": "state", "timestep": "timestep", "class_labels": "condition"},
    "sampler": {"scheduler": "FlowMatchEulerDiscreteScheduler", "steps": STEPS},
    "guidance": {"scale": {"values": [2.0, 3.0]}, "unconditional": {"class_labels": 4}},
    "latent": {"shape": list(LATENT)},
}


def euler() -> Recurrence:
    """x <- x - v / 4, four times."""
    return Recurrence(TIMESTEPS, np.ones(STEPS), np.ones(STEPS), -np.eye(STEPS) / STEPS, 1.0)


def denoise(latents: np.ndarray, timestep: float, labels: np.ndarray) -> np.ndarray:
    """What the stages compute, in NumPy."""
    return latents * WEIGHT + (EMBEDDING[labels] * timestep / 1000.0)[:, :, None, None]


@dataclass(frozen=True)
class Tiny:
    """Builds the bundle and knows what it must compute."""

    build: Callable[..., Path]
    denoise: Callable[[np.ndarray, float, np.ndarray], np.ndarray]
    recurrence: Recurrence

    def sample(self, noise: np.ndarray, labels: np.ndarray, scale: float, positions: tuple[int, ...]) -> np.ndarray:
        """The loop written out: Euler, reusing the newest output at the calls that are not evaluated."""
        latents, output = noise.copy(), np.zeros_like(noise)
        for call, timestep in enumerate(TIMESTEPS):
            if call in positions:
                conditional = self.denoise(latents, timestep, labels)
                unconditional = self.denoise(latents, timestep, np.full_like(labels, 4))
                output = unconditional + scale * (conditional - unconditional)
            latents = latents - output / STEPS
        return latents


def write_stages(folder: Path, timestep_table: bool) -> None:
    """`embed.onnx`, and `step.onnx` whose weight lies in a file beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: list[int | None], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["B" if size is None else size for size in shape])

    def save(name: str, nodes: list, inputs: list, outputs: list, weights: dict, **options: Any) -> None:
        initializers = [numpy_helper.from_array(array, key) for key, array in weights.items()]
        graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save_model(model, str(folder / f"{name}.onnx"), **options)

    shift = value("shift", [None, 1])
    labels, time = value("class_labels", [None], TensorProto.INT64), value("timestep", [None])
    if timestep_table:
        nodes = [
            helper.make_node("Gather", ["embedding", "class_labels"], ["row"]),
            helper.make_node("Mul", ["row", "time"], ["shift"]),
        ]
        inputs, weights = [labels, value("time", [None, 1])], {"embedding": EMBEDDING}
    else:
        nodes = [
            helper.make_node("Gather", ["embedding", "class_labels"], ["row"]),
            helper.make_node("Mul", ["timestep", "thousandth"], ["part"]),
            helper.make_node("Unsqueeze", ["part", "one"], ["column"]),
            helper.make_node("Mul", ["row", "column"], ["shift"]),
        ]
        inputs = [labels, time]
        weights = {
            "embedding": EMBEDDING,
            "thousandth": np.array(1e-3, np.float32),
            "one": np.array([1], np.int64),
        }
    save("embed", nodes, inputs, [shift], weights)
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[2, 3]),
        helper.make_node("Mul", ["hidden_states", "weight"], ["scaled"]),
        helper.make_node("Unsqueeze", ["shift", "axes"], ["wide"]),
        helper.make_node("Add", ["scaled", "wide"], ["sample"]),
    ]
    latent = [None, *LATENT]
    save(
        "step",
        nodes,
        [value("hidden_states", latent), shift],
        [value("sample", latent)],
        {"weight": WEIGHT},
        save_as_external_data=True,
        location="step.onnx.data",
        size_threshold=0,
    )


def manifest(loop: Mapping[str, Any] | None, probe: str | None, timestep_table: bool) -> dict[str, Any]:
    """The manifest of the tiny bundle, without its files."""
    state = {"name": "hidden_states", "shape": [None, *LATENT], "dtype": "float32"}
    time = {"name": "timestep", "shape": [None], "dtype": "float32"}
    labels = {"name": "class_labels", "shape": [None], "dtype": "int64"}
    shift = {"name": "shift", "shape": [None, 1], "dtype": "float32"}
    row = {"name": "time", "shape": [None, 1], "dtype": "float32"}
    return {
        "stepfold_version": "0.1.0",
        "model": {"class": "Tiny", "weights_sha256": "0" * 64},
        "recipe": {"name": "tiny", "passes": []},
        "loop": loop,
        "backend": {"name": "onnxruntime", "version": "1", "device": "cpu"},
        "batch_invariant": True,
        "seeds": {"seed": 0},
        "inputs": [
            {**state, "role": "state"},
            {**time, "role": "timestep"},
            {**labels, "role": "condition", "cardinality": 5},
        ],
        "outputs": ["sample"],
        "constants": {"return_dict": False},
        "probe": probe,
        "stages": [
            {
                "name": "embed",
                "rate": "once×timestep",
                "file": "stages/embed.onnx",
                "inputs": [labels, row if timestep_table else time],
                "outputs": [shift],
            },
            {
                "name": "step",
                "rate": "step",
                "file": "stages/step.onnx",
                "inputs": [state, shift],
                "outputs": [{**state, "name": "sample"}],
            },
        ],
    }


def names_of(stages: Sequence[Any]) -> list[str]:
    """The names of stages, given as entries or as their content."""
    return [stage["name"] if isinstance(stage, dict) else stage.name for stage in stages]


def build(out: Path, *, timestep_table: bool = False, loop: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """Write the tiny bundle.

    Args:
        out: its folder.
        timestep_table: take `timestep / 1000` from a table of rate `timestep` instead of computing it.
        loop: replaces parts of the loop.
        changes: replace keys of the manifest.
    """
    recurrence = euler()
    latents = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, *LATENT)
    labels = np.array([1, 3])
    inputs = {"hidden_states": latents, "timestep": np.full(2, 750, np.float32), "class_labels": labels}
    table = (TIMESTEPS / 1000).astype(np.float32)[:, None]
    fitted = {scale: fold(recurrence, scale, (0, 2)) for scale in (2.0, 3.0)}
    tables = Tables(recurrence, fitted, {"time": table} if timestep_table else {})
    with writing(out) as folder:
        (folder / "stages").mkdir()
        write_stages(folder / "stages", timestep_table)
        write_tables(folder, tables)
        write_schedule(folder, tables, "reference", {})
        outputs = {"sample": denoise(latents, 750, labels)}
        probe = write_probe(folder, Probe(inputs, outputs, 1e-4, 1 if timestep_table else None))
        content = manifest({**LOOP, **(loop or {})}, probe, timestep_table) | changes
        content.setdefault("slots", [{"name": name, "variants": [name]} for name in names_of(content["stages"])])
        write_manifest(folder, Manifest.model_validate(content))
    return out


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Builder and reference of the tiny bundle."""
    return Tiny(build, denoise, euler())


@pytest.fixture(scope="session")
def read_only_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny bundle for tests that do not change it."""
    return build(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A tiny bundle to damage."""
    return build(tmp_path / "tiny")


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep reference trajectories of tests out of the user's cache; all processes of a run share what one has computed."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPFOLD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny class-conditional DiT with a loop of eight calls; for tests that do not change it."""
    from checkpoints import save_tiny_dit

    return save_tiny_dit(tmp_path_factory.mktemp("checkpoints") / "tiny_dit")


@pytest.fixture(scope="session")
def tiny_program(tiny_checkpoint: Path) -> Program:
    """The captured tiny DiT, before any pass."""
    from stepfold.frontend.load import load_checkpoint

    return load_checkpoint(tiny_checkpoint).capture()


@pytest.fixture
def captured_once(tiny_checkpoint: Path, tiny_program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the tiny DiT captured, which takes longer than most of what they do."""
    from checkpoints import load_captured

    load_captured(monkeypatch, tiny_checkpoint, tiny_program)


@pytest.fixture(scope="session")
def reference_program() -> Program:
    """The program of the reference checkpoint."""
    from stepfold.frontend.load import load_checkpoint

    return load_checkpoint(Path(__file__).parents[1] / "examples" / "mnist_dit").capture()


@pytest.fixture(scope="session")
def compiled_bundle(tiny_checkpoint: Path, tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DiT through `optimize` with the default recipe; for tests that do not change it."""
    from checkpoints import QUICK, load_captured

    from stepfold.runtime.compiler import Job, optimize

    out = tmp_path_factory.mktemp("compiled") / "tiny"
    settings = [("schedule", name, value) for name, value in QUICK.items()]
    with pytest.MonkeyPatch.context() as patch:
        load_captured(patch, tiny_checkpoint, tiny_program)
        optimize(
            Job(tiny_checkpoint, out, settings=settings, min_psnr=QualityBudget(mean=30)),
            lambda task, done, total: None,
        )
    return out
