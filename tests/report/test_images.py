"""Samples as pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepfold.loop.errors import StepfoldError
from stepfold.report.images import GAP, data_uri, grid_png, is_image, to_pixels, write_grid, write_pictures


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pixels_cover_the_data_range_and_clip_beyond() -> None:
    samples = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, np.nan], np.float32).reshape(1, 1, 1, 6)
    assert to_pixels(samples).ravel().tolist() == [0, 0, 128, 255, 255, 128]


def test_large_samples_keep_their_pixels_in_reading_order() -> None:
    values = np.array([-1.0, 0.0, 1.0], np.float32)
    samples = np.broadcast_to(values[:, None, None, None], (3, 1, 100, 120))
    picture = opened(grid_png(samples, columns=2))
    assert picture.shape == (200 + GAP, 240 + GAP)
    assert (picture[:100, :120] == 0).all()  # first
    assert (picture[:100, 120 + GAP :] == 128).all()  # second, right of it
    assert (picture[100 + GAP :, :120] == 255).all()  # third, below
    assert (picture[100 : 100 + GAP] == 255).all()  # the gap is white


def test_small_samples_are_enlarged_without_smoothing() -> None:
    samples = np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1.0
    picture = opened(grid_png(samples[None, None]))
    assert picture.shape == (96, 96)
    assert set(np.unique(picture)) == {0, 255}
    assert (picture[:12, :12] == 0).all() and (picture[:12, 12:24] == 255).all()


def test_colour_and_transparent_gaps() -> None:
    samples = np.stack([np.full((3, 100, 100), -1.0), np.full((3, 100, 100), 1.0)])
    samples[0, 0] = 1.0
    assert opened(grid_png(samples)).shape == (100, 200 + GAP, 3)
    picture = opened(grid_png(samples, transparent=True))
    assert picture[50, 50].tolist() == [255, 0, 0, 255]
    assert picture[50, 100, 3] == 0 and picture[50, 150, 3] == 255


def test_many_samples_make_a_square() -> None:
    assert opened(grid_png(np.zeros((16, 1, 96, 96)))).shape == (4 * 96 + 3 * GAP, 4 * 96 + 3 * GAP)
    assert opened(grid_png(np.zeros((10, 1, 96, 96)))).shape == (96, 10 * 96 + 9 * GAP)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 1, 8), (1, 3, 2, 8, 8)])
def test_latents_are_no_images(shape: tuple[int, ...]) -> None:
    assert not is_image(np.zeros(shape))
    with pytest.raises(StepfoldError, match=r"expected samples \[B, 1 or 3, H, W\].*save the numbers instead"):
        grid_png(np.zeros(shape))


def test_file_and_data_uri_hold_a_png(tmp_path: Path) -> None:
    samples = np.zeros((1, 1, 8, 8), np.float32)
    write_grid(tmp_path / "a.png", samples)
    assert opened((tmp_path / "a.png").read_bytes()).shape == (96, 96)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    prefix, content = data_uri(samples).split(",")
    assert prefix == "data:image/png;base64"
    assert opened(base64.b64decode(content)).shape[:2] == (96, 96)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(StepfoldError):
        write_grid(tmp_path / "a.png", np.zeros((1, 2, 8, 8)))
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_video_is_a_picture_for_each_frame(tmp_path: Path) -> None:
    """In order, samples beside each other, and with the name of the file that was asked for."""
    levels = np.linspace(-1, 1, 11, dtype=np.float32)
    videos = np.broadcast_to(levels[None, None, :, None, None], (2, 3, 11, 100, 100))
    files = write_pictures(tmp_path / "cat.png", videos)
    assert [file.name for file in files] == [f"cat-{number:04d}.png" for number in range(1, 12)]
    assert sorted(tmp_path.iterdir()) == files
    for file, level in zip(files, levels, strict=True):
        picture = opened(file.read_bytes())
        assert picture.shape == (100, 200 + GAP, 3)
        assert picture[50, 50].tolist() == picture[50, -50].tolist() == [round((level + 1) * 127.5)] * 3
    assert write_pictures(tmp_path / "still.png", videos[:, :, 0]) == [tmp_path / "still.png"]
