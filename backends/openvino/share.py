"""Store the weights that several files of OpenVINO IR hold once: in one file instead of a `.bin` for each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..shared import SHARED, Shared, Span, WeightFile, common, digest_of

PARTIAL = ".partial"


def share(files: Sequence[Path]) -> Shared | None:
    """Give the `.xml` files that hold something in common one file of weights.

    IR names one file of weights for a model, so all weights of these stages move into it, and their `.bin` files go.

    Args:
        files: `.xml` files of one folder, with their `.bin` files beside them.

    Returns:
        What was shared; None where no two of them hold the same.
    """
    held = [{digest_of(span): span.size for _, span in _constants(ElementTree.parse(file), file)} for file in files]
    wanted = common(held)
    if not wanted:
        return None
    readers = [file for file, digests in zip(files, held, strict=True) if wanted & digests.keys()]
    target = files[0].with_name(SHARED)
    with WeightFile(target) as weights:
        for file in readers:
            _rewrite(file, weights)
    return Shared(target, tuple(readers), weights.saved_bytes)


def _constants(
    tree: ElementTree.ElementTree[ElementTree.Element], file: Path
) -> Iterator[tuple[ElementTree.Element, Span]]:
    """The places of the weights of a model, those of bodies of loops included, and their bytes."""
    weights = file.with_suffix(".bin")
    for layer in tree.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            yield data, Span(weights, int(data.attrib["offset"]), int(data.attrib["size"]))


def _rewrite(file: Path, weights: WeightFile) -> None:
    tree = ElementTree.parse(file)
    places = list(_constants(tree, file))
    offsets = {span: weights.add(digest_of(span), span) for span in dict.fromkeys(span for _, span in places)}
    for data, span in places:
        data.set("offset", str(offsets[span]))
    partial = file.with_name(f"{file.name}{PARTIAL}")
    tree.write(partial, encoding="utf-8", xml_declaration=True)
    os.replace(partial, file)
    file.with_suffix(".bin").unlink()
