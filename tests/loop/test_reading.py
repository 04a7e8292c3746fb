"""Readers of foreign files: every kind of bad file is one error of the caller's class, and never anything else."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from safetensors.numpy import load, save, save_file

from stepfold.loop.array_files import read_arrays, read_npy, tensor_entries
from stepfold.loop.errors import BundleError, StepfoldError
from stepfold.loop.reading import DEEPEST, Expected, parse_json, read_bytes, read_json, read_text
from stepfold.loop.yaml_files import parse_yaml, read_yaml

THING = Expected("a thing", BundleError, "Make it again.")
NPY = b"\x93NUMPY\x01\x00"
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def refusal(read, *arguments: object) -> str:
    with pytest.raises(BundleError) as caught:
        read(*arguments, THING)
    message = str(caught.value)
    assert "expected a thing" in message and message.endswith("Make it again.") and len(message.splitlines()) == 1
    return message


def no_file(path: Path) -> None:
    path.unlink(missing_ok=True)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the name of a socket may not be long
        made.bind(path.name)


KINDS = {
    "there is no such file": no_file,
    "received a folder": Path.mkdir,
    "received a pipe": os.mkfifo,
    "No such device or address": a_socket,
    "received a device": lambda path: path.symlink_to("/dev/zero"),
    "Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml, read_npy, read_arrays, tensor_entries])
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, read) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / "x")
    assert kind in refusal(read, tmp_path / "x")


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "/".join(["n" * 200] * 25)])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    refusal(read_bytes, tmp_path / name)


def test_a_larger_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    assert read_bytes(tmp_path / "x", THING, 11) == bytes(11)
    with pytest.raises(BundleError, match="larger than the 10 bytes"):
        read_bytes(tmp_path / "x", THING, 10)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe{}")
    for read in (read_text, read_json, read_yaml):
        assert "no UTF-8 text" in refusal(read, tmp_path / "x")


JSON = {
    "": "no usable JSON",
    "{": "no usable JSON",
    "[" * 100_000: "levels",
    "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2): "levels",
    "9" * 5000: "a number of 5000 digits",
    "NaN": "the number NaN",
    "-Infinity": "the number -Infinity",
    "1e999": "the number 1e999",
    '{"a": 1, "a": 2}': "the key 'a' twice",
    "\ufeff{}": "BOM",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_is_guarded(text: str) -> None:
    assert JSON[text] in refusal(parse_json, text, "x")


def test_json_of_other_libraries() -> None:
    received = parse_json('{"a": 1, "a": [0.0, Infinity]}', "x", THING, strict=False)
    assert received == {"a": [0.0, float("inf")]}


YAML = {
    "a: [": "not a YAML text",
    "\tx: 1": "not a YAML text",
    "a: \0": "not a YAML text",
    "a: 1\n---\nb: 2": "not a YAML text",
    "<<: 5": "not a YAML text",
    "a: !!python/object/apply:os.system [x]": "received python/object/apply:os.system",
    "a: !evil x": "received !evil",
    "a: 2020-10-10": "received timestamp. Put it into quotes",
    "a: !!binary aGVsbG8=": "received binary",
    "a: !!set {x, y}": "received set",
    "a: !!int abc": "not a YAML text",
    "a: !!float abc": "not a YAML text",
    "a: !!bool abc": "not a YAML text",
    "a: 1\nb: 2\na: 3": "line 3: the key 'a' stands twice",
    "? [a]\n: b": "line 1: expected a word as a key",
    "[" * 5000: "levels",
    "[" * (DEEPEST + 2) + "]" * (DEEPEST + 2): "levels",
    "a: " + "9" * 5000: "a number of 5000 digits",
    "&a {inputs: *a}": "an alias that refers to itself",
    BOMB: "values, aliases written out",
    "a: 1\n" + BOMB + "b: {<<: [*a9, *a9]}": "values, aliases written out",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_is_guarded(text: str) -> None:
    assert YAML[text] in refusal(parse_yaml, text, "x")


def test_yaml_that_people_write() -> None:
    text = "base: &b {x: 1, y: [1.5, on, null]}\nother: {<<: *b, x: two}\n"
    value, node = parse_yaml(text, "x", THING)
    assert value == {"base": {"x": 1, "y": [1.5, True, None]}, "other": {"x": "two", "y": [1.5, True, None]}}
    assert node is not None and parse_yaml("", "x", THING) == (None, None)


def npy(header: str, data: bytes = bytes(8), version: int = 1) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


ARRAYS = {
    "empty": b"",
    "other": b"x" * 500,
    "magic only": NPY,
    "short": npy(HEADER, bytes(7)),
    "long": npy(HEADER, bytes(9)),
    "version": npy(HEADER, version=9),
    "huge header": NPY[:6] + b"\x02\x00\xff\xff\xff\xff{",
    "code": npy("__import__('os').system('x')\n"),
    "deep": npy("(" * 5000 + "\n"),
    "minus": npy("-" * 9000 + "1\n"),
    "unclosed": npy("{'descr': '<f4', 'shape': (1, \n"),
    "unclosed long": npy("{'descr': '<f4', 'shape': (1L, \n"),
    "nul": npy("\0" * 50),
    "keys": npy("{1, 2}\n"),
    **{
        f"shape {shape}": npy(HEADER.replace("(2,)", shape))
        for shape in ("(-1,)", "('a',)", "(True,)", f"({'9' * 24},)", "(0, 10**9)")
    },
    **{
        f"dtype {kind}": npy(HEADER.replace("'<f4'", kind))
        for kind in ("'|O'", "5", "[1]", "{'a': 1}", "'zzz'", "'<c8'", "'<U2'", "'M8[s]'", "'V4'")
    },
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_npy_headers_are_guarded(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    refusal(read_npy, tmp_path / "x.npy")


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "?", "u1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_npy_as_numpy_reads_it(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    array = np.asfortranarray(np.arange(6)[: int(np.prod(shape))].reshape(shape).astype(kind))
    np.save(tmp_path / "x.npy", array)
    received = read_npy(tmp_path / "x.npy", THING)
    assert received.dtype == array.dtype and np.array_equal(received, array)


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(data: bytes = bytes(8), **changes: object) -> bytes:
    return tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}, data)


def two(*offsets: tuple[int, int]) -> bytes:
    names = {f"t{i}": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(offsets)}
    return tensors(names, bytes(8))


FILES = {
    "empty": b"",
    "short": b"1234567",
    "length": tensors({}, length=2**63),
    "no header": tensors(b""),
    "no JSON": tensors(b"{{{"),
    "a list": tensors([]),
    "no text": tensors(b'{"\xff": 1}'),
    "deep": tensors(b"[" * 100_000),
    "twice": tensors(b'{"a": 1, "a": 2}'),
    "metadata": tensors({"__metadata__": {"format": 5}}),
    "metadata list": tensors({"__metadata__": [1]}),
    "cut": one(bytes(7)),
    "longer": one(bytes(9)),
    "dtype": one(dtype="F33"),
    "dtype number": one(dtype=5),
    "shape": one(shape=[-2]),
    "shape text": one(shape="x"),
    "shape truth": one(shape=[True, 2]),
    "shape other": one(shape=[3]),
    "shape huge": one(shape=[2**40, 2**40]),
    "shape empty": one(b"", shape=[0, 10**18], data_offsets=[0, 0]),
    "offsets negative": one(data_offsets=[-8, 0]),
    "offsets reversed": one(data_offsets=[8, 0]),
    "offsets three": one(data_offsets=[0, 8, 8]),
    "no offsets": tensors({"a": {"dtype": "F32", "shape": [2]}}),
    "overlap": two((0, 8), (0, 8)),
    "hole": two((0, 3), (4, 8)),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_headers_of_tensors_are_guarded(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    for read in (tensor_entries, read_arrays):
        refusal(read, tmp_path / "x")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "C64"])
def test_numbers_that_numpy_lacks(tmp_path: Path, dtype: str) -> None:
    bits = {"BF16": 16, "F8_E4M3": 8, "F4": 4, "C64": 64}[dtype]
    (tmp_path / "x").write_bytes(one(bytes(bits // 4), dtype=dtype, data_offsets=[0, bits // 4]))
    assert tensor_entries(tmp_path / "x", THING)["a"].dtype == dtype
    assert f"'a' is of {dtype}" in refusal(read_arrays, tmp_path / "x")


def test_arrays_as_the_library_reads_them(tmp_path: Path) -> None:
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in ("?", "u1", "i2", "f2", "i8", "f4", "f8")} | {
        "scalar": np.asarray(3, "f4"),
        "none": np.zeros((0, 4), "f4"),
    }
    save_file(arrays, tmp_path / "x", {"format": "pt"})
    received = read_arrays(tmp_path / "x", THING)
    assert received.keys() == arrays.keys()
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype and np.array_equal(received[name], array)


SAVED = save({"a": np.arange(4, dtype="f4"), "b": np.arange(3)}, {"format": "pt"})


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (read_json, st.binary(max_size=40) | damaged(b'{"a": [1, 2.5e3, null, "x"], "b": {"c": true}}')),
        (read_yaml, st.binary(max_size=40) | damaged(b"a: &x [1, 2.5, on]\nb: {<<: {c: d}, e: *x}\n? f\n: !!str g\n")),
        (
            read_npy,
            damaged(npy(HEADER)) | st.text(max_size=60).map(lambda t: npy("{" + t.encode("ascii", "replace").decode())),
        ),
        (read_arrays, damaged(SAVED)),
        (tensor_entries, damaged(SAVED)),
    ],
    ids=["json", "yaml", "npy", "arrays", "entries"],
)
def test_whatever_the_bytes_are(tmp_path_factory: pytest.TempPathFactory, read, content) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "x"

    @settings(max_examples=80, deadline=None)
    @given(content)
    def check(received: bytes) -> None:
        file.write_bytes(received)
        try:
            read(file, THING)
        except StepfoldError as error:
            assert type(error) is BundleError

    check()


def test_the_library_takes_what_is_taken(tmp_path: Path) -> None:
    """The guard is no looser than the library: whatever it lets pass, the library opens."""

    @settings(max_examples=60, deadline=None)
    @given(damaged(SAVED))
    def check(received: bytes) -> None:
        (tmp_path / "x").write_bytes(received)
        try:
            names = tensor_entries(tmp_path / "x", THING).keys()
        except BundleError:
            return
        assert load(received).keys() == names

    check()
