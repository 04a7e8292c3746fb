"""`--baselines`: what is understood, and what is refused with which words."""

from __future__ import annotations

import importlib.util

import pytest

from stepfold.loop.errors import UsageError
from stepfold.report.baselines.names import NEEDS, Baseline, missing_packages, parse, parse_all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eager", Baseline("eager", "eager")),
        ("onnxruntime@13", Baseline("onnxruntime@13", "onnxruntime", 13)),
        ("openvino-int8@15:ab2", Baseline("openvino-int8@15:ab2", "openvino-int8", 15, "ab2")),
        (
            "compile:UniPCMultistepScheduler",
            Baseline("compile:UniPCMultistepScheduler", "compile", None, "UniPCMultistepScheduler"),
        ),
    ],
)
def test_parse(text: str, expected: Baseline) -> None:
    assert parse(text) == expected


def test_alias_stands_for_a_diffusers_class() -> None:
    assert parse("eager@9:unipc").solver_class == "UniPCMultistepScheduler"
    assert parse("eager@9:ab2").solver_class == "ab2"
    assert parse("eager@9").solver_class is None


def test_only_a_plain_name_is_the_full_loop() -> None:
    assert parse("eager").is_full_loop
    assert not parse("eager@50").is_full_loop
    assert not parse("eager:ab2").is_full_loop


def test_bf16_shares_the_file_of_fp32() -> None:
    assert parse("openvino-bf16@9").artifact == parse("openvino").artifact == "openvino"
    assert parse("openvino-int8").artifact == "openvino-int8"


def test_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(
        UsageError, match="unknown baseline 'onnxruntme' in 'onnxruntme@13'; did you mean 'onnxruntime'"
    ):
        parse("onnxruntme@13")


@pytest.mark.parametrize("text", ["", "@13", "eager@", "eager:", "eager@x", "eager@1@2", "eager@-3", "eager:a/b"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected NAME\[@STEPS\]\[:solver\]"):
        parse(text)


@pytest.mark.parametrize("steps", ["0", "10001", "9" * 5000])
def test_impossible_steps_are_refused(steps: str) -> None:
    with pytest.raises(UsageError, match=f"expected 1 to 2000 steps; received {steps[:20]}"):
        parse(f"eager@{steps}")


def test_rows_keep_their_order_and_are_asked_for_once() -> None:
    assert [b.name for b in parse_all([" eager@9", "eager", "eager@9"])] == ["eager@9", "eager"]


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "nncf") else object())
    assert missing_packages("openvino-int8") == "needs openvino, nncf: pip install 'stepfold[openvino]'"
    assert missing_packages("eager") is None


def test_every_engine_has_its_packages() -> None:
    assert set(NEEDS) == {
        "eager",
        "compile",
        "onnxruntime",
        "onnxruntime-int8",
        "onnxruntime-int8-reduced",
        "openvino",
        "openvino-bf16",
        "openvino-int8",
    }
