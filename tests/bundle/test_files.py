"""Paths of a bundle stay inside it, whatever the manifest says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepfold.bundle import files
from stepfold.loop.errors import BundleError

parts = st.one_of(
    st.sampled_from(
        ["..", ".", "", "a", "stages", "C:", "\\", "...", ".. ", "~", "step.onnx", "a:b", "\x00", "\ud800"]
    ),
    st.text(max_size=8),
)
paths = st.lists(parts, max_size=6).flatmap(lambda p: st.sampled_from(["/".join(p), "\\".join(p), "/" + "/".join(p)]))


@given(paths)
@example("../outside")
@example("a/../../outside")
@example("//server/share")
@example("x" * 300)
def test_a_path_is_inside_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / "some" / "bundle"
    try:
        path = files.inside(folder, name)
    except BundleError:
        return
    assert path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve()
    assert "\\" not in name and ".." not in name.split("/") and not name.startswith("/")


plain = st.text(alphabet="abcXYZ019_-+×é", min_size=1, max_size=12)


@given(st.lists(plain, min_size=1, max_size=4))
def test_plain_relative_paths_are_accepted(names: list[str]) -> None:
    assert files.inside(Path("/bundle"), "/".join(names)) == Path("/bundle", *names)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty or too long"),
        ("/etc/passwd", "is absolute"),
        ("../other/step.onnx", "has an empty, '.' or '..' part"),
        ("stages/../../step.onnx", "has an empty, '.' or '..' part"),
        ("stages//step.onnx", "has an empty, '.' or '..' part"),
        ("stages/.. /step.onnx", "has an empty, '.' or '..' part"),
        ("C:/step.onnx", "has a backslash or a drive letter"),
        ("..\\step.onnx", "has a backslash or a drive letter"),
        ("stages/a\nb", "has a control character"),
        ("é" * 200, "is empty or too long"),  # 400 bytes, more than a file name holds
    ],
)
def test_the_reason_of_a_refusal(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(BundleError) as error:
        files.inside(tmp_path, name)
    assert reason in str(error.value) and "expected a relative POSIX path inside the bundle" in str(error.value)


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "file").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    for name in ("file", "up/secret"):
        with pytest.raises(BundleError, match="leads out of the bundle through a link"):
            files.inside(folder, name)


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "name").symlink_to("blob")
    assert files.inside(tmp_path, "name").read_text() == "x"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_streamed_hash(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_listing_is_sorted_and_leaves_the_manifest_out(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for name in ("stages/b", "stages/a", "z", files.MANIFEST):
        (tmp_path / name).write_text("")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    assert files.listing(tmp_path) == ["elsewhere", "stages/a", "stages/b", "z"]
