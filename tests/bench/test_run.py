"""A run of ``fastmaf bench`` with real processes: table, files and figures, and a wrong library that is excluded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from typer.testing import CliRunner, Result

import fastmaf
from fastmaf.bench import cases
from fastmaf.bench.cases import Plan
from fastmaf.bench.rows import COLUMNS, Row, read
from fastmaf.bench.run import run
from fastmaf.cli import app as cli
from tests.bench.helpers import FAILING, FILE_RATES, RATES, TINY, register_failing, set_rates, tiny_plan

pytestmark = pytest.mark.slow  # real runs, with a process for each library


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


class Ran(NamedTuple):
    """A small run from the command line, and its files."""

    result: Result
    plan: Plan
    folder: Path
    rows: list[Row]
    about: dict[str, str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    plan, folder = tiny_plan("fastmaf", "naive", "wrong"), tmp_path_factory.mktemp("bench") / "new"
    with pytest.MonkeyPatch.context() as patch:
        register_failing(patch)
        set_rates(patch)
        patch.setattr(cases, "QUICK", plan)
        result = invoke("--quick", "--library", "naive", "--library", "wrong", "--out", folder)
    return Ran(result, plan, folder, *read(folder / "cpu-quick.csv"))


def test_a_wrong_library_is_listed_and_excluded(ran: Ran) -> None:
    assert ran.result.exit_code == 1
    assert re.search(
        r"^WRONG, and not timed:\n  wrong at D = 48, hidden \(16, 16\), 2 blocks: log_prob is off by 1\.0e-03",
        ran.result.stdout,
        re.MULTILINE,
    )
    assert {row["library"] for row in ran.rows} == {"fastmaf", "naive"}


def test_every_case_of_the_correct_libraries_has_its_row_and_its_place_in_the_table(ran: Ran) -> None:
    cases = ran.plan.groups[0].cases
    expected = [(case.name, str(case.batch or ""), name) for name in ("fastmaf", "naive") for case in cases]
    assert [(row["case"], row["batch"], row["library"]) for row in ran.rows] == expected
    for case in cases:
        pattern = (
            rf"^{case.label} +\[D = 48, hidden 16x16, 2 blocks, 1 thread\].*\n  library .*\n  fastmaf .*\n  naive "
        )
        assert len(re.findall(pattern, ran.result.stdout, re.MULTILINE)) == 1, case.label


def test_times_and_ratios_are_plausible(ran: Ran) -> None:
    for row in ran.rows:
        assert tuple(row) == COLUMNS
        low, median, high = (float(row[column]) for column in ("p20", "median", "p80"))
        assert 0 < low <= median <= high < 100, row
        if row["unit"] == "GB":
            assert not row["times_fastmaf"]
        elif row["library"] == "fastmaf":
            assert float(row["times_fastmaf"]) == 1
        else:
            assert float(row["times_fastmaf"]) > 0
        if row["case"] in ("log_prob", "sample", "train step", "save", "load"):
            assert int(row["repeats"]) >= ran.plan.rounds and float(row["first"]) > 0


def test_limits_are_those_of_the_bytes(ran: Ran) -> None:
    weights = 4 * fastmaf.MAF(TINY.features, TINY.blocks, TINY.hidden, order="natural").visible_weights
    expected = {"save": weights / 1e9, "load": weights / 2e9, "training memory": 3 * weights / 1e9, "sample": 2e-6}
    for row in ran.rows:
        if row["case"] in expected:
            assert float(row["limit"]) == pytest.approx(expected[row["case"]], rel=1e-3), row
        assert float(row["fraction_of_limit"]) == pytest.approx(float(row["limit"]) / float(row["median"]), rel=1e-3)


def test_every_row_has_the_error_of_its_check(ran: Ran) -> None:
    errors = {(row["case"], row["library"]): row["error"] for row in ran.rows}
    assert all(0 <= float(error) < 1e-2 for error in errors.values())
    assert errors["log_prob", "naive"] == errors["save", "naive"] == errors["training memory", "naive"]
    assert errors["sample", "naive"] == errors["sampling memory", "naive"]
    assert errors["train step", "naive"] == errors["epoch", "naive"]


def test_notes_name_what_was_extrapolated_or_is_part_of_the_time(ran: Ran) -> None:
    notes = {(row["case"], row["library"]): row["note"] for row in ran.rows}
    assert re.match(r"extrapolated: \d+ of 96 passes", notes["sample", "naive"])
    assert "extrapolated" not in notes["sample", "fastmaf"]
    assert notes["epoch", "naive"].startswith("decoding ")


def test_the_machine_is_described(ran: Ran) -> None:
    assert {name: float(ran.about[name]) for name in (*RATES, *FILE_RATES)} == RATES | FILE_RATES
    assert ran.about["suite"] == "tiny"
    for name in ("processor", "commit", "torch", "seed", "minutes"):
        assert ran.about[name] and re.search(rf"^{name} +\S", ran.result.stdout, re.MULTILINE), name


def test_all_files_are_written_and_named(ran: Ran) -> None:
    assert "%|" not in ran.result.stdout, "progress goes elsewhere"
    names = ["cpu-quick-limits.png", "cpu-quick-memory.png", "cpu-quick-speedup.png", "cpu-quick.csv", "cpu-quick.json"]
    assert sorted(path.name for path in ran.folder.iterdir()) == names
    written = ran.result.stdout.partition("Written: ")[2].replace("\n", " ")
    assert all(str(ran.folder / name) in written for name in names)
    held = json.loads((ran.folder / "cpu-quick.json").read_text(encoding="utf-8"))
    assert (held["rows"], held["about"]) == (ran.rows, ran.about)


def test_a_run_can_be_compared(ran: Ran) -> None:
    path = ran.folder / "cpu-quick.csv"
    result = invoke("--compare", path, path)
    assert result.exit_code == 0
    assert f"{len(ran.rows)} rows compared: 0 slower or larger" in result.stdout


def test_a_failing_library_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    register_failing(monkeypatch)
    set_rates(monkeypatch)
    names = tuple(name for name in FAILING if name != "hanging")
    plan = tiny_plan("fastmaf", *names, "naive")
    progress: list[int] = []
    result = run(plan, lambda text, done: progress.append(done), seed=3)
    assert sum(progress) == plan.total
    assert {row["library"] for row in result.rows} == {"fastmaf", "naive"}
    assert result.about["seed"] == "3"
    reasons = dict(line.split(" at D = 48, hidden (16, 16), 2 blocks: ") for line in result.left_out + result.wrong)
    assert set(reasons) == set(names)
    assert "absent is not installed" in reasons["absent"] and "pip install 'fastmaf[bench]'" in reasons["absent"]
    assert reasons["raising"] == "ArithmeticError: no samples today"
    assert reasons["dying"].startswith("the process of dying ended")


def test_ctrl_c_ends_the_run_and_its_processes_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rates(monkeypatch)
    before = set(psutil.Process().children(recursive=True))

    def progress(text: str, done: int) -> None:
        if text == "naive: train step 8":
            raise KeyboardInterrupt

    plan = tiny_plan("fastmaf", "naive")
    result = run(plan, progress)
    assert result.left_out == ["everything after Ctrl-C"]
    assert [row["library"] for row in result.rows] == ["fastmaf"] * len(plan.groups[0].cases)
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert not [child for child in left if "spawn_main" in " ".join(child.cmdline())]


def test_without_fastmaf_the_others_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    register_failing(monkeypatch)
    set_rates(monkeypatch)
    monkeypatch.setitem(cases.LIBRARIES, "fastmaf", FAILING["wrong"])
    result = run(tiny_plan("fastmaf", "naive"), seed=3)
    assert [line.partition(" at ")[0] for line in result.wrong] == ["fastmaf"] and not result.left_out
    assert {row["library"] for row in result.rows} == {"naive"}
    assert not any(row["times_fastmaf"] for row in result.rows)


@pytest.mark.gpu
@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="needs an NVIDIA GPU")
def test_a_small_run_on_a_gpu_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ("fastmaf", "fastmaf, no graphs", "fastmaf (torch)", "naive", "dense")
    plan = tiny_plan(*libraries)._replace(seconds=0.01)
    result = run(plan, device="cuda")
    assert (result.left_out, result.wrong) == ([], [])
    assert len(result.rows) == plan.total and result.about["card"]
    assert all(row["limit"] and float(row["median"]) > 0 for row in result.rows)
