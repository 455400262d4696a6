"""``fastmaf inspect fit --size auto``: sizes that the images hold, and what is written and said of the choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastmaf.cli.app import app
from fastmaf.inspection import fit as fit_module
from fastmaf.inspection import sizes as sizes_module
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.workflow import load as loading
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.fit_state import STATE_FOLDER
from tests.inspection.tiny import TINY, silent

RECIPE = replace(TINY, rank=6, blocks=0)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sizes_module, loading):
        monkeypatch.setattr(module, "SIZES", (8, 16, 32))


def test_the_choice_is_written_and_said(data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path / "run", RECIPE, sizes="auto", progress=False, say=silent)
    loaded = load_inspection(tmp_path / "run")
    areas = loaded.about["drawn_auroc_of_candidates"]
    assert loaded.size == 16 and {"8 pixels", "16 pixels"} <= set(areas) and loaded.about["chosen"] in areas
    assert f"model: {loaded.about['chosen']} (image AUROC on synthetic defects" in result.describe()
    summary = result.summary()
    assert json.loads(json.dumps(summary)) == summary and set(summary["seconds"]) >= {"8 pixels", "16 pixels", "choice"}
    assert "8 pixels" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_longer_budget_considers_the_largest_size(data: Path, tmp_path: Path) -> None:
    result = fit(data, tmp_path / "run", RECIPE, sizes="auto", budget=600, progress=False, say=silent)
    assert load_inspection(tmp_path / "run").size == 32 and "32 pixels" in result.summary()["seconds"]


def test_the_command_line_takes_auto_or_a_number(data: Path, tmp_path: Path) -> None:
    arguments = ["inspect", "fit", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet", "--size"]
    for size in ("large", "0", "-3", "64.0", "99999"):
        done = CliRunner().invoke(app, [*arguments, size])
        assert done.exit_code == 2 and "expected auto or a whole number" in " ".join(done.output.split())


def interrupted(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """Ctrl-C in the fit of a size, when its stages are finished."""
    whole, begun = fit_module.out_of_fold_results, []

    def counted(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == fits:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module, "out_of_fold_results", counted)
        fit(data, out, RECIPE, sizes="auto", budget=200, progress=False, say=silent)


def set_seconds(out: Path, seconds: float) -> None:
    """Writes another duration of the first size to the state of an interrupted fit."""
    file = out / STATE_FOLDER / "state.json"
    state = json.loads(file.read_text("utf-8"))
    assert state["seconds"]["8 pixels"] > 0
    state["seconds"]["8 pixels"] = seconds
    file.write_text(json.dumps(state), "utf-8")


def test_the_budget_counts_the_time_of_an_interrupted_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(data, tmp_path, monkeypatch, fits=1)
    set_seconds(tmp_path, 150.0)
    result = fit(data, tmp_path, RECIPE, sizes="auto", budget=200, resume=True, progress=False, say=silent)
    assert result.fitted.model.about["skipped_sizes"] == [16]
    assert result.summary()["seconds"]["8 pixels"] > 150


def test_a_size_that_an_interrupted_run_has_begun_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(data, tmp_path, monkeypatch, fits=2)
    set_seconds(tmp_path, 150.0)
    result = fit(data, tmp_path, RECIPE, sizes="auto", budget=200, resume=True, progress=False, say=silent)
    assert result.fitted.model.about["skipped_sizes"] == []
