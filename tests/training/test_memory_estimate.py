"""The memory that is foretold, against what the allocators count."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.kernels import dispatch
from fastmaf.kernels.storage import has_library
from fastmaf.training.memory_estimate import memory_parts
from fastmaf.transforms import Transform

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.05

BASE: dict[str, Any] = {"features": 3072, "hidden": [256, 256], "blocks": 3, "batch": 8, "order": "natural"}
CASES: dict[str, dict[str, Any]] = {
    "minimize, batch 1": {"optimiser": "FusedAdam", "batch": 1},
    "minimize, batch 8, alternate": {"optimiser": "FusedAdam", "order": "alternate"},
    "minimize, batch 64": {"optimiser": "FusedAdam", "batch": 64},
    "minimize, batch 512": {"optimiser": "FusedAdam", "batch": 512},
    "minimize, huge pages": {"optimiser": "FusedAdam", "features": 3950, "hidden": [512], "blocks": 1},
    "backward and step, alternate": {"optimiser": "FusedAdam", "update": "step", "order": "alternate"},
    "clipped, one block": {"optimiser": "FusedAdam", "update": "clip", "blocks": 1, "batch": 64},
    "Adam, odd, random": {"optimiser": "Adam", "features": 4001, "hidden": [300, 100], "order": "random", "batch": 33},
    "Adam, batch 64, float64": {"optimiser": "Adam", "dtype": "float64", "batch": 64},
    "AdamW, amsgrad, fused": {"optimiser": "AdamW", "settings": {"amsgrad": True, "fused": True}},
    "SGD, momentum": {"optimiser": "SGD", "settings": {"momentum": 0.9}},
    "scoring, batch 1": {"optimiser": None, "batch": 1},
    "scoring, batch 64, alternate": {"optimiser": None, "batch": 64, "order": "alternate"},
    "scoring, bfloat16": {"optimiser": None, "inference": "bfloat16"},
    "scoring, float8": {"optimiser": None, "inference": "float8_e4m3fn"},
}
BACKENDS = ("native", "torch")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Peak and estimate of each case on each backend, counted by a library that takes malloc's place."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("counting what malloc is asked for needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("allocations") / "allocations.so"
    source = ROOT / "tests" / "training" / "allocations.c"
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    present = [name for name in BACKENDS if dispatch.missing("flow", name) is None]
    keys = [f"{name}: {case}" for name in present for case in CASES]
    cases = [{**BASE, **case, "backend": name} for name in present for case in CASES.values()]
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.allocations", str(library), json.dumps(cases)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(keys, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_estimate_is_what_the_allocator_counts(
    measured: dict[str, dict[str, int]], backend: str, case: str
) -> None:
    found = measured.get(f"{backend}: {case}")
    if found is None:
        pytest.skip(f"there is no {backend} backend here")
    assert found["estimate"] == pytest.approx(found["peak"], rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("update", ["minimize", "step", "clip", "Adam", "none"])
def test_the_estimate_is_what_cuda_counts(batch: int, update: Any) -> None:
    peak, before = 0, torch.cuda.memory_allocated()
    flow = fastmaf.MAF(12288, 3, (512, 512), order="alternate", seed=0, device="cuda")
    x = torch.rand(batch, flow.features, device="cuda")
    kind = {"none": None, "Adam": torch.optim.Adam}.get(update, fastmaf.optim.FusedAdam)
    optimiser = None if kind is None else kind(flow.parameters(), lr=1e-6)
    guards = fastmaf.Guards(max_grad_norm=1e6 if update == "clip" else None)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        if optimiser is None:
            with torch.no_grad():
                flow.log_prob(x)
        elif update == "step":
            optimiser.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimiser.step()
        else:
            fastmaf.TrainingStep(flow, optimiser, guards)(x)
        peak = torch.cuda.max_memory_allocated() - before
    used: Any = update if update in ("step", "clip") else "minimize"
    assert fastmaf.memory_estimate(flow, batch, optimiser, update=used) == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("blocks, most", [(7, 1.3e9), (20, 3.5e9)])
def test_the_reference_model_trains_within_4_gb(blocks: int, most: float) -> None:
    """Replayed steps too, whose graphs hold memory of their own, with this process capped as on such a card."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3.5e9 / torch.cuda.get_device_properties(0).total_memory)
    before = torch.cuda.memory_allocated()
    try:
        flow = fastmaf.MAF(12288, blocks, (512, 512), order="natural", seed=0, device="cuda")
        step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-4), graphs=True)
        x = torch.rand(8, flow.features, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            step(x)
        assert torch.cuda.max_memory_allocated() - before <= most
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_model_keeps_its_promise(device: str) -> None:
    seven = fastmaf.MAF(12288, 7, (512, 512), order="alternate", device="meta")
    twenty = fastmaf.MAF(12288, 20, (512, 512), order="alternate", device="meta")
    assert 0.8e9 < fastmaf.memory_estimate(seven, 8, device=device) < 1.3e9
    assert fastmaf.memory_estimate(twenty, 8, device=device) < 3.5e9
    assert fastmaf.memory_estimate(twenty, 8, torch.optim.Adam, device=device) > 3.2e9


@pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")
def test_a_flow_on_meta_is_estimated_as_one_on_the_cpu() -> None:
    built, planned = (
        fastmaf.MAF(96, 3, (32, 16), order="random", degrees="random", seed=3, device=device)
        for device in ("cpu", "meta")
    )
    assert all(tensor.is_meta for tensor in (*planned.parameters(), *planned.buffers()))
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in planned.state_dict().items()}
    for optimiser in (fastmaf.optim.FusedAdam, torch.optim.SGD, None):
        assert memory_parts(planned, 5, optimiser) == memory_parts(built, 5, optimiser)
    # A GPU needs to know where the padding lies, in int64.
    padding = sum(layer.layout.numel - layer.layout.visible for made in planned._mades() for layer in made.layers)
    fewer = memory_parts(planned, 5, device="cuda").weights - memory_parts(planned, 5).weights
    assert fewer == (8 * padding if has_library() else 0)


