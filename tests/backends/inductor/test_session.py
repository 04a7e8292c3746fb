"""Sessions of Inductor's objects: any batch, checked arrays, threads, other machines, damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import component
from threads import at_once

from stepfold.backends.inductor import session
from stepfold.backends.inductor.capability import capability
from stepfold.backends.inductor.description import ObjectDescription
from stepfold.backends.inductor.options import InductorOptions
from stepfold.ir.program import Stage
from stepfold.loop.errors import BundleError, StepfoldError, UsageError
from stepfold.loop.ports import Port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not capability().can_build, reason=capability().reason or "it builds here"),
]

OPTIONS = InductorOptions()


def two(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """first = 2 x, later = x + index."""
    return 2 * x, x + index[:, None]


@pytest.fixture(scope="module")
def stage() -> Stage:
    return component(two, torch.ones(2, 2), torch.arange(2)).step


@pytest.fixture(scope="module")
def file(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stepfold.backends.inductor.lower import lower

    return lower(stage, tmp_path_factory.mktemp("models"), options=OPTIONS)


@pytest.fixture
def copied(file: Path, tmp_path: Path) -> Path:
    """The object and its description, to be changed."""
    shutil.copytree(file.parent, tmp_path / "models")
    return tmp_path / "models" / file.name


def opened(file: Path, stage: Stage, **more: Any) -> Any:
    given = {"inputs": stage.inputs, "outputs": stage.outputs, "threads": 1, "options": OPTIONS, **more}
    return session.open_session(file, given.pop("inputs"), given.pop("outputs"), **given)


def request(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(2 * batch, dtype=np.float32).reshape(batch, 2), "index": np.full(batch, 5)}


def test_outputs_come_in_the_order_that_is_asked_for(file: Path, stage: Stage) -> None:
    later, first = opened(file, stage, outputs=stage.outputs[::-1], inputs=stage.inputs[::-1])(request(3))
    np.testing.assert_array_equal(first, 2 * request(3)["x"])
    np.testing.assert_array_equal(later, request(3)["x"] + 5)


def test_inputs_may_be_strided_or_read_only(file: Path, stage: Stage) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]
    frozen = np.ascontiguousarray(x)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (x, frozen):
            np.testing.assert_array_equal(opened(file, stage)({"x": value, "index": np.zeros(2, np.int64)})[0], 2 * x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", np.zeros((3, 2))),
        ("x", np.zeros((3, 3), np.float32)),
        ("x", np.zeros((2, 2), np.float32)),
        ("x", np.zeros((3, 2, 1), np.float32)),
        ("index", np.zeros(3, np.int32)),
        ("index", np.zeros(0, np.int64)),
    ],
    ids=["float64", "width", "batch", "rank", "int32", "empty"],
)
def test_arrays_that_do_not_fit_are_not_read(file: Path, stage: Stage, name: str, value: np.ndarray) -> None:
    with pytest.raises(
        StepfoldError, match=r"forward\.so: expected x \[B, 2\] float32, index \[B\] int64; received x \["
    ):
        opened(file, stage)(request(3) | {name: value})


def test_an_array_that_is_missing(file: Path, stage: Stage) -> None:
    with pytest.raises(KeyError, match="index"):
        opened(file, stage)({"x": np.zeros((1, 2), np.float32)})


def test_threads_belong_to_a_call(file: Path, stage: Stage) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    call = opened(file, stage, threads=before + 2)
    runner = call._runner

    class Runner:
        def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            seen.append(torch.get_num_threads())
            return runner.run(tensors)

    call._runner = Runner()
    call(request(1))
    assert seen == [before + 2] and torch.get_num_threads() == before

    class Failing:
        def run(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            raise RuntimeError("no memory\nat line 3")

    call._runner = Failing()
    with pytest.raises(StepfoldError, match=r"forward\.so: Inductor failed on x \[1, 2\] float32, .*: no memory$"):
        call(request(1))
    assert torch.get_num_threads() == before


def test_threads_that_share_a_session_take_turns(file: Path, stage: Stage) -> None:
    call, wrong = opened(file, stage), []

    def work(value: int) -> None:
        for _ in range(30):
            x = np.full((value, 2), value, np.float32)
            first, later = call({"x": x, "index": np.zeros(value, np.int64)})
            if not (np.array_equal(first, 2 * x) and np.array_equal(later, x)):
                wrong.append(value)

    at_once(work, (1, 2, 3))
    assert wrong == []


def test_another_object_at_the_same_place_is_the_one_that_is_opened(copied: Path, stage: Stage, tmp_path: Path) -> None:
    """The system's loader would take the one it has under that name, which is still in use."""
    from stepfold.backends.inductor.lower import lower

    first = opened(copied, stage)
    other = component(lambda x, index: (3 * x, x + index[:, None]), torch.ones(2, 2), torch.arange(2)).step
    (tmp_path / "other").mkdir()
    new = lower(other, tmp_path / "other", options=OPTIONS)
    copied.unlink()
    shutil.move(new, copied)
    second = opened(copied, stage)
    np.testing.assert_array_equal(second(request(2))[0], 3 * request(2)["x"])
    np.testing.assert_array_equal(first(request(2))[0], 2 * request(2)["x"])


