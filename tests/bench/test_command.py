"""``fastmaf bench``: its table, its files, its exit status, and what it says where it cannot run."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import fastmaf
from fastmaf.bench import cases, command
from fastmaf.bench import run as running
from fastmaf.bench.cases import Plan, Sweep, planned
from fastmaf.bench.rows import read
from fastmaf.cli import app as cli
from tests.bench.plans import LIMITS, Size, every_case, known_limits, one_thread, plan_of
from tests.bench.rows_made import ABOUT, made

SIDES = ("fastmaf", "naive", "dense")


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


class Ran:
    """A small run from the command line."""

    def __init__(self, out: Path) -> None:
        sweep = Sweep("features", ((Size(12, (8, 8), 1), None),), ("fastmaf",), (cases.SCORE[1],))
        tiny = plan_of(SIDES, every_case(), (sweep,), seconds=1e-3)
        with pytest.MonkeyPatch.context() as patch:
            known_limits(patch)
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setattr(cases, "QUICK", tiny)
            self.out = out
            self.plan: Plan = planned("quick", sides=["dense"])
            self.result = invoke("--quick", "--side", "dense", "--out", out)

    @property
    def printed(self) -> str:
        return self.result.stdout


@pytest.fixture(scope="module")
def ran(threads: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("bench") / "new" / "folder")


def test_a_right_run_ends_well(ran: Ran) -> None:
    assert ran.result.exit_code == 0, ran.result.output


def test_every_case_has_its_table_with_the_sides_that_were_asked_for(ran: Ran) -> None:
    tables = re.split(r"\n\n", ran.printed)
    for case in ran.plan.cases:
        own = [table for table in tables if re.match(rf"\s*{case.label()} +\[D = 48, hidden 16x16, 2 blocks", table)]
        assert len(own) == 1, case.label()
        sides = [line.split()[0] for line in own[0].strip().splitlines()[2:]]
        assert sides == ["fastmaf", "dense"], case.label()
    assert "naive" not in ran.printed.split("processor")[0]
    assert len([table for table in tables if table.lstrip().startswith("features: log_prob 8")]) == 1


def test_each_row_shows_its_time_its_limit_and_its_ratio(ran: Ran) -> None:
    table = next(table for table in ran.printed.split("\n\n") if table.lstrip().startswith("log_prob 8"))
    head, columns, *lines = table.strip().splitlines()
    assert re.search(r"limit [\d.]+ (µs|ms) \([\d.e-]+ (MB|GFLOP)\)$", head)
    assert columns.split()[:2] == ["side", "median"]
    for line in lines:
        assert re.search(r"^  (fastmaf|dense) +[\d.,]+ (µs|ms) ", line), line
        assert "×" in line and "–" in line


def test_the_machine_is_described_under_the_table(ran: Ran) -> None:
    for name in ("processor", "commit", "torch", "seed", *LIMITS):
        assert re.search(rf"^{name} +\S", ran.printed, re.MULTILINE), name


def test_csv_and_json_are_written_and_hold_the_same(ran: Ran) -> None:
    rows, about = read(ran.out / "cpu-quick.csv")
    assert len(rows) == ran.plan.parts
    assert {row["side"] for row in rows} == {"fastmaf", "dense"}
    held = json.loads((ran.out / "cpu-quick.json").read_text(encoding="utf-8"))
    assert (held["rows"], held["about"]) == (rows, about)
    assert about["suite"] == "tiny"


def test_figures_are_written_and_named(ran: Ran) -> None:
    figures = sorted(path.name for path in ran.out.glob("*.png"))
    assert figures, "no figure"
    assert all((ran.out / name).stat().st_size > 1000 for name in figures)
    named = ran.printed[ran.printed.rindex("Written: ") :].replace("\n", " ")
    assert str(ran.out / "cpu-quick.csv") in named
    for name in figures:
        assert name in named


def test_the_progress_is_shown_apart_from_the_table(ran: Ran) -> None:
    assert "%|" not in ran.printed, "progress belongs on standard error"


def done(*, wrong: bool = False, left_out: bool = False) -> running.Result:
    rows = [made("log_prob", "8", "fastmaf", 0.001, 0.0005, times_fastmaf="1"), made("log_prob", "8", "zuko", 0.01)]
    return running.Result(
        rows,
        {name: value for name, value in ABOUT.items() if name not in rows[0]},
        ["nflows at D = 48: nflows is not installed; pip install 'fastmaf[bench]' brings it"] if left_out else [],
        ["dense at D = 48: log_prob is off by 1.0e-03, more than 1e-05"] if wrong else [],
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a run that takes no time in the place of the real one, and notes the plan that it was asked for."""
    found: dict[str, Any] = {"result": done()}

    def run(plan: Plan, say: Any, **options: Any) -> running.Result:
        found.update(plan=plan, options=options)
        say("log_prob 8", plan.parts)
        return found["result"]

    monkeypatch.setattr(command, "run", run)
    return found