def test_the_parts() -> None:
    flow = fastmaf.MAF(96, 2, (32,), order="natural", seed=0)
    numbers = sum(p.numel() for p in flow.parameters())
    parts = memory_parts(flow, 4)
    assert sum(parts) == fastmaf.memory_estimate(flow, 4)
    assert parts.optimizer == 2 * 4 * numbers
    # The batch; of two blocks x, hidden units, log-scale and z, where the second has its x from the first, for a tile
    # of 16 samples, and what says how they lie.
    assert parts.activations == 4 * (4 * 96 + 16 * (5 * 96 + 2 * 32) + 1)
    assert memory_parts(flow, 4, torch.optim.SGD).optimizer == 0
    momentum = torch.optim.SGD(flow.parameters(), lr=1e-3, momentum=0.9)
    assert memory_parts(flow, 4, momentum).optimizer == 4 * numbers
    frozen = memory_parts(flow.to_inference(), 4, None)
    assert (frozen.optimizer, frozen.gradients) == (0, 0)
    assert frozen.weights <= parts.weights - 2 * flow.stored_weights
    flow.transforms[0].requires_grad_(False)
    assert memory_parts(flow, 4).optimizer == numbers * 4  # the other half


def test_more_of_anything_takes_more() -> None:
    def estimate(features: int = 96, blocks: int = 8, hidden: int = 64, batch: int = 4, **options: Any) -> int:
        return fastmaf.memory_estimate(fastmaf.MAF(features, blocks, (hidden,), device="meta"), batch, **options)

    usual = estimate()
    assert usual < min(estimate(features=128), estimate(blocks=9), estimate(hidden=96), estimate(batch=5))
    stored = estimate(update="step")
    assert estimate(optimizer=None) < usual < estimate(update="clip") < stored
    assert stored == estimate(optimizer=torch.optim.Adam(nn.Linear(1, 1).parameters(), fused=True))


class Shift(Transform):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.by = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.by, x.new_zeros(x.shape[0])


def test_transforms_of_other_classes_count() -> None:
    maf = fastmaf.MAF(96, 2, (32,), order="natural", seed=0)
    flow = fastmaf.Flow(96, [*maf.transforms, Shift(96)])
    with_, without = memory_parts(flow, 4), memory_parts(maf, 4)
    assert with_.weights == without.weights + 96 * 4
    assert with_.optimizer == without.optimizer + 2 * 96 * 4
    assert with_.activations == without.activations + 3 * 4 * 96 * 4
    assert fastmaf.memory_estimate(fastmaf.Flow(96, [Shift(96)]), 4) > 0
    assert fastmaf.memory_estimate(fastmaf.Flow(3, [fastmaf.Permutation(torch.tensor([2, 0, 1]))]), 4) > 0


class Refuses(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("not today")


def test_what_cannot_be_estimated_is_refused() -> None:
    flow = fastmaf.MAF(8, 1, (4,), device="meta")
    with pytest.raises(ValueError, match="batch must be at least 1; found 0"):
        fastmaf.memory_estimate(flow, 0)
    with pytest.raises(ValueError, match="update must be one of 'minimize', 'step', 'clip'; found 'guess'"):
        fastmaf.memory_estimate(flow, 1, update="guess")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memory of Refuses cannot be determined.*not today"):
        fastmaf.memory_estimate(flow, 1, Refuses)
