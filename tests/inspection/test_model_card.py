"""The model card of an inspection model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastmaf
from fastmaf.inspection.fit import Fitted
from fastmaf.io.model_card import TO_FILL_IN
from fastmaf.io.wording import ordinal
from tests.io.test_model_card import rows_of, run_example


def test_the_card_holds_the_figures_of_the_model(
    fitted: tuple[torch.Tensor, Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, result = fitted
    model, card = result.model, tmp_path / "README.md"
    model.save(tmp_path / "m.safetensors", card=card)
    text = card.read_text("utf-8")
    assert f"{len(pixels)} good images" in text
    assert f"{model.about['held_out_nll']:,.0f} nats" in text
    calibration = model.calibration
    rank = f"the {ordinal(calibration.rank)} lowest of the out-of-fold scores"
    assert f"threshold is {calibration.threshold:.6g}, {rank}" in text
    assert rows_of(text)["Augmentation"] == model.about["recipe"]["augmentation"]
    assert text.count(TO_FILL_IN) == 5
    detector = run_example(card, monkeypatch)["detector"]
    assert isinstance(detector, fastmaf.Detector) and detector.offset_ == -calibration.threshold
