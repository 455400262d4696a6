"""What every version has saved loads, whatever the settings of the process."""

from __future__ import annotations

import json
import os
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.inspection.detector import Detector
from fastmaf.io import packed_weights
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.kernels import PackedLayout
from fastmaf.kernels.storage import read_rows
from fastmaf.transforms import TRANSFORMS, AffineAutoregressive
from tests.core.helpers import layers_of, normal
from tests.io.model_files import D, flows
from tests.io.version_1 import write_version_1


def test_what_was_saved_loads_to_the_bit(folder: Path) -> None:
    for name, flow in flows().items():
        again, x = fastmaf.load(folder / f"{name}.safetensors"), normal(4, D, dtype=torch.float32).sigmoid()
        assert all(torch.equal(again.state_dict()[key], value) for key, value in flow.state_dict().items())
        assert torch.equal(again.log_prob(x), flow.log_prob(x))
    detector = Detector.load(folder / "inspection.safetensors")
    assert (detector.rank, detector.blocks, detector.steps, detector.folds) == (3, 1, 5, 3)
    assert detector.calibration_.source == "line 3"


def test_a_file_of_the_first_version_byte_by_byte(tmp_path: Path) -> None:
    """z = (x - shift) exp(-log_scale) of two dimensions and one hidden unit, h = relu(2 x_1 - 1)."""
    block = {
        "type": "affine_autoregressive", "features": 2, "hidden_features": [1], "activation": "relu", "strict": True,
        "log_scale_bound": 5.0, "soft_bound": False,
    }  # fmt: skip
    tiles = {"transforms.0.made.hidden.0": [[0, 1, 2, 0]], "transforms.0.made.output": [[0, 2, 0, 0], [2, 4, 1, 0]]}
    config = {"version": 1, "class": "MAF", "features": 2, "transforms": [block], "tiles": tiles}
    values: dict[str, tuple[str, bytes, int]] = {
        "hidden.0.bias": ("F64", struct.pack("<d", -1.0), 1),
        "hidden.0.weight": ("F64", struct.pack("<2d", 2.0, 0.0), 2),
        "output.bias": ("F64", struct.pack("<4d", 0.5, 0.25, -0.5, 0.0), 4),
        "output.weight": ("F64", struct.pack("<2d", 3.0, 0.125), 2),
        "degrees_0": ("I32", struct.pack("<i", 1), 1),
    }
    header: dict[str, Any] = {"__metadata__": {"fastmaf": json.dumps(config)}}
    data = b""
    for name, (dtype, content, n) in values.items():
        offsets = [len(data), len(data) + len(content)]
        header[f"transforms.0.made.{name}"] = {"dtype": dtype, "shape": [n], "data_offsets": offsets}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "old.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    flow = fastmaf.load(path)
    z, ladj = flow(torch.tensor([[1.0, 4.0]], dtype=torch.float64))
    hidden = 2 * 1.0 - 1
    expected = (1.0 - 0.5) * np.exp(-0.25), (4.0 - (3 * hidden - 0.5)) * np.exp(-0.125 * hidden)
    np.testing.assert_allclose(z.detach().numpy()[0], expected, rtol=1e-14)
    np.testing.assert_allclose(ladj.item(), -0.25 - 0.125 * hidden, rtol=1e-14)


class Shift(fastmaf.Transform):
    """A transform that a user registered; ``from_config`` fails as its class attribute says."""

    error: Exception | None = None

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__()
        self.features = len(shift)
        self.register_buffer("shift", shift.clone())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x - self.get_buffer("shift"), x.new_zeros(len(x))

    def config(self) -> dict[str, Any]:
        return {"made by": "a user"}

    @classmethod
    def from_config(cls, config: Any, tensors: Any) -> Shift:
        if cls.error is not None:
            raise cls.error
        return cls(tensors["shift"])


def test_a_registered_transform_may_fail_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "shift", Shift)
    flow, x, path = fastmaf.Flow(3, [Shift(torch.arange(3.0))]), normal(2, 3, dtype=torch.float32), tmp_path / "a"
    flow.save(path)
    assert torch.equal(fastmaf.load(path).log_prob(x), flow.log_prob(x))
    for error in (RecursionError("deep"), MemoryError("large"), IndexError("far"), OverflowError("wide")):
        monkeypatch.setattr(Shift, "error", error)
        with pytest.raises(fastmaf.CheckpointError, match=str(error)) as caught:
            fastmaf.load(path)
        assert str(path) in str(caught.value)


def test_weights_are_read_into_the_memory_of_the_flow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: set[int] = set()

    def recorded(file: FileIO, weight: torch.Tensor, layout: PackedLayout) -> bool:
        written.add(weight.data_ptr())
        return read_rows(file, weight, layout)

    monkeypatch.setattr(packed_weights, "read_rows", recorded)
    for name in ("maf", "inference copy"):
        written.clear()
        flow = fastmaf.load(folder / f"{name}.safetensors")
        assert written == {layer.weight.data_ptr() for layer in layers_of(flow).values()}


def test_a_file_that_is_cut_while_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file would end the process here."""
    path = folder / "maf.safetensors"
    build = AffineAutoregressive.from_config

    def cut(*args: Any) -> AffineAutoregressive:
        os.truncate(path, path.stat().st_size // 4)
        return build(*args)

    monkeypatch.setattr(AffineAutoregressive, "from_config", cut)
    with pytest.raises(fastmaf.CheckpointError, match=r"maf.safetensors .* it ends within the tensor '.*weight'"):
        fastmaf.load(path)


class Layer(fastmaf.Transform):
    """A transform of a user that contains a masked layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, degrees = features, torch.arange(features)
        self.layer = fastmaf.MaskedLinear(degrees, degrees, strict=True, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x - self.layer(x), x.new_zeros(len(x))

    def config(self) -> dict[str, Any]:
        return {"features": self.features}

    @classmethod
    def from_config(cls, config: Any, tensors: Any) -> Layer:
        return cls(config["features"])


def test_masked_layers_in_transforms_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "layer", Layer)
    flow, x, path = fastmaf.Flow(20, [Layer(20)]), normal(2, 20), tmp_path / "a.safetensors"
    for write in (lambda: flow.save(path), lambda: write_version_1(flow, path)):
        write()
        assert torch.equal(fastmaf.load(path).log_prob(x), flow.log_prob(x))
    tensors, metadata = read_tensors(path)
    name = "transforms.0.layer.weight"
    write_tensors({**tensors, name: tensors[name][1:]}, path, metadata)
    with pytest.raises(fastmaf.CheckpointError, match=rf"tensor {name}: expected \d+ numbers"):
        fastmaf.load(path)


def test_loading_does_not_depend_on_global_settings(folder: Path) -> None:
    for name, flow in flows().items():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                again = fastmaf.load(folder / f"{name}.safetensors")
        finally:
            torch.set_default_dtype(before)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in flow.state_dict().items())
        x = normal(4, D, dtype=torch.float32).sigmoid()
        assert torch.equal(again.log_prob(x), flow.log_prob(x))
