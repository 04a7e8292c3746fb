"""What other installed packages add, found by the entry points that their metadata declares.

Nothing that a checkpoint, a recipe or a bundle holds is imported this way: a user installs a package to use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from .errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Extensions(Generic[T]):
    """Things of one kind that other packages add, by name.

    Attributes:
        group: group of the entry points, such as `stepfold.passes`.
        wanted: what an entry has to be, for messages.
        accepts: whether something that was imported is one.
    """

    group: str
    wanted: str
    accepts: Callable[[object], bool]

    def names(self) -> list[str]:
        """The names that are declared, none of which is imported for it."""
        return sorted({entry.name for entry in self._entries()})

    def load(self, name: str) -> T:
        """What a package declares under a name.

        Args:
            name: one of `names`.

        Raises:
            UsageError: it cannot be imported, is not what is wanted or has another name, or two packages declare it.
        """
        entries = [entry for entry in self._entries() if entry.name == name]
        if len(entries) > 1:
            packages = " and ".join(sorted(_package(entry) for entry in entries))
            raise UsageError(f"{self.wanted} {name!r}: declared by {packages}; uninstall all but one of them.")
        entry = entries[0]
        where = f"{self.wanted} {name!r} of package {_package(entry)} ({entry.value})"
        try:
            found = entry.load()
        except Exception as error:  # a package may raise anything when it is imported
            raise UsageError(
                f"{where}: cannot be imported: {type(error).__name__}: {error}. Mend or uninstall the package."
            ) from error
        if not self.accepts(found) or getattr(found, "name", None) != name:
            raise UsageError(
                f"{where}: expected a {self.wanted} whose name is {name!r}; received {found!r:.80}. Mend or uninstall "
                "the package."
            )
        return found

    def _entries(self) -> Iterator[EntryPoint]:
        from importlib.metadata import entry_points  # slow to import, and no bundle of stepfold's own engines needs it

        yield from entry_points(group=self.group)

    def load_all(self, own: Sequence[str]) -> Iterator[T]:
        """Everything that can be loaded; a warning names what cannot, or has the name of one of stepfold's own."""
        for name in self.names():
            if name in own:
                logger.warning("%s %r of another package is ignored: stepfold has one of that name", self.wanted, name)
                continue
            try:
                yield self.load(name)
            except UsageError as error:
                logger.warning("%s", error)


def _package(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
