"""What the dynamo exporter does to its graph before it is saved, with rewrites that are exact.

The exporter takes `x + c` for `x` where c is 0 within 1e-8, and `x * c` where c is 1 within 1e-5. The 1e-15 that keeps a
denominator from zero is lost with that, as in the linear attention of Sana. Here a constant counts as the number only
where it is the number; all other rewrites of the exporter compare nothing but shapes, names and whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import onnx_ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions, pattern
from onnxscript.rewriter.rules.common import _no_op as with_tolerance

ROUNDS = 2  # constants that a rewrite has made are folded in the next
NO_OPS = (("Add", 0.0, True), ("Sub", 0.0, False), ("Mul", 1.0, True), ("Div", 1.0, False))
"""Operator, the number that leaves the other operand as it is, and whether it may come first."""


def optimize(model: onnx_ir.Model) -> None:
    """Fold constants and simplify a graph in place."""
    common.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        rewritten = rewriter.RewritePass(_rules())(model)
        for remove in (common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass, common.RemoveUnusedOpsetsPass):
            remove()(model)
        if not (folded.modified or rewritten.modified):
            break
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        clean(model)
    onnx_fusions.fuse(model)


@cache
def _rules() -> tuple[rewriter.RewriteRule, ...]:
    """The exporter's rules, with exact ones in the place of those that compare a number with a tolerance."""
    left_out = {id(rule) for rule in with_tolerance.rules}
    others = (rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in left_out)
    return (*(rule for no_op in NO_OPS for rule in _exact(*no_op)), *others)


def _exact(kind: str, number: float, commutes: bool) -> list[rewriter.RewriteRule]:
    """Rules for an operator and the number that leaves its other operand as it is."""
    exactly = pattern.Constant(number, rel_tol=0.0, abs_tol=0.0)
    forms: list[Callable[[Any, Any], Any]] = [lambda op, x: getattr(op, kind)(x, exactly)]
    if commutes:
        forms.append(lambda op, x: getattr(op, kind)(exactly, x))
    return [rewriter.RewriteRule(form, lambda op, x: op.Identity(x), name=f"Exact{kind}") for form in forms]
