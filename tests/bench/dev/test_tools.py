"""The tools for GPUs as far as they run without one, and the tables of README.md."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmaf.bench.dev import readme
from fastmaf.bench.rows import read
from fastmaf.kernels import dispatch
from tests.bench.example_rows import ABOUT, example_run

MISSING = next((why for op in dispatch.OPS if (why := dispatch.missing(op, "triton")) is not None), None)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["bench/gpu_first.sh", "Makefile", ".ci/run", "README.md", "CONTRIBUTING.md"])
def test_what_scripts_and_pages_name_exists(name: str) -> None:
    """Most of it runs on a GPU or by hand only, so nothing else notices that a file was moved."""
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"(?<!/)\b((?:tests|kernels|fastmaf|bench)/[\w/.-]*\w)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(r"-m (fastmaf[\w.]*\w)", text)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    selected = [word for words in re.findall(r"-k '([^']+)'", text) for word in words.split(" or ")]
    assert [word for word in selected if not re.search(rf"def test_\w*{word}", tests)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_triton
def test_tune_refuses_to_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tune = importlib.import_module("fastmaf.bench.dev.tune")
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "no NVIDIA GPU was found" in capsys.readouterr().err


@needs_triton
@pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")
def test_smoke_compares_a_backend_with_float64(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    smoke = importlib.import_module("fastmaf.bench.dev.smoke")
    size = ["--features", "24", "--hidden", "32", "--batches", "3", "--precisions", "ieee"]
    monkeypatch.setattr("sys.argv", ["smoke", *size, "--device", "cpu", "--backend", "torch"])
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert smoke.main() == 0
        monkeypatch.setattr(smoke, "ALLOWED", {"ieee": 0.0})
        assert smoke.main() == 1
    finally:
        torch.use_deterministic_algorithms(deterministic)
    output = capsys.readouterr().out
    assert "0 wrong" in output and "WRONG" in output
    assert {"z", "inverse", "log_prob", "gradient", "gradients", "adam"} <= {
        line.split()[0] for line in output.splitlines()
    }


def test_tables_of_a_page_are_replaced_and_nothing_else() -> None:
    text = "before\n<!-- bench speed -->\nold\n<!-- end -->\nafter\n"
    expected = "before\n<!-- bench speed -->\nnew\n<!-- end -->\nafter\n"
    assert readme.rendered(text, {"speed": "new"}) == readme.rendered(expected, {"speed": "new"}) == expected
    with pytest.raises(ValueError, match="no table 'sped'; expected one of machine, speed"):
        readme.rendered("<!-- bench sped -->\n<!-- end -->", {"machine": "", "speed": ""})


def test_the_summary_compares_with_the_best_library_and_the_naive_model() -> None:
    found = {"measure": "AUROC", "data": "drawings", "fastmaf": "0.9", "low": "0.8", "high": "0.95", "other": "0.7"}
    found |= {"other_name": "PCA", "published": "0.6", "machine": "Some Machine", "commit": "abc1234", "date": "today"}
    slower = [
        row | {"library": "zuko", "median": str(2 * float(row["median"])), "times_fastmaf": "32"}
        for row in example_run()
        if row["library"] == "nflows"
    ]
    text = readme.summary([*slower, *example_run()], ABOUT, [found])
    assert "| Train step, batch 8 | **250 ms** | 4.00 s, 16.0× (nflows) | 2.00 s, 8.00× |" in text
    assert "| Drawing 1 sample | **250 ms** | 4.00 s†, 16.0× (nflows) | 2.00 s†, 8.00× |" in text
    assert "| Memory of training, batch 8 | **0.25 GB** | 4.00 GB, 16.0× (nflows) | 2.00 GB, 8.00× |" in text
    assert "| AUROC, drawings | **0.9** (0.8–0.95) | 0.7 (PCA) | 0.6 |" in text
    assert "commit abc1234" in text and ABOUT["processor"] in text


def test_the_pages_hold_the_tables_of_the_committed_results() -> None:
    tables = readme.tables_of(*read(readme.RESULTS / "cpu.csv"))
    shown = ""
    for page in readme.PAGES:
        shown += (text := page.read_text(encoding="utf-8"))
        assert readme.rendered(text, tables) == text, f"run make readme: {page.name} differs from bench/results"
    for name in tables:
        assert shown.count(f"<!-- bench {name} -->\n") == 1
