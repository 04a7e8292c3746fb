"""Store the weights that several ONNX files hold once: as external data in one file beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnx
from onnx import TensorProto

from ..shared import SHARED, Content, Shared, Span, WeightFile, common, digest_of, size_of

PARTIAL = ".partial"


def share(files: Sequence[Path]) -> Shared | None:
    """Move what two or more ONNX files of a folder hold into one file, to which they refer by offset and length.

    Files are replaced one at a time, so two stages are never in memory together. Those that hold nothing in common with
    another stay as they are. External data of a file that is not shared stays in its own file.

    Args:
        files: `.onnx` files of one folder, with their external data beside them.

    Returns:
        What was shared; None where no two of them hold the same.
    """
    held = [_digests(file) for file in files]
    wanted = common(held)
    if not wanted:
        return None
    readers = [file for file, digests in zip(files, held, strict=True) if wanted & digests.keys()]
    target = files[0].with_name(SHARED)
    with WeightFile(target) as weights:
        for file in readers:
            _rewrite(file, wanted, weights)
    return Shared(target, tuple(readers), weights.saved_bytes)


def _digests(file: Path) -> dict[str, int]:
    """Digest -> bytes of the weights of a file."""
    model = onnx.load(file, load_external_data=False)
    return {digest_of(content): size_of(content) for _, content in _contents(model, file)}


def _contents(model: onnx.ModelProto, file: Path) -> Iterator[tuple[TensorProto, Content]]:
    """The weights of the main graph and their bytes; those that are not kept as bytes are small."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            source = file.with_name(entries["location"])
            yield tensor, Span(source, int(entries.get("offset", 0)), int(entries["length"]))
        elif tensor.HasField("raw_data"):
            yield tensor, tensor.raw_data


def _rewrite(file: Path, wanted: set[str], weights: WeightFile) -> None:
    """Let a file refer to the shared weights, and write its other external data without them."""
    model = onnx.load(file, load_external_data=False)
    own = {content.file for _, content in _contents(model, file) if isinstance(content, Span)}
    rest = file.with_name(f"{file.name}.data{PARTIAL}")
    with ExitStack() as stack:
        remaining: WeightFile | None = None
        for tensor, content in _contents(model, file):
            digest = digest_of(content)
            if digest in wanted:
                _refer(tensor, SHARED, weights.add(digest, content), size_of(content))
            elif isinstance(content, Span):
                remaining = remaining or stack.enter_context(WeightFile(rest))
                _refer(tensor, f"{file.name}.data", remaining.add(digest, content), content.size)
    for path in own:
        path.unlink()
    if rest.exists():
        os.replace(rest, file.with_name(f"{file.name}.data"))
    partial = file.with_name(f"{file.name}{PARTIAL}")
    onnx.save(model, partial, format="protobuf")
    os.replace(partial, file)


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
