"""The launch table and the precision of the Triton kernels: what cards and names they know; no Triton is needed."""

from __future__ import annotations

import pytest

import fastmaf
from fastmaf.kernels.triton_common import launch_table
from fastmaf.kernels.triton_common.launch_table import Launch, precision, use_precision
from tests.kernels.cases import set_launch


@pytest.mark.parametrize("rows, warps", [(8, 4), (16, 4), (32, 8)])
def test_compiled_programs_of_the_tests_have_several_warps(
    monkeypatch: pytest.MonkeyPatch, rows: int, warps: int
) -> None:
    """With one warp a missing barrier could not show, and compute-sanitizer finds no race."""
    set_launch(monkeypatch, "cuda", rows, 16, 4)
    for table in launch_table.TABLES.values():
        assert {entry.warps for entry in table if isinstance(entry, Launch)} == {warps}


def test_the_default_is_full_precision() -> None:
    """Without a choice of the user's no card refuses; ``"auto"`` takes what a card has."""
    assert launch_table.chosen_precision() == "ieee"
    assert precision(61) == precision(90) == "ieee"
    with use_precision("auto"):
        check_auto()


def check_auto() -> None:
    found = {capability: precision(capability) for capability in (61, 70, 75, 80, 86, 89, 90, 120)}
    assert found == dict.fromkeys((61, 70, 75), "ieee") | dict.fromkeys((80, 86, 89, 90, 120), "tf32x3")
    with use_precision("ieee"):
        assert precision(61) == precision(90) == "ieee"
        with use_precision("auto"):
            assert precision(61) == "ieee" and precision(90) == "tf32x3"


@pytest.mark.parametrize("name", ["fp16", "", "TF32", None])
def test_unknown_precisions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="precision must be one of") as caught:
        use_precision(name)  # type: ignore[arg-type]
    for known in ("auto", "ieee", "tf32x3", "tf32", "bf16", repr(name)):
        assert known in str(caught.value)
    assert launch_table.chosen_precision() == "ieee", "a refused name changed the choice"


def test_the_advice_of_a_refused_precision_can_be_followed() -> None:
    """The message names ``fastmaf.use_precision``."""
    with use_precision("bf16"), pytest.raises(ValueError, match="fastmaf.use_precision"):
        precision(75)
    assert fastmaf.use_precision is use_precision


def test_families_of_cards() -> None:
    found = {capability: launch_table.family(capability) for capability in (61, 62, 70, 75, 80, 86, 89, 90, 120)}
    assert list(found.values()) == [61, 61, 61, 75, 80, 80, 80, 90, 90]
    with pytest.raises(ValueError, match=r"6\.1.*5\.2"):
        launch_table.family(52)


def test_families_without_the_matrix_units_refuse_them() -> None:
    for name in ("tf32x3", "tf32", "bf16"):
        with use_precision(name):
            assert precision(80) == precision(90) == name
            for capability, text in ((61, "6.1"), (75, "7.5")):
                with pytest.raises(ValueError) as caught:
                    precision(capability)
                assert all(part in str(caught.value) for part in (repr(name), "8.0", text, "auto"))
    assert precision(61) == "ieee"


def test_every_table_can_be_launched() -> None:
    """Blocks are powers of two, as the compiler demands, and no smaller than a matrix product may be."""
    for table in launch_table.TABLES.values():
        for one in (table.lanes, table.few, table.dot, table.backward, table.backward_many, table.solve):
            for number in (one.rows, one.columns, one.warps):
                assert number & (number - 1) == 0
            assert one.rows >= 16 and one.columns >= 16 and one.stages >= 1 and one.programs_per_sm >= 1
        assert table.most_samples & (table.most_samples - 1) == 0 and table.most_samples >= 16
        for one in (table.lanes, table.few):  # a load of a sample has fewer numbers than the program has threads
            assert 8 * one.warps <= one.columns // one.stages < 32 * one.warps
        assert table.backward.columns < 32 * table.backward.warps