def test_something_wrong_is_an_error_and_named(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["result"] = done(wrong=True)
    result = invoke("--quick", "--out", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"^WRONG.*\n +dense at D = 48: log_prob is off by 1.0e-03", result.stdout, re.MULTILINE)
    assert (tmp_path / "cpu-quick.csv").exists(), "what was right is written"


def test_something_missing_is_no_error_but_named(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["result"] = done(left_out=True)
    result = invoke("--quick", "--out", tmp_path)
    assert result.exit_code == 0
    assert re.search(r"^not measured:\n +nflows at .*pip install 'fastmaf\[bench\]'", result.stdout, re.MULTILINE)


def test_a_run_that_gave_nothing_says_so_without_a_traceback(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["result"] = done(left_out=True)._replace(rows=[])
    result = invoke("--quick", "--out", tmp_path)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "not measured:" in result.stdout


def test_without_options_the_full_suite_is_run(asked: dict[str, Any], tmp_path: Path) -> None:
    assert invoke("--out", tmp_path).exit_code == 0
    assert asked["plan"].name == "full" and asked["options"]["device"] == "cpu"
    assert (tmp_path / "cpu.csv").exists() and not (tmp_path / "cpu-quick.csv").exists()


def test_without_a_folder_results_go_to_one_beside_the_user(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("--quick").exit_code == 0
    assert (tmp_path / "bench-results" / "cpu-quick.csv").exists()


def test_sides_may_be_repeated(asked: dict[str, Any], tmp_path: Path) -> None:
    assert invoke("--quick", "--side", "dense", "--side", "zuko", "--out", tmp_path).exit_code == 0
    assert asked["plan"].sides == ("fastmaf", "dense", "zuko")


def test_the_progress_can_be_silenced(asked: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.bench(tmp_path, quick=True, progress=True, say=lambda _: None)
    assert "100%" in capfd.readouterr().err
    assert command.bench(tmp_path, quick=True, progress=False, say=lambda _: None)
    assert capfd.readouterr().err == ""


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command as its users do, and returns the one line of its error."""
    import warnings

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fastmaf", "bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, told = capsys.readouterr()
        assert left.value.code == 1 and "Traceback" not in out + told
        assert len(re.findall(r"^error: \S", told, re.MULTILINE)) == 1, told
        return told

    return call


def test_an_unknown_side_is_an_error_that_names_the_possible_ones(error: Any, asked: dict[str, Any]) -> None:
    told = error("--quick", "--side", "nflow")
    assert "'nflow'" in told
    for name in ("naive", "dense", "nflows", "zuko", "normflows", "flowjax"):
        assert name in told
    assert "plan" not in asked, "it ran all the same"


def test_missing_packages_are_an_error_that_says_what_to_install(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fastmaf.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastmaf, "bench")
    monkeypatch.setitem(sys.modules, "psutil", None)
    told = error("--quick")
    assert "pip install 'fastmaf[bench]'" in told and "psutil" in told


def test_a_device_that_is_not_there_is_an_error(asked: dict[str, Any]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = invoke("--quick", "--device", "cuda")
    assert result.exit_code != 0 and "plan" not in asked
    assert "no usable CUDA device" in result.output


def test_one_card_of_several_is_chosen_otherwise(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be cpu or cuda .*found 'cuda:1'"):
        command.bench(tmp_path, quick=True, device="cuda:1")
    assert "plan" not in asked


def test_a_folder_that_cannot_be_is_an_error_before_anything_is_measured(
    error: Any, asked: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "file" in error("--quick", "--out", tmp_path / "file" / "results")
    assert "plan" not in asked


def test_two_runs_are_compared_without_measuring(asked: dict[str, Any], tmp_path: Path) -> None:
    invoke("--quick", "--out", tmp_path / "a")
    rows = asked["result"].rows
    slower = [row | {column: str(2 * float(row[column])) for column in ("median", "p20", "p80")} for row in rows]
    asked["result"] = done()._replace(rows=[rows[0], slower[1]])
    invoke("--quick", "--out", tmp_path / "b")
    del asked["plan"]
    before, after = tmp_path / "a" / "cpu-quick.csv", tmp_path / "b" / "cpu-quick.csv"
    result = invoke("--compare", before, after)
    assert result.exit_code == 1, "slower is an error"
    assert re.search(r"2\.00.*zuko", result.stdout)
    assert invoke("--compare", before, before).exit_code == 0
    assert invoke("--compare", after, before).exit_code == 0, "faster is none"
    assert "plan" not in asked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "it wrote something"


def test_comparing_something_else_is_an_error_that_names_it(error: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    with open(other, "w", newline="") as file:
        csv.writer(file).writerows([["name"], ["x"]])
    assert "other.csv" in error("--compare", other, other)
    assert "missing.csv" in error("--compare", tmp_path / "missing.csv", other)


def test_comparing_takes_two_files(tmp_path: Path) -> None:
    assert invoke("--compare", tmp_path / "a.csv").exit_code == 2


def test_the_help_says_what_each_option_is_for() -> None:
    told = re.sub(r"\s+", " ", invoke("--help").output)
    for option in ("--quick", "--out", "--side", "--compare", "--device", "--quiet"):
        assert option in told
    assert "nflows" in told
