"""The three ways a command can fail, each with its exit code.

Every message says the subject, what was expected, what was received and what to do next.
"""


class StepfoldError(Exception):
    """The work failed (exit code 1)."""

    exit_code = 1


class UsageError(StepfoldError):
    """The user asked for something that cannot be: an unknown option, a missing file, a bad recipe (exit code 2)."""

    exit_code = 2


class GateError(StepfoldError):
    """A quality or latency gate was not met (exit code 3)."""

    exit_code = 3


class BundleError(StepfoldError):
    """A bundle is damaged, foreign or newer than this stepfold (exit code 1)."""


def nearest(received: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return a hint naming the valid word nearest to `received`, or all of them when none is near."""
    import difflib

    close = difflib.get_close_matches(received, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(sorted(valid))}."
