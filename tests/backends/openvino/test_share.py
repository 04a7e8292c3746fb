"""Files of OpenVINO IR with weights in common read one file of weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.backends.openvino.session import open_session, weights_of
from stepfold.backends.openvino.share import share
from stepfold.backends.shared import SHARED
from stepfold.loop.errors import BundleError
from stepfold.loop.held import HeldFile, StageFiles
from stepfold.loop.ports import Port

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

N = 32  # 4 KiB a matrix of floats: as small as what is shared
RANDOM = np.random.default_rng(0)
COMMON, EARLY, LATE = (RANDOM.standard_normal((N, N)).astype(np.float32) for _ in range(3))
X, Y = Port("x", (None, N), "float32"), Port("y", (None, N), "float32")


def save(folder: Path, name: str, *weights: np.ndarray, loops: int = 0) -> Path:
    """`y = x w0 w1...`; the last product in the body of a loop, where there are loops."""
    from openvino import opset13 as ops

    def product(value: Any, weight: np.ndarray) -> Any:
        return ops.matmul(value, ops.constant(weight), False, False)

    x = ops.parameter([-1, N], np.float32, name="x")
    x.output(0).set_names({"x"})
    value = x
    for weight in weights[: len(weights) - bool(loops)]:
        value = product(value, weight)
    if loops:
        inner = ops.parameter([-1, N], np.float32)
        true = ops.constant(np.array(True))
        result = product(inner, weights[-1])
        body = openvino.Model([result, true], [inner])
        loop = ops.loop(ops.constant(np.array(loops, np.int64)), ops.constant(np.array(True)))
        loop.set_function(body)
        loop.set_special_body_ports([-1, 1])
        loop.set_merged_input(inner, value.output(0), result.output(0))
        value = loop.get_iter_value(result.output(0), -1)
        value.set_names({"y"})
        model = openvino.Model([ops.result(value)], [x], name)
    else:
        value.output(0).set_names({"y"})
        model = openvino.Model([ops.result(value)], [x], name)
    file = folder / f"{name}.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    return file


def run(file: Path) -> bytes:
    session = open_session(file, (X,), (Y,), threads=1, options=OpenvinoOptions())
    return session({"x": np.linspace(-1, 1, 3 * N, dtype=np.float32).reshape(3, N)})[0].tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_common_weights_are_stored_once(tmp_path: Path) -> None:
    files = [save(tmp_path, "early", COMMON, EARLY), save(tmp_path, "late", LATE, COMMON)]
    outputs = [run(file) for file in files]
    shared = share(files)
    assert shared is not None and (shared.file, shared.readers) == (tmp_path / SHARED, tuple(files))
    assert shared.saved_bytes == COMMON.nbytes
    assert contents(tmp_path).keys() == {"early.xml", "late.xml", SHARED}
    assert len(shared.file.read_bytes()) == 3 * COMMON.nbytes
    assert [weights_of(file, StageFiles(tmp_path)) for file in files] == [shared.file.name] * 2
    assert [run(file) for file in files] == outputs and outputs[0] != outputs[1]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps of Linux")
def test_two_sessions_map_the_file_and_the_system_holds_it_once(tmp_path: Path) -> None:
    """Each has the pages in its address space; by halves they add up to the file."""
    files = [save(tmp_path, "early", COMMON, EARLY), save(tmp_path, "late", LATE, COMMON)]
    shared = share(files)
    assert shared is not None
    sessions = [open_session(file, (X,), (Y,), threads=1, options=OpenvinoOptions()) for file in files]
    size = shared.file.stat().st_size
    mappings = re.findall(
        rf"^[0-9a-f]+-[0-9a-f]+ r.*{re.escape(str(shared.file))}\n(?:.*\n)*?Rss: +(\d+) kB\n(?:.*\n)*?Pss: +(\d+) kB$",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE,
    )
    assert len(mappings) == len(sessions)
    assert 1024 * sum(int(pss) for _, pss in mappings) <= size < 1024 * sum(int(rss) for rss, _ in mappings)


def test_weights_within_the_body_of_a_loop(tmp_path: Path) -> None:
    files = [save(tmp_path, "early", EARLY, COMMON, loops=2), save(tmp_path, "late", COMMON)]
    outputs = [run(file) for file in files]
    shared = share(files)
    assert shared is not None and shared.saved_bytes >= COMMON.nbytes
    assert [run(file) for file in files] == outputs


def test_files_with_nothing_in_common_stay(tmp_path: Path) -> None:
    files = [save(tmp_path, "early", EARLY), save(tmp_path, "late", LATE)]
    before = contents(tmp_path)
    assert share(files) is None and contents(tmp_path) == before
    assert [weights_of(file, StageFiles(tmp_path)) for file in files] == ["early.bin", "late.bin"]


def test_a_third_file_keeps_its_own(tmp_path: Path) -> None:
    early, other, late = (save(tmp_path, n, w) for n, w in (("early", COMMON), ("other", EARLY), ("late", COMMON)))
    before = run(other)
    shared = share([early, other, late])
    assert shared is not None and shared.readers == (early, late)
    assert weights_of(other, StageFiles(tmp_path)) == "other.bin" and run(other) == before


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    files = [save(tmp_path / "first", "early", COMMON, EARLY), save(tmp_path / "first", "late", LATE, COMMON)]
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("first", "second"):
        share([tmp_path / name / file.name for file in files])
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_without_any_weights_the_file_is_not_opened(tmp_path: Path) -> None:
    files = [save(tmp_path, "early", COMMON, EARLY), save(tmp_path, "late", LATE, COMMON)]
    shared = share(files)
    assert shared is not None
    shared.file.unlink()
    with pytest.raises(BundleError, match=r"early\.xml: OpenVINO .* cannot load it"):
        run(files[0])


def test_weights_that_are_added_beside_a_stage_are_not_read(tmp_path: Path) -> None:
    """A `.bin` of the stage's name would win over the file that the bundle lists."""
    files = [save(tmp_path, "early", COMMON, EARLY), save(tmp_path, "late", LATE, COMMON)]
    shared = share(files)
    assert shared is not None
    held = StageFiles(tmp_path, {path.name: HeldFile(path) for path in (files[0], shared.file)})
    before = run(files[0])
    (tmp_path / "early.bin").write_bytes(bytes(shared.file.stat().st_size))
    shared.file.unlink()
    session = open_session(files[0], (X,), (Y,), threads=1, options=OpenvinoOptions(), files=held)
    assert session({"x": np.linspace(-1, 1, 3 * N, dtype=np.float32).reshape(3, N)})[0].tobytes() == before
