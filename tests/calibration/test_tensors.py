"""Safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepfold.calibration.tensors import TensorFileError, open_tensors, shapes_of, write_tensors

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b": np.array([1, -2], np.int64),
    "empty": np.empty((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}


def write(path: Path, arrays=ARRAYS, **metadata: str) -> Path:
    with path.open("wb") as stream:
        write_tensors(stream, shapes_of(arrays), arrays.values(), metadata)
    return path


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "file", key="value")
    found = load_file(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = open_tensors(write(tmp_path / "file", key="value"))
    assert file.metadata == {"key": "value"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert file.shapes[name] == (array.dtype, array.shape)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "file")
    file = open_tensors(tmp_path / "file")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(3, 4).T
    np.testing.assert_array_equal(open_tensors(write(tmp_path / "file", {"a": array})).read("a"), array)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_file_that_is_cut_short(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "file")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TensorFileError, match=r"cut short|expected \d+ bytes; received"):
        open_tensors(path)


def test_a_file_with_more_behind_it(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TensorFileError, match=r"expected .* bytes; received"):
        open_tensors(path)


def damaged(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        damaged(b"{nonsense"),
        damaged([1]),
        damaged({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        damaged({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        damaged({"a": {"dtype": "F64", "shape": [-1, -1], "data_offsets": [0, 8]}}, bytes(8)),
        damaged({"a": {"dtype": "F64", "shape": [1]}}, bytes(8)),
        damaged({"a": {"dtype": "F64", "shape": [1], "data_offsets": [-8, 0]}}, bytes(8)),
    ],
)
def test_a_damaged_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match="its header is damaged"):
        open_tensors(path)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="no tensor 'c'"):
        open_tensors(write(tmp_path / "file")).read("c")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {"a": np.arange(10.0)})
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TensorFileError, match="'a' is cut short"):
        file.read("a")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(TensorFileError, match="no regular file"):
        open_tensors(tmp_path / "x")
