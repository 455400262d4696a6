"""The threads of a fit beside busy neighbours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastmaf.inspection import free_threads as module
from fastmaf.inspection.free_threads import free_threads


@pytest.mark.parametrize(("running", "expected"), [("1/99", 4), ("2/99", 3), ("4/99", 1), ("40/99", 1), ("odd", 4)])
def test_processors_of_others_are_left_to_them(
    running: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tmp_path / "loadavg"
    load.write_text(f"0.10 0.20 0.30 {running} 1234\n")
    monkeypatch.setattr(module, "_LOAD", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with free_threads() as threads:
            assert threads == torch.get_num_threads() == expected
        assert torch.get_num_threads() == 4
        monkeypatch.setattr(module, "_LOAD", tmp_path / "missing")
        with free_threads() as threads:
            assert threads == 4
        monkeypatch.setattr(module, "_LOAD", load)
        torch.set_num_threads(1)
        with pytest.raises(KeyboardInterrupt), free_threads():
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
