"""What a user is told when TensorRT refuses a graph: where the node comes from, and the smallest part that fails."""

from __future__ import annotations

import ast
import os
import re
import tempfile
from pathlib import Path

import onnx

from ...loop.errors import StepfoldError
from ..onnx.reduce import reduce
from .build import BuildFailure, build, check
from .network import ParserRefusal, RefusedNode
from .options import TensorrtOptions
from .provider import Provider

SCOPES, TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
FRAME = re.compile(r'File "([^"]+)", line (\d+)[^\n]*((?:\n(?! *File )[^\n]*)?)')
LARGEST_BYTES = 1 << 30
"""Of a model whose parts are tried: they are passed on as one protobuf, which ends at 2 GiB."""


def explained(error: ParserRefusal | BuildFailure, provider: Provider, file: Path, options: TensorrtOptions) -> str:
    """The refusal of an ONNX file in words; writes the smallest part that fails to a file that it names.

    Args:
        error: what building the file raised.
        provider: provider that refused it.
        file: the ONNX file.
        options: it was built with.
    """
    if isinstance(error, BuildFailure) and error.for_memory:
        return (
            f"building ran out of memory: {error}. Build on a machine with more, raise tensorrt.workspace_mib, or "
            "lower tensorrt.max_batch."
        )
    model = onnx.load(file)
    if isinstance(error, ParserRefusal):
        what = "; ".join(_described(model, node) for node in error.nodes)
        said = f"{provider.name} refuses {what}"
    else:
        said = f"{provider.name} cannot build the network: {error}"
    return f"{said}. {_reproducer(error, model, provider, options)}"


def _described(model: onnx.ModelProto, refused: RefusedNode) -> str:
    """A node as a user can find it: its operator, name, module path and source line, and the reason."""
    found = next((node for node in model.graph.node if node.name == refused.name), None)
    noted = {entry.key: entry.value for entry in found.metadata_props} if found is not None else {}
    return f"{refused.operator} node {refused.name} ({_module(noted)}; {_source(noted)}): {refused.reason}"


def _source(noted: dict[str, str]) -> str:
    """The innermost source line of a node, as in `model.py:12: return x`."""
    frames = FRAME.findall(noted.get(TRACE, ""))
    if not frames:
        return "no source line"
    file, number, text = frames[-1]
    return f"{file}:{number}: {text.strip()}" if text.strip() else f"{file}:{number}"


def _module(noted: dict[str, str]) -> str:
    """The innermost module of a node; the last scope is the node itself."""
    try:
        scopes = ast.literal_eval(noted.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    return next((scope for scope in reversed(scopes[:-1]) if scope), "top level")


def _reproducer(
    error: ParserRefusal | BuildFailure, model: onnx.ModelProto, provider: Provider, options: TensorrtOptions
) -> str:
    if model.ByteSize() > LARGEST_BYTES:
        return "The failing part was not looked for: the weights exceed a gigabyte."
    wanted = _signature(error)

    def fails(part: onnx.ModelProto) -> bool:
        data = part.SerializeToString()
        try:
            if isinstance(error, ParserRefusal):
                check(provider, data)
            else:
                build(provider, data, options.model_copy(update={"timing_cache": None}))
        except (ParserRefusal, BuildFailure) as again:
            return bool(_signature(again) & wanted)
        except StepfoldError:
            return False
        return False

    part = reduce(model, fails)
    data = part.SerializeToString(deterministic=True)
    descriptor, path = tempfile.mkstemp(".onnx", "stepfold-refused-")  # a name that nobody can have taken before
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
    count = len(part.graph.node)
    names = ", ".join(dict.fromkeys(node.op_type for node in part.graph.node))
    return f"The smallest part that fails has {count} of {len(model.graph.node)} nodes ({names}): {path}"


def _signature(error: ParserRefusal | BuildFailure) -> set[str]:
    """What makes two failures the same: the operators that are refused, or the words without names and numbers."""
    if isinstance(error, ParserRefusal):
        return {node.operator for node in error.nodes}
    return {re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", str(error))}
