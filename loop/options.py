"""Options of a pass or a backend: frozen, checked, and with the nearest name when one is wrong."""

from __future__ import annotations

from pydantic import ConfigDict, ValidationError

from .errors import nearest
from .spec import Strict


class Options(Strict):
    """Frozen options; unknown names are refused. Each is described in the `Attributes` of the class's docstring."""

    model_config = ConfigDict(allow_inf_nan=False)


def option_problem(kind: type[Options], owner: str, error: ValidationError) -> str:
    """What is wrong with the first bad option: the option, what was expected, what was received.

    Args:
        kind: the options that were validated.
        owner: what has them, `pass` or `backend`.
        error: error of the validation.
    """
    first = error.errors()[0]
    option = str(first["loc"][0]) if first["loc"] else "options"
    if first["type"] == "extra_forbidden":
        valid = list(kind.model_fields)
        return f"unknown option {option!r}; {nearest(option, valid) if valid else f'this {owner} has no options.'}"
    same = [item for item in error.errors() if item["loc"][:1] == first["loc"][:1]]  # the members of a union
    expected = " or ".join(dict.fromkeys(_expected(item["msg"]) for item in same))
    return f"option {option!r}: expected {expected}; received {first['input']!r}."


def _expected(message: str) -> str:
    """What an option should be, by pydantic or by a validator that raises `ValueError("expected ...")`."""
    for prefix in ("Input should be ", "Value error, ", "expected "):
        message = message.removeprefix(prefix)
    return message
