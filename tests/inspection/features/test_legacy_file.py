"""Reading weights in torch's former format without unpickling them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

import fastmaf
from fastmaf.inspection.features.legacy_file import read_legacy


def written(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Writes a state dict in the former format, and returns it with the file's hash."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "norm.bias": torch.randn(4, generator=generator),
    }
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return state, hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_tensors_are_those_of_torch(tmp_path: Path) -> None:
    state, sha256 = written(tmp_path / "w.pth")
    found = read_legacy(tmp_path / "w.pth", sha256)
    assert set(found) == {"conv.weight", "norm.weight", "norm.bias"}
    for name, values in found.items():
        assert torch.equal(values, state[name].flatten()), name


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sha256 = written(tmp_path / "w.pth")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert len(read_legacy(tmp_path / "w.pth", sha256)) == 3


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    _, sha256 = written(tmp_path / "w.pth")
    data = bytearray((tmp_path / "w.pth").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(fastmaf.CheckpointError, match=f"expected the file with SHA-256 {sha256}; found"):
        read_legacy(tmp_path / "w.pth", sha256)
    with pytest.raises(FileNotFoundError):
        read_legacy(tmp_path / "none.pth", sha256)
