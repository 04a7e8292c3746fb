"""Writing: what cannot be written is found out before the work, and nothing is left of what goes wrong."""

import os
from pathlib import Path

import pytest

from stepfold.loop.errors import UsageError
from stepfold.loop.writing import replacing, require_writable, temporary_sibling


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def through_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "out"


def below_a_file(folder: Path) -> Path:
    return through_a_file(folder) / "further" / "out"


def through_a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "out"


PLACES = {
    "a file as parent": through_a_file,
    "a file above": below_a_file,
    "a loop of links": through_a_loop,
    "a long name": lambda folder: folder / ("n" * 300),
    "a long path": lambda folder: folder / "/".join(["n" * 200] * 25),
    "a NUL": lambda folder: folder / "a\0b",
    "a file system of the kernel": lambda _: Path("/proc/nothere/out"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_unfit_places_are_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = PLACES[kind](tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"^--out .*: expected a place that can be written; received: .*another --out"):
        require_writable("--out", path)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UsageError, match="Permission denied"):
        require_writable("--out", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["out", "n" * 255, "é" * 127, "a b\nü\t漢字", "new/folders/out", os.fsdecode(b"b\xff")]
)
def test_fit_places_are_left_as_they_were(tmp_path: Path, name: str) -> None:
    require_writable("--out", tmp_path / name)
    assert contents(tmp_path) == []
    with replacing(tmp_path / name) as stream:
        stream.write(b"x")
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_goes_wrong_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_text("old")
    for path in (tmp_path / "old", tmp_path / "new" / "file"):
        with pytest.raises(error), replacing(path) as stream:
            stream.write(b"half")
            raise error
    assert contents(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_nobody_can_guess_a_temporary_name(tmp_path: Path) -> None:
    names = {temporary_sibling(tmp_path / "out") for _ in range(20)}
    assert len(names) == 20 and all(name.name.startswith(".out.") for name in names)
    partial = temporary_sibling(tmp_path / "out")
    partial.symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), partial.open("xb"):
        pass
