"""The native backend: its numbers against the reference, for any shape, storage and number of threads."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf import kernels
from tests.core.helpers import normal, padding_of
from tests.kernels.cases import OPS, check_contract, evaluate, leaves, make, needs, same
from tests.tolerances import F32, F64

pytestmark = needs("native")

# The native loops change at 8 and 64 samples and at whole vectors; the C++ test goes through all the others.
BATCHES = [1, 8, 9, 130]


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
        lambda seed: make(kind, batch, 1501, seed=seed, hidden_features=(64, 48), tiles="production", levels=20),
        draws=4 if batch > 1 else 24,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_float32_contract_at_full_width(kind: str) -> None:
    check_contract(
        lambda seed: make(kind, 8, 12_288, seed=seed, hidden_features=(96,), tiles="production", scale=1.0), draws=4
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", OPS)
def test_it_is_the_reference(kind: str, batch: int) -> None:
    for tiles in ("many", "one"):
        case = make(kind, batch, 61, tiles=tiles, hidden_features=(48, 32))
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


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("batch", [5, 130])  # of one image the error of the log-determinant is a draw of one
@pytest.mark.parametrize("kind", ["relu", "affine", "inverse", "flow"])
def test_any_number_of_threads(kind: str, batch: int) -> None:
    """One, two, and more threads than cores: equal to rounding, and to the bit when repeated."""
    for features, hidden, tiles, levels in ((61, (48, 32), "many", None), (1501, (64, 48), "production", 5)):
        case = make(kind, batch, features, hidden_features=hidden, tiles=tiles, levels=levels)
        expected = evaluate(case, "torch", F64)
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            first = evaluate(case, "native", F32)
            same(first, expected)
            for _ in range(2):
                again = evaluate(case, "native", F32)
                assert all(torch.equal(first[key], again[key]) for key in first), f"{n} threads: not repeatable"


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
