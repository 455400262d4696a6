"""The native backend: its numbers against the reference, for any shape, storage and number of threads."""

from __future__ import annotations

import copy
import importlib
import io
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf import kernels
from fastmaf.kernels import AffineArgs, native_library, storage
from fastmaf.kernels.affine_output.affine_map import CLAMP, SCALE_FIRST, SHIFT_FIRST, SIGMOID, SOFTPLUS, TANH, AffineMap
from fastmaf.kernels.affine_output.args import AffineBatch
from fastmaf.kernels.flow.args import FlowBatch
from tests.core.helpers import build, normal, padding_of
from tests.kernels.cases import OPS, check_contract, evaluate, leaves, make, needs, same
from tests.kernels.native_calls import args_of
from tests.tolerances import F32, F64, assert_float32, distance

pytestmark = needs("native")

# The native loops change at 8 and 64 samples and at whole vectors; the C++ test goes through all the others.
BATCHES = [1, 8, 9, 130]
AFFINE_MAPS = {
    f"{form} {scale}, {epsilon}": AffineMap(form, scale, 2.0, epsilon)
    for form in (SHIFT_FIRST, SCALE_FIRST)
    for scale in range(5)
    for epsilon in ((0.0, 1e-3) if scale in (SOFTPLUS, SIGMOID) else (0.0,))
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", OPS)
def test_float32_contract(kind: str, batch: int) -> None:
    check_contract(
        lambda seed: make(kind, batch, 37, seed=seed, hidden_features=(29, 31), levels=9), 6 if batch > 1 else 32
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 65])
@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_float32_contract_at_larger_sizes(kind: str, batch: int) -> None:
    check_contract(
        lambda seed: make(kind, batch, 1501, seed=seed, hidden_features=(64, 48), levels=20),
        draws=4 if batch > 1 else 24,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_float32_contract_at_full_width(kind: str) -> None:
    check_contract(lambda seed: make(kind, 8, 12_288, seed=seed, hidden_features=(96,), scale=1.0), draws=4)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", OPS)
def test_it_is_the_reference(kind: str, batch: int) -> None:
    for widths in ("shared", "own"):
        case = make(kind, batch, 61, widths=widths, hidden_features=(48, 32))
        same(evaluate(case, "native", F64), evaluate(case, "torch", F64))


@pytest.mark.parametrize(
    "features, degrees",
    [
        (1, [[0, 1, 1]]),
        (1, [[1], [0, 0]]),
        (2, [[0, 1, 1, 2], [1, 2]]),
        (13, [[0, 0, 0]]),
        (13, [[5, 5, 5, 5, 5, 5, 5, 5, 5]]),
        (13, [[2, 3, 6, 10], [1, 5, 7, 11]]),
        (13, [[0, 8, 2], [11, 3], [4, 4, 9, 12, 13]]),
        (13, [[13, 13], [13]]),
        (17, [list(range(18)) * 3, list(range(1, 17))]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", OPS)
def test_degrees(kind: str, features: int, degrees: list[list[int]]) -> None:
    """Duplicates, units that see nothing or all, one and two dimensions, fewer and more units than dimensions."""
    options: dict[str, Any] = {"degrees": [torch.tensor(d) for d in degrees]}
    for batch in (0, 1, 5, 17):
        case = make(kind, batch, features, hidden_features=tuple(map(len, degrees)), **options)
        same(evaluate(case, "native", F64), evaluate(case, "torch", F64))


@pytest.mark.parametrize("kind", OPS)
def test_an_empty_batch_has_zero_gradients(kind: str) -> None:
    found = evaluate(make(kind, 0), "native", F32)
    for key, value in found.items():
        assert value.isfinite().all() and not value.any(), key
    assert found["result 0"].shape[0] == 0


def test_an_empty_batch_reads_no_work_buffers(tmp_path: Path) -> None:
    """On a thread of which some buffers have been grown, by a file and by a smaller flow, and others have no memory."""
    from fastmaf.kernels.flow import native

    small, large = (args_of(build(d, hidden_features=(h,), dtype=F32)) for d, h in ((4, 8), (40, 20)))

    def gradients() -> list[Tensor]:
        native.forward(normal(8, 4, dtype=F32), small, False)
        with (tmp_path / "rows").open("wb") as file:
            storage.write_rows(file, torch.ones(48), kernels.PackedLayout(torch.full((16,), 3), 3))
        batch = FlowBatch(*native.forward(normal(0, 40, dtype=F32), large, True))
        grad_x, weights, biases = native.backward(batch, large, True)
        return [grad_x, *weights, *biases]

    with ThreadPoolExecutor(1) as pool:
        assert not any(grad.any() for grad in pool.submit(gradients).result())


def scattered(t: Tensor, offset: int) -> Tensor:
    """Returns a view that holds these numbers: every second column of rows that start late, or at an offset."""
    if t.dim() == 2:
        storage = torch.full((t.shape[0] + 1, 2 * t.shape[1]), torch.nan, dtype=t.dtype)
        view = storage[1:, ::2]
    else:
        view = torch.full((t.numel() + offset,), torch.nan, dtype=t.dtype)[offset:]
    view.copy_(t)
    return view


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("kind", OPS)
def test_views(kind: str, dtype: torch.dtype, offset: int) -> None:
    case = make(kind, 9, 37)
    views = {key: scattered(t.detach(), offset).requires_grad_() for key, t in leaves(case, dtype).items()}
    assert not views["x"].is_contiguous() and views["weight 0"].storage_offset() == offset
    same(evaluate(case, "native", dtype, views), evaluate(case, "native", dtype))


@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_transposed_and_expanded_inputs(kind: str) -> None:
    case = make(kind, 9, 37)
    inputs = leaves(case, F32)
    inputs["x"] = inputs["x"].detach().t().contiguous().t().requires_grad_()
    same(evaluate(case, "native", F32, inputs), evaluate(case, "native", F32))
    inputs["x"] = normal(1, 37, dtype=F32).expand(9, 37).detach().requires_grad_()
    twin = {**leaves(case, F32), "x": normal(1, 37, dtype=F32).repeat(9, 1).requires_grad_()}
    same(evaluate(case, "native", F32, inputs), evaluate(case, "native", F32, twin))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("batch", [5, 130])
@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_results_do_not_depend_on_the_number_of_threads(kind: str, batch: int) -> None:
    for features, hidden, levels in ((61, (48, 32), None), (1501, (64, 48), 5), (150, (400,), 7)):
        case = make(kind, batch, features, hidden_features=hidden, levels=levels)
        torch.set_num_threads(1)
        first = evaluate(case, "native", F32)
        own = [
            key for key in first if kind != "inverse" or key.startswith("result")
        ]  # torch has the inverse's gradients
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            again = evaluate(case, "native", F32)
            assert all(torch.equal(first[key], again[key]) for key in own), f"{n} threads"


@pytest.mark.parametrize("kind", ["relu", "affine, soft", "affine, softplus", "inverse, sigmoid", "flow, mixed"])
def test_every_instruction_set(kind: str, isa: str) -> None:
    """Also one, a few and many rows that a panel or a vector has room for."""
    own: dict[str, list[tuple[float, float]]] = defaultdict(list)
    peer: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for features, hidden in ((1, (1,)), (17, (5, 33)), (40, (70,))):
        for batch in (0, 1, 2, 5, 8, 13, 64, 129, 300):
            case = make(kind, batch, features, hidden_features=hidden)
            assert native_library.build_info().startswith(isa)
            truth = evaluate(case, "torch", F64)
            same(evaluate(case, "native", F64), truth)
            for backend, errors in (("native", own), ("torch", peer)):
                for key, found in evaluate(case, backend, F32).items():
                    errors[key].append(distance(found, truth[key]))
    assert_float32({k: v for k, v in own.items() if len(v) > 20}, peer)  # those of all shapes


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPS)
def test_float32_contract_of_every_instruction_set(kind: str, isa: str) -> None:
    check_contract(lambda seed: make(kind, 9, 37, seed=seed, hidden_features=(29, 31), levels=9))


def _affine() -> Any:
    return importlib.import_module("fastmaf.kernels.affine_output.native")


@pytest.mark.parametrize("isa_of", ["float32", "float64"])
@pytest.mark.parametrize("name", AFFINE_MAPS)
def test_maps_of_any_raw_output(name: str, isa_of: str, isa: str) -> None:
    """From below what has a logarithm to above what has an exponential, by a layer that is its bias."""
    affine_map, dtype = AFFINE_MAPS[name], {"float32": F32, "float64": F64}[isa_of]
    far = [-1e30, -1e4, -500.0, -150.0, -104.0, -95.0, -88.0, -87.0, 90.0, 1e4, 1e30, 1e-40, -1e-40, 0.0, torch.nan]
    u = torch.cat((torch.linspace(-60, 60, 241), torch.tensor(far))).to(dtype)
    layout, numbers = kernels.PackedLayout(torch.zeros(2 * len(u), dtype=torch.int64), 1), len(u) - 1
    bias = torch.stack((torch.zeros_like(u), u), dim=1).flatten()
    args = AffineArgs(u.new_zeros(layout.numel), bias, layout.prefix, layout.panels, affine_map)
    x, h = torch.ones(1, len(u), dtype=dtype), u.new_ones(1, 1)
    a = _affine().forward(h, x, args)[2][0]
    assert a[-1].isnan()
    truth = affine_map.log_scale(u.to(F64))[:-1]
    # Where an epsilon is all that is left of a scale, the slope is what rounding leaves: hence absolute errors of it.
    peer = (affine_map.log_scale(u)[:-1].to(F64) - truth).abs() / truth.abs().clamp(min=1e-3)
    found = (a[:-1].to(F64) - truth).abs() / truth.abs().clamp(min=1e-3)
    eps = torch.finfo(dtype).eps
    assert found.isfinite().all() and (found <= 2 * peer + 4 * eps).all()
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)
    batch = AffineBatch(zeros, u.new_zeros(1), ones, h, x, a[None], x)
    slope = _affine().backward(batch, args, True, True)[2][1::2]
    expected = affine_map.slope(a.to(F64))[:-1]
    assert slope[:-1].isfinite().all() and slope.shape[0] == numbers + 1
    worst = (affine_map.slope(a)[:-1].to(F64) - expected).abs().max()
    assert (slope[:-1].to(F64) - expected).abs().max() <= 2 * worst + 4 * eps


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("scale", [CLAMP, TANH, SOFTPLUS])
def test_maps_of_infinite_and_of_the_largest_raw_outputs(scale: int, dtype: torch.dtype, isa: str) -> None:
    affine_map, most = AffineMap(SHIFT_FIRST, scale, 0.5), torch.finfo(dtype).max
    u = torch.tensor([torch.inf, -torch.inf, most, -most, torch.nan] * 4, dtype=dtype)
    layout = kernels.PackedLayout(torch.zeros(2 * len(u), dtype=torch.int64), 1)
    bias = torch.stack((torch.zeros_like(u), u), dim=1).flatten()
    args = AffineArgs(u.new_zeros(layout.numel), bias, layout.prefix, layout.panels, affine_map)
    for batch in (1, 3, 16):
        a = _affine().forward(u.new_ones(batch, 1), u.new_ones(batch, len(u)), args)[2]
        torch.testing.assert_close(a, affine_map.log_scale(u).expand_as(a), equal_nan=True)


@pytest.mark.parametrize("batch", [0, 1, 8, 65])
@pytest.mark.parametrize("kind", OPS)
def test_bfloat16_weights_are_rounded_weights(kind: str, batch: int) -> None:
    case = make(kind, batch, 61, hidden_features=(48, 32))
    stored, rounded = leaves(case, F32), leaves(case, F32)
    for key in case.tensors:
        if key.startswith("weight"):
            stored[key] = stored[key].detach().bfloat16()
            rounded[key] = stored[key].float()
    found = evaluate(case, "native", F32, stored)
    assert all(value.dtype == F32 for value in found.values())
    same(found, evaluate(case, "native", F32, rounded))


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("kind", OPS)
def test_the_gradient_of_the_padding_is_exactly_zero(kind: str, batch: int) -> None:
    case = make(kind, batch, 37, hidden_features=(29, 31))
    found = evaluate(case, "native", F32)
    for k, layer in enumerate(case.layers):
        assert padding_of(layer).any(), "the test wants padding"
        assert not found[f"gradient of weight {k}"][padding_of(layer)].any()


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_memory_on_huge_pages_is_memory(dtype: torch.dtype) -> None:
    numel = 2**23 + 5
    tensor = kernels.empty_on_huge_pages(numel, device="cpu", dtype=dtype)
    assert tensor.shape == (numel,) and tensor.dtype == dtype and tensor.device.type == "cpu"
    assert tensor.data_ptr() % 2**21 == 0
    tensor.fill_(2)
    assert tensor[0] == 2 and tensor[-1] == 2
    copied, pickled = copy.deepcopy(tensor), io.BytesIO()
    torch.save(tensor, pickled)
    assert torch.equal(copied, tensor)
    assert pickled.tell() < numel * tensor.element_size() + 2**16, "the whole page went into the file"
    small = kernels.empty_on_huge_pages(7, device=None, dtype=None)
    assert small.shape == (7,) and small.dtype == torch.get_default_dtype()
    assert kernels.empty_on_huge_pages(numel, device="meta", dtype=dtype).is_meta
