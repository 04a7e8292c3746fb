"""Train an unconditional U-Net on MNIST's original files, and write it as a folder of DDIMPipeline.

    python examples/mnist_unet/train.py --data mnist --out out/mnist_unet          # again: goes on where it was
    python examples/mnist_unet/train.py --data mnist --evaluate examples/mnist_unet
    python examples/mnist_unet/train.py --smoke --out out/smoke                    # seconds, on generated data

What is trained and how stands in `denoising.py`; README.md has the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))

from averaged import Training
from denoising import CONFIG, Settings, advance, held_out_loss, start
from mnist import Digits, generated, read_mnist
from running import exit_code, parser_of, positive, walk
from states import STATE, read_state, require_run, write_pipeline, write_state

from stepfold.loop.errors import UsageError

STEPS, BATCH = 6000, 32
SMOKE_STEPS, SMOKE_BATCH, SMOKE_IMAGES = 10, 8, 64
SMOKE_MODEL: Mapping[str, Any] = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "attention_head_dim": 8}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 on wrong ones."""
    parser = parser_of(__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FOLDER", help="the pipeline to write, or to go on with")
    target.add_argument("--evaluate", type=Path, metavar="PIPELINE", help="print its held-out loss, train nothing")
    parser.add_argument("--steps", type=positive, help=f"in all (default {STEPS}; --smoke: {SMOKE_STEPS})")
    parser.add_argument("--batch", type=positive, help=f"images a step (default {BATCH}; --smoke: {SMOKE_BATCH})")
    return parser.parse_args(arguments)


def data_of(options: argparse.Namespace) -> tuple[Digits, Digits]:
    """Training images and held-out images."""
    if options.smoke:
        return generated(SMOKE_IMAGES, seed=0), generated(SMOKE_IMAGES, seed=1)
    return read_mnist(options.data, "train"), read_mnist(options.data, "t10k")


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of the shipped checkpoint, or small ones for a smoke run."""
    if options.smoke:
        batch = options.batch or SMOKE_BATCH
        return Settings({**CONFIG, **SMOKE_MODEL}, options.seed, batch, learning_rate=1e-2, warmup=5, ema=0.8)
    return Settings(CONFIG, options.seed, options.batch or BATCH)


def save(training: Training[UNet2DModel], settings: Settings, out: Path) -> None:
    """Write the training state, then a pipeline of the averaged weights with the scheduler's defaults."""
    write_state(training, settings, out / STATE)
    model = UNet2DModel(**settings.config)
    model.load_state_dict(training.average)
    write_pipeline(DDIMPipeline(model, DDIMScheduler()), out)


def train(options: argparse.Namespace) -> bool:
    """Train up to `--steps`, saving on the way; whether it got there."""
    settings, out = settings_of(options), options.out
    require_run(out)
    images, held_out = data_of(options)
    training = start(settings, options.device)
    read_state(training, settings, out / STATE, options.device)
    steps = options.steps or (SMOKE_STEPS if options.smoke else STEPS)
    if training.step >= steps:
        print(f"{out}: at step {training.step} already; raise --steps to go on")
    return walk(
        training,
        steps,
        options.every or max(1, steps // 20),
        advance=lambda: advance(training, settings, images),
        save=lambda: save(training, settings, out),
        report=lambda: f"held-out {held_out_loss(training.model, held_out, training.average):.4f}",
    )


def evaluate(options: argparse.Namespace) -> None:
    """Print the held-out loss of a pipeline's model."""
    try:
        model = UNet2DModel.from_pretrained(options.evaluate / "unet", local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{options.evaluate}: expected a folder of DDIMPipeline; received: {reason}") from None
    model.eval().to(options.device)
    print(f"{options.evaluate}: held-out loss {held_out_loss(model, data_of(options)[1]):.4f}")


def main(arguments: list[str]) -> int:
    """Run the script; its exit code."""
    options = parse(arguments)

    def work() -> bool:
        if options.evaluate is None:
            return train(options)
        evaluate(options)
        return True

    return exit_code(work, options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
