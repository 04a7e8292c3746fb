"""Captions, and the canvases they describe: a digit of MNIST in a size and a colour, on a black or white ground."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from mnist import Digits
from PIL import Image

SIDE = 32
SIZES = {"small": 16, "large": 32}  # pixels of MNIST's square of 28, of which the digit fills 20
COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "purple": (150, 50, 180),
    "grey": (128, 128, 128),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255)}
SHIFT = 4  # pixels at most by which a small digit is off the middle, in each direction
UNSEEN_EACH = 10  # one caption in ten is held out


@dataclass(frozen=True)
class Caption:
    """What a canvas shows, each a key of the tables above, and the digit as a number."""

    size: str
    colour: str
    digit: int
    ground: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {NUMBERS[self.digit]} on {self.ground}"


CAPTIONS = [Caption(*chosen) for chosen in product(SIZES, COLOURS, range(len(NUMBERS)), GROUNDS)]


def is_unseen(caption: Caption) -> bool:
    """Whether a caption is held out: for each size, colour and ground, that of one digit."""
    chosen = (list(SIZES).index(caption.size), list(COLOURS).index(caption.colour), list(GROUNDS).index(caption.ground))
    return (caption.digit + 5 * chosen[0] + 2 * chosen[1] + 3 * chosen[2]) % UNSEEN_EACH == 0


SEEN = [caption for caption in CAPTIONS if not is_unseen(caption)]
UNSEEN = [caption for caption in CAPTIONS if is_unseen(caption)]


def draw(image: np.ndarray, caption: Caption, shift: tuple[int, int]) -> np.ndarray:
    """A canvas uint8 [32, 32, 3].

    Args:
        image: a digit of MNIST, uint8 [28, 28], of the caption's digit.
        caption: what else the canvas shows.
        shift: of a small digit off the middle, in pixels down and to the right; a large one fills the canvas.
    """
    side = SIZES[caption.size]
    scaled = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    top, left = ((SIDE - side) // 2 + (offset if side < SIDE else 0) for offset in shift)
    cover = np.zeros((SIDE, SIDE, 1), np.float32)
    cover[top : top + side, left : left + side, 0] = scaled / np.float32(255)
    ground, colour = (np.array(rgb, np.float32) for rgb in (GROUNDS[caption.ground], COLOURS[caption.colour]))
    return np.rint(ground + cover * (colour - ground)).astype(np.uint8)


@dataclass(frozen=True)
class Canvases:
    """Canvases uint8 [samples, 32, 32, 3] and the places of their captions in `CAPTIONS`, int64 [samples]."""

    images: np.ndarray
    captions: np.ndarray

    def pixels(self, index: slice | np.ndarray) -> np.ndarray:
        """Images float32 [B, 3, 32, 32] in [-1, 1] at `index`."""
        return np.moveaxis(self.images[index], -1, 1).astype(np.float32) / 127.5 - 1.0


def canvases_of(digits: Digits, captions: list[Caption], seed: int) -> Canvases:
    """One canvas of each image of MNIST, with a caption drawn from those of its digit.

    Args:
        digits: images and their classes.
        captions: to draw from, such as `SEEN`. Images of digits that have none are left out.
        seed: of captions and shifts; the same seed gives the same canvases.
    """
    rng = np.random.default_rng(seed)
    images, places = [], []
    for image, label in zip(digits.images, digits.labels.tolist(), strict=True):
        fitting = [caption for caption in captions if caption.digit == label]
        choice, down, right = rng.random(), *rng.integers(-SHIFT, SHIFT + 1, 2).tolist()
        if fitting:
            caption = fitting[int(choice * len(fitting))]
            images.append(draw(image, caption, (down, right)))
            places.append(CAPTIONS.index(caption))
    return Canvases(np.stack(images), np.array(places, np.int64))
