"""Kinds of bad inputs, command by command: the right exit code, one line that names what is wrong, and nothing left.

Each kind stands here once, as the command line meets it; the readers have tests of their own with every variant.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import LOOP

from .conftest import Stepfold

Make = Callable[[Path], object]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
GENERATE = ("generate", "tiny", "--npy", "x.npy")
OPTIMIZE = ("optimize", "ckpt", "--out", "o")


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Attributes:
        words: of the command, in a folder with the bundle `tiny`.
        code: expected exit code.
        told: words of the error.
        make: writes what is bad into that folder.
    """

    words: tuple[str, ...]
    code: int
    told: str
    make: Make = lambda folder: None


def put(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return make


def array(value: Any) -> Make:
    return lambda folder: np.save(folder / "n.npy", np.asarray(value), allow_pickle=True)


def manifest(**changes: Any) -> Make:
    def make(folder: Path) -> None:
        file = folder / "tiny" / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def loop(**changes: Any) -> Make:
    return put("l.yaml", yaml.safe_dump(LOOP | changes))


def pipe(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def recipe(text: str) -> Bad:
    return Bad((*OPTIMIZE, "--recipe", "r.yaml"), 2, "r.yaml", put("r.yaml", text))


def noise(make: Make, told: str = "n.npy") -> Bad:
    return Bad((*GENERATE, "--noise", "n.npy"), 2, told, make)


def damaged(make: Make, told: str, *words: str) -> Bad:
    return Bad(words or ("verify", "tiny"), 1, told, make)


BAD: dict[str, Bad] = {
    # words of the command
    "a setting that is no YAML": Bad((*OPTIMIZE, "--set", "schedule.evaluations=[1,"), 2, "--set schedule.evaluations"),
    "a setting that names code": Bad(
        (*OPTIMIZE, "--set", "schedule.evaluations=!!python/object/apply:os.system [id]"), 2, "expected text, numbers"
    ),
    "a setting of thousands of digits": Bad((*OPTIMIZE, "--set", f"schedule.samples={'9' * 5000}"), 2, "5000 digits"),
    "a setting out of range": Bad((*OPTIMIZE, "--set", "schedule.evaluations=-1"), 2, "option 'evaluations'"),
    "a budget that is no number": Bad((*OPTIMIZE, "--min-psnr", "nan"), 2, "--min-psnr"),
    "a backend with a typing error": Bad((*OPTIMIZE, "--backend", "onxruntime"), 2, "did you mean 'onnxruntime'"),
    "a path of thousands of letters": Bad(("verify", "x" * 5000), 2, "expected the folder of a bundle"),
    "classes of thousands of digits": Bad((*GENERATE, "--classes", "9" * 5000), 2, "--classes"),
    "a class that is none": Bad((*GENERATE, "--classes", "4"), 2, "expected indices from 0 to 3"),
    "more samples than can be counted": Bad((*GENERATE, "--count", str(10**30)), 2, "--count"),
    "a guidance that is not finite": Bad((*GENERATE, "--guidance", "inf"), 2, "guidance: expected a finite number"),
    "a guidance that no float32 holds": Bad(
        (*GENERATE, "--guidance", "1e300"), 2, "guidance: expected a finite number"
    ),
    "steps of a baseline": Bad(
        ("bench", "tiny", "--reference", "c", "--baselines", "eager@9999"), 2, "1 to 2000 steps"
    ),
    # places to write
    "a place below a file": Bad(("generate", "tiny", "--npy", "f/x.npy"), 2, "--npy f/x.npy", put("f", "x")),
    "a name that is too long": Bad(("generate", "tiny", "--npy", f"{'n' * 300}.npy"), 2, "expected a place that can"),
    **{
        f"a name that is too long for {words[0]}": Bad((*words, "n" * 300), 2, "nnn")
        for words in (
            ("refit", "--reference", "ckpt"),
            ("bench", "tiny", "--baselines", "eager", "--reference"),
            ("bench",),
            ("verify",),
            ("inspect",),
            ("calibrate", "ckpt", "--out"),
            ("optimize", "ckpt", "--out"),
        )
    },
    "a bundle below a file": Bad(("optimize", "ckpt", "--out", "f/o"), 2, "--out f/o", put("f", "x")),
    "a bundle in a loop of links": Bad(("optimize", "ckpt", "--out", "o"), 2, "o: already exists", link("o", "o")),
    "a store that is a file": Bad(("calibrate", "ckpt", "--out", "f"), 2, "f: ", put("f", "x")),
    # recipes
    "a recipe that is empty": recipe(""),
    "a recipe of aliases of aliases": recipe(f"{BOMB}passes: *a9\n"),
    "a recipe that is nested deeply": recipe("passes: " + "[" * 5000),
    "a recipe with a pass twice": recipe("passes: [hoist, hoist]"),
    "a recipe that extends itself": recipe("extends: r.yaml\npasses: [hoist]"),
    "a recipe in another encoding": Bad((*OPTIMIZE, "--recipe", "r.yaml"), 2, "UTF-8", put("r.yaml", b"\xff\xfe")),
    "a recipe that is a pipe": Bad((*OPTIMIZE, "--recipe", "r.yaml"), 2, "received a pipe", pipe("r.yaml")),
    "a recipe without an end": Bad((*OPTIMIZE, "--recipe", "r.yaml"), 2, "a device", link("r.yaml", "/dev/zero")),
    # noise
    "noise that is empty": noise(put("n.npy", b"")),
    "noise that has to be unpickled": noise(array([{1: 2}])),
    "noise whose header is code": noise(put("n.npy", b"\x93NUMPY\x01\x00\x10\x00__import__('os')")),
    "noise that is not finite": noise(array(np.full((1, 1, 2, 2), np.nan, "f4")), "noise: expected finite numbers"),
    "noise of another shape": noise(array(np.zeros((1, 3, 2, 2), "f4")), "noise: expected shape"),
    "noise that is a pipe": noise(pipe("n.npy"), "received a pipe"),
    # manifests and files of bundles
    "a manifest that is no JSON": damaged(put("tiny/manifest.json", "{{"), "no usable JSON"),
    "a manifest that is nested deeply": damaged(put("tiny/manifest.json", "[" * 100_000), "levels"),
    "a manifest that is a pipe": damaged(pipe("tiny/manifest.json"), "received a pipe", "inspect", "tiny"),
    "a manifest without an end": damaged(link("tiny/manifest.json", "/dev/zero"), "a device", *GENERATE),
    "a path out of the bundle": damaged(manifest(probe="../x"), "has an empty, '.' or '..' part"),
    "a seed below zero": damaged(manifest(seeds={"seed": -5}), "seeds.seed"),
    "a backend that is none": damaged(
        manifest(backend={"name": "../os", "version": "1", "device": "cpu"}), "expected one that this stepfold has"
    ),
    "an option out of range": damaged(
        manifest(backend={"name": "onnxruntime", "version": "1", "device": "cpu", "options": {"rows": 10**30}}),
        "'rows'",
    ),
    "a file that was changed": damaged(put("tiny/schedule.json", "{}"), "schedule.json", *GENERATE),
    "a file that was added": damaged(put("tiny/stages/step.bin", "x"), "the manifest does not name it", *GENERATE),
    "a file that leads elsewhere": damaged(link("tiny/schedule.json", "/etc/passwd"), "through a link"),
    # stores and reports
    "a store that is no JSON": Bad(("inspect", "s"), 1, "store.json", put("s/store.json", "[" * 100_000)),
    "a report that is a list": Bad(("compare", "b", "b"), 2, "report.json", put("b/report.json", "[]")),
    "a report with NaN": Bad(("compare", "b", "b"), 2, "the number NaN", put("b/report.json", '{"rows": NaN}')),
    # files beside a checkpoint
    "a loop that is a pipe": Bad((*OPTIMIZE, "--loop", "l.yaml"), 2, "received a pipe", pipe("l.yaml")),
    "a loop of aliases of aliases": Bad((*OPTIMIZE, "--loop", "l.yaml"), 2, "values, aliases", put("l.yaml", BOMB)),
    "a loop with a scale that is no number": Bad(
        (*OPTIMIZE, "--loop", "l.yaml"),
        2,
        "guidance.scale",
        loop(guidance={"scale": float("nan"), "unconditional": {}}),
    ),
    "a loop of too many steps": Bad(
        (*OPTIMIZE, "--loop", "l.yaml"),
        2,
        "sampler.steps",
        loop(sampler={"scheduler": "DDIMScheduler", "steps": 10_000}),
    ),
    "inputs that are pickled": Bad(
        (*OPTIMIZE, "--inputs", "i.safetensors"), 2, "i.safetensors", put("i.safetensors", b"\x80\x04cos\nsystem\n")
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input(
    name: str, stepfold: Stepfold, tiny: Any, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = BAD[name]
    monkeypatch.chdir(tmp_path)
    if "tiny" in bad.words:
        tiny.build(tmp_path / "tiny")
    (tmp_path / "ckpt").symlink_to(tiny_checkpoint)
    bad.make(tmp_path)
    before = sorted(os.walk(tmp_path))
    outcome = stepfold(*bad.words)
    told = outcome.err + outcome.out
    assert outcome.code == bad.code and bad.told in " ".join(told.split()), told
    assert "Traceback" not in told and "--debug" not in told and "\x1b" not in told
    assert sorted(os.walk(tmp_path)) == before
