"""Model cards: filled in from the flow, runnable, and never in place of what a user wrote."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import fastmaf
from fastmaf.io.model_card import SECTIONS, TO_FILL_IN, ModelCard
from fastmaf.io.outputs import OutputError


def flow_of(**options: object) -> fastmaf.MAF:
    return fastmaf.MAF(6, 2, (16, 12), seed=0, **options)  # type: ignore[arg-type]


def rows_of(text: str) -> dict[str, str]:
    """Returns the table of details."""
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE))


def front_of(text: str) -> list[str]:
    """Returns the lines of the front matter."""
    before, front, _ = text.split("---\n", 2)
    assert before == ""
    return front.splitlines()


def run_example(card: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Runs the example of a card in its folder, and returns its names."""
    monkeypatch.chdir(card.parent)
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, card.name, "exec"), names)
    return names


def test_what_is_known_is_filled_in(tmp_path: Path) -> None:
    flow, model, card = flow_of(), tmp_path / "model.safetensors", tmp_path / "MODEL_CARD.md"
    flow.save(model, card=card)
    text = card.read_text("utf-8")
    rows = rows_of(text)
    assert rows["Class"] == "`fastmaf.MAF`"
    assert (rows["Features"], rows["Blocks"], rows["Hidden units of a block"]) == ("6", "2", "(16, 12)")
    assert rows["Transforms"] == "2 × affine autoregressive, 2 × permutation"
    assert rows["Parameters"] == f"{sum(p.numel() for p in flow.parameters()):,}"
    assert rows["Data type"] == "float32"
    assert rows["File"] == f"model.safetensors, {model.stat().st_size:,} bytes"
    assert rows["Versions"] == f"fastmaf {fastmaf.__version__}, torch {torch.__version__}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", rows["Date"])
    assert front_of(text)[:2] == ["library_name: fastmaf", "license: # to be filled in, such as apache-2.0"]
    assert front_of(text)[2:4] == ["tags:", "- normalizing-flow"]
    assert text.count(TO_FILL_IN) == len(SECTIONS) + 1
    assert [heading for heading in SECTIONS if f"\n## {heading}\n\n{TO_FILL_IN}" in text] == list(SECTIONS)


def test_the_example_of_a_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = flow_of(dtype=torch.float64)
    flow.save(tmp_path / "models" / "it's.safetensors", card=tmp_path / "cards" / "README.md")
    loaded = run_example(tmp_path / "cards" / "README.md", monkeypatch)["flow"]
    assert isinstance(loaded, fastmaf.MAF) and loaded.features == 6
    assert "float64" in capsys.readouterr().out


def test_a_user_can_fill_in_the_rest(tmp_path: Path) -> None:
    texts = {heading: f"About {heading}." for heading in SECTIONS}
    card = ModelCard(tmp_path / "card.md", "My model", texts, {"Epochs": "20"}, ["physics"])
    fastmaf.Flow(3, []).save(tmp_path / "model.safetensors", card=card)
    text = (tmp_path / "card.md").read_text("utf-8")
    assert "\n# My model\n" in text and text.count(TO_FILL_IN) == 1
    assert all(f"## {heading}\n\n{content}\n" in text for heading, content in texts.items())
    assert rows_of(text)["Epochs"] == "20" and rows_of(text)["Transforms"] == "none"
    assert "- physics" in front_of(text)


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(ValueError, match="expected some of Intended use, .*; found Usage"):
        ModelCard("card.md", sections={"Usage": "none"})


def test_an_unedited_card_is_replaced_and_an_edited_one_is_not(tmp_path: Path) -> None:
    model, card = tmp_path / "model.safetensors", tmp_path / "card.md"
    flow_of().save(model, card=card)
    fastmaf.MAF(7, 1, 8).save(model, card=card)
    assert rows_of(card.read_text("utf-8"))["Features"] == "7"
    edited = card.read_text("utf-8").replace(TO_FILL_IN, "Orbits:", 1)
    for content in (edited, "# My own card\n", card.read_text("utf-8") + "More.\n"):
        card.write_text(content, "utf-8")
        with pytest.raises(OutputError, match="is not an unedited model card"):
            flow_of().save(model, card=card)
        assert card.read_text("utf-8") == content
        assert fastmaf.load(model).features == 7, "the model was not written either"


def test_a_card_is_not_written_over_its_model(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        flow_of().save(tmp_path / "model.safetensors", card=tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses such names")
def test_an_odd_name_breaks_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow_of().save(tmp_path / "a\n# b | `c`.safetensors", card=tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text("utf-8")
    assert "\n# b" not in text and "# a\\n# b" in text
    run_example(tmp_path / "card.md", monkeypatch)


@pytest.mark.skipif(os.name == "nt", reason="no such file names on Windows")
def test_a_bar_in_a_file_name_ends_no_cell(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    fastmaf.MAF(features=3, blocks=1, hidden_features=8).save(tmp_path / "a|b.safetensors", card=card)
    assert r"| File | a\|b.safetensors, " in card.read_text("utf-8")
