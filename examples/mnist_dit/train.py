"""Train the reference checkpoint again, from MNIST's original files.

    python examples/mnist_dit/train.py --data mnist --out out/mnist_dit          # again: goes on where it was
    python examples/mnist_dit/train.py --data mnist --evaluate examples/mnist_dit
    python examples/mnist_dit/train.py --smoke --out out/smoke                   # seconds, on generated data

What is trained and how stands in `flow_matching.py`; README.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))

from averaged import Training
from flow_matching import Settings, advance, held_out_loss
from mnist import Digits, generated, read_mnist
from running import exit_code, parser_of, positive, walk
from saving import resume, save

from stepfold.loop.errors import UsageError

HERE = Path(__file__).resolve().parent
STEPS, BATCH = 60_000, 256
SMOKE_STEPS, SMOKE_BATCH, SMOKE_IMAGES = 20, 16, 256
SMOKE_MODEL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 on wrong ones."""
    parser = parser_of(__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FOLDER", help="the checkpoint to write, or to go on with")
    target.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="print its held-out loss, train nothing")
    parser.add_argument("--steps", type=positive, help=f"in all (default {STEPS}; --smoke: {SMOKE_STEPS})")
    parser.add_argument("--batch", type=positive, help=f"images a step (default {BATCH}; --smoke: {SMOKE_BATCH})")
    return parser.parse_args(arguments)


def data_of(options: argparse.Namespace) -> tuple[Digits, Digits]:
    """Training images and held-out images."""
    if options.smoke:
        return generated(SMOKE_IMAGES, seed=0), generated(SMOKE_IMAGES, seed=1)
    return read_mnist(options.data, "train"), read_mnist(options.data, "t10k")


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of the reference checkpoint, or small ones for a smoke run."""
    config: dict[str, Any] = json.loads((HERE / "config.json").read_text())
    if options.smoke:
        batch = options.batch or SMOKE_BATCH
        return Settings(config | SMOKE_MODEL, options.seed, batch, learning_rate=1e-2, warmup=5, ema=0.8)
    return Settings(config, options.seed, options.batch or BATCH)


def train(training: Training[DiTTransformer2DModel], settings: Settings, options: argparse.Namespace) -> bool:
    """Train up to `--steps`, saving on the way; whether it got there."""
    images, held_out = data_of(options)
    steps = options.steps or (SMOKE_STEPS if options.smoke else STEPS)
    if training.step >= steps:
        print(f"{options.out}: at step {training.step} already; raise --steps to go on")
    return walk(
        training,
        steps,
        options.every or max(1, steps // 20),
        advance=lambda: advance(training, settings, images),
        save=lambda: save(training, settings, options.out),
        report=lambda: f"held-out {held_out_loss(training.model, held_out, training.average):.4f}",
    )


def evaluate(options: argparse.Namespace) -> None:
    """Print the held-out loss of a checkpoint."""
    try:
        model = DiTTransformer2DModel.from_pretrained(options.evaluate, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{options.evaluate}: expected a DiT checkpoint in safetensors; received: {reason}") from None
    model.eval().to(options.device)
    loss = held_out_loss(model, data_of(options)[1])
    print(f"{options.evaluate}: held-out loss {loss:.4f}")


def main(arguments: list[str]) -> int:
    """Run the script; its exit code."""
    options = parse(arguments)

    def work() -> bool:
        if options.evaluate is None:
            settings = settings_of(options)
            return train(resume(settings, options.out, options.device), settings, options)
        evaluate(options)
        return True

    return exit_code(work, options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
