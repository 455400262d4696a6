"""The options of ``fastmaf bench`` and its errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fastmaf
from fastmaf.bench import command, rows
from fastmaf.bench import run as running
from fastmaf.bench.cases import Plan
from fastmaf.cli import app as cli
from tests.bench.example_rows import ABOUT, row


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the measurement, and notes the plan."""
    noted: dict[str, Any] = {}
    reason = "nflows at D = 48: nflows is not installed; run pip install 'fastmaf[bench]'"

    def run(plan: Plan, progress: Any, **options: Any) -> running.Result:
        noted.update(plan=plan, **options)
        progress("log_prob 8", plan.total)
        fast, zuko = row("log_prob", "8", "fastmaf", 0.001, 0.0005), row("log_prob", "8", "zuko", 0.01)
        return running.Result(noted.get("rows", [fast, zuko]), ABOUT, [reason], [])

    monkeypatch.setattr(command, "run", run)
    return noted


def test_without_options_the_full_suite_is_run(requested: dict[str, Any], tmp_path: Path) -> None:
    assert invoke("--out", tmp_path).exit_code == 0
    assert requested["plan"].name == "full" and requested["device"] == "cpu"
    assert (tmp_path / "cpu.csv").exists() and not (tmp_path / "cpu-quick.csv").exists()


def test_results_go_to_a_folder_in_the_working_directory(
    requested: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("--quick", "--library", "dense", "--library", "zuko").exit_code == 0
    assert requested["plan"].name == "quick" and requested["plan"].groups[0].libraries == ("fastmaf", "dense", "zuko")
    assert (tmp_path / "bench-results" / "cpu-quick.csv").exists()


def test_a_missing_library_is_no_error_and_listed(requested: dict[str, Any], tmp_path: Path) -> None:
    result = invoke("--quick", "--out", tmp_path)
    assert result.exit_code == 0
    assert re.search(r"^Not measured:\n  nflows at .*pip install 'fastmaf\[bench\]'", result.stdout, re.MULTILINE)


def test_a_run_without_results_ends_without_a_traceback(requested: dict[str, Any], tmp_path: Path) -> None:
    requested["rows"] = []
    result = invoke("--quick", "--out", tmp_path)
    assert result.exit_code == 0 and "Not measured:" in result.stdout


def test_progress_can_be_hidden(
    requested: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command.bench(tmp_path, quick=True, progress=True, say=lambda _: None)
    assert "100%" in capfd.readouterr().err
    assert command.bench(tmp_path, quick=True, progress=False, say=lambda _: None)
    assert capfd.readouterr().err == ""


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command as a user does, and returns its error of one line."""
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastmaf", "bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, message = capsys.readouterr()
        assert ended.value.code == 1 and "Traceback" not in output + message
        assert len(re.findall(r"^error: \S", message, re.MULTILINE)) == 1, message
        return message

    return call


def test_an_unknown_library_is_an_error_that_names_the_possible_ones(error: Any, requested: dict[str, Any]) -> None:
    message = error("--quick", "--library", "nflow")
    assert all(name in message for name in ("'nflow'", "naive", "dense", "nflows", "zuko", "normflows", "flowjax"))
    assert "plan" not in requested


def test_missing_packages_are_an_error_that_names_what_to_install(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fastmaf.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastmaf, "bench")
    monkeypatch.setitem(sys.modules, "psutil", None)
    message = error("--quick")
    assert "pip install 'fastmaf[bench]'" in message and "psutil" in message


def test_an_impossible_device_or_folder_is_an_error_before_anything_is_measured(
    error: Any, requested: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    (tmp_path / "file").write_text("not a folder")
    assert "file" in error("--quick", "--out", tmp_path / "file" / "results")
    with pytest.raises(ValueError, match="must be cpu or cuda .*found 'cuda:1'"):
        command.bench(tmp_path, quick=True, device="cuda:1")
    if not torch.cuda.is_available():
        result = invoke("--quick", "--device", "cuda")
        assert result.exit_code != 0 and "no usable CUDA device" in result.output
    assert "plan" not in requested


def test_two_runs_are_compared_without_measuring(requested: dict[str, Any], error: Any, tmp_path: Path) -> None:
    before, after, other = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "other.csv"
    rows.write([row("log_prob", "8", "zuko", 0.01)], ABOUT, before)
    rows.write([row("log_prob", "8", "zuko", 0.02)], ABOUT, after)
    result = invoke("--compare", before, after)
    assert result.exit_code == 1, "slower is an error"
    assert re.search(r"2\.00.*REGRESSION.*zuko", result.stdout)
    assert invoke("--compare", before, before).exit_code == 0
    assert invoke("--compare", after, before).exit_code == 0, "faster is none"
    other.write_text("name\nx\n")
    assert "other.csv" in error("--compare", other, before)
    assert "missing.csv" in error("--compare", tmp_path / "missing.csv", before)
    assert invoke("--compare", before).exit_code == 2, "one file"
    assert "plan" not in requested


def test_the_help_names_every_option() -> None:
    text = invoke("--help").output
    for option in ("--quick", "--out", "--library", "--compare", "--device", "--quiet"):
        assert option in text
