"""YAML that somebody else wrote: mappings, lists, text, numbers and truth values; nothing that expands or runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .reading import DEEPEST, LONGEST_NUMBER, Expected, read_text

LARGEST_YAML_BYTES = 1 << 20
MOST_VALUES = 100_000  # with every alias written out
PREFIX = "tag:yaml.org,2002:"
PLAIN = frozenset(f"{PREFIX}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge"))
# What PyYAML raises about a document it does not like; its constructors let Python's own errors through.
YAML_ERRORS = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_yaml(path: Path, expected: Expected) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML file and the nodes it was made of, which know their lines.

    Raises:
        StepfoldError: the file cannot be read, is no YAML, is nested too deeply, or has a key twice, an alias that
            refers to itself or expands without end, or a tag (`!!python/object`, a date) beside plain values.
    """
    return parse_yaml(read_text(path, expected, LARGEST_YAML_BYTES), path, expected)


def parse_yaml(text: str, subject: object, expected: Expected) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text and its nodes; `subject` is what the message begins with, see `read_yaml`."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _Size().of(node, 0)
            return loader.construct_document(node), node
        finally:
            loader.dispose()
    except RecursionError:
        raise expected.refusal(subject, f"received more than {DEEPEST} levels of lists and mappings") from None
    except YAML_ERRORS as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise expected.refusal(subject, f"not a YAML text: {reason}".rstrip(".")) from None


class _Size:
    """Counts the values of a document with its aliases written out, and refuses what is not plain."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._open: set[int] = set()

    def of(self, node: yaml.Node, depth: int) -> int:
        """The number of values in a node."""
        if id(node) in self._known:
            return self._known[id(node)]
        _refuse(node, depth)
        if id(node) in self._open:
            raise yaml.YAMLError(f"line {_line(node)}: an alias that refers to itself")
        self._open.add(id(node))
        size = 1 + sum(self.of(item, depth + 1) for item in _members(node))
        self._open.remove(id(node))
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"line {_line(node)}: more than {MOST_VALUES:,} values, aliases written out")
        self._known[id(node)] = size
        return size


def _members(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [item for pair in node.value for item in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse(node: yaml.Node, depth: int) -> None:
    """Raise YAMLError for what is nested too deeply, a tag, a number that is too long, or a key that stands twice."""
    if depth > DEEPEST:
        raise yaml.YAMLError(f"line {_line(node)}: more than {DEEPEST} levels of lists and mappings")
    if node.tag not in PLAIN:
        name = node.tag.removeprefix(PREFIX)
        hint = " Put it into quotes." if name == "timestamp" else ""
        raise yaml.YAMLError(f"line {_line(node)}: expected text, numbers, lists or mappings; received {name}.{hint}")
    if node.tag == f"{PREFIX}int" and len(node.value) > LONGEST_NUMBER:
        raise yaml.YAMLError(f"line {_line(node)}: a number of {len(node.value)} digits")
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {_line(key)}: expected a word as a key; received a list or a mapping")
        if (key.tag, key.value) in seen:
            raise yaml.YAMLError(f"line {_line(key)}: the key {key.value!r} stands twice")
        seen.add((key.tag, key.value))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