# -- what is refused


def test_a_device_that_this_backend_lacks(file: Path, stage: Stage) -> None:
    with pytest.raises(UsageError, match=r"device: expected cpu, .* received 'cuda'"):
        opened(file, stage, device="cuda")


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ({"inputs": (Port("x", (None, 2), "float32"),)}, "expected the inputs x (float32, rank 2); received index"),
        ({"outputs": (Port("y", (None, 2), "int8"),)}, "expected the outputs y (int8, rank 2); received y (float32"),
    ],
)
def test_other_ports_are_refused(file: Path, stage: Stage, ports: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as error:
        opened(file, stage, **ports)
    assert message in str(error.value) and "forward.so" in str(error.value)


def describe(file: Path, **changes: Any) -> None:
    path = ObjectDescription.beside(file)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "plan9"}, "expected plan9 "),
        ({"machine": "pdp11"}, "pdp11, which it was compiled for; this is "),
        ({"instructions": ["sse", "avx1024"]}, "expected a processor with sse, avx1024, .* this one lacks .*avx1024"),
        ({"torch": "1.2.0"}, r"expected PyTorch 1\.2, which it was compiled by; received "),
    ],
)
def test_code_for_another_machine_is_not_opened(
    copied: Path, stage: Stage, changes: dict[str, Any], message: str
) -> None:
    describe(copied, **changes)
    copied.write_bytes(b"would be opened")
    with pytest.raises(UsageError, match=message) as caught:
        opened(copied, stage)
    assert "uild the bundle again" in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "half", "empty"])
def test_a_description_that_cannot_be_read(copied: Path, stage: Stage, content: str | None) -> None:
    ObjectDescription.beside(copied).unlink()
    if content is not None:
        ObjectDescription.beside(copied).write_text(content)
    with pytest.raises(BundleError, match=r"expected the description of forward\.so; .* Build it again\.$"):
        opened(copied, stage)


def test_a_description_of_a_newer_stepfold(copied: Path, stage: Stage) -> None:
    describe(copied, format_version=9)
    with pytest.raises(BundleError, match=r"expected format 1 or older; received 9\. Upgrade stepfold"):
        opened(copied, stage)


@pytest.mark.parametrize("content", [b"", b"no object"])
def test_a_file_that_is_no_object(copied: Path, stage: Stage, content: bytes) -> None:
    copied.write_bytes(content)
    with pytest.raises(BundleError, match=r"forward\.so: PyTorch [\w.+]+ cannot open it: \w") as caught:
        opened(copied, stage)
    assert len(str(caught.value).splitlines()) == 1 and "/tmp/stepfold-" not in str(caught.value)


# -- nothing is unpickled

WATCHED = """
import builtins, pickle, sys
for name in ("diffusers", "transformers", "onnx", "onnxscript"):
    sys.modules[name] = None
import torch
def never(*_, **__):
    raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = never
torch._C._pickle_load_obj = never
from pathlib import Path
import numpy as np
from stepfold.backends import get
from stepfold.backends.inductor.description import ObjectDescription
file = Path(sys.argv[1])
found = ObjectDescription.read(file)
call = get("inductor").open_session(file, found.input_ports(), found.output_ports(), threads=1)
print(call({"x": np.ones((3, 2), np.float32), "index": np.zeros(3, np.int64)})[0].tolist())
print([name for name in sys.modules if name.startswith(("stepfold.ir", "torch._inductor", "torch._dynamo."))])
"""


def test_a_session_unpickles_nothing_and_needs_no_model_code(copied: Path) -> None:
    """What PyTorch's own loader would look for beside an object is not found: a list of operators, and a pickle."""
    listed = {"nodes": [{"name": "n", "node": {}}], "custom": "custom_obj_0"}
    copied.with_suffix(".json").write_text(json.dumps(listed))
    (copied.parent / "custom_objs_config.json").write_text(json.dumps({"a": "custom_obj_0"}))
    (copied.parent / "custom_obj_0").write_bytes(b"no pickle")
    done = subprocess.run([sys.executable, "-c", WATCHED, str(copied)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]", "[]"]
