"""The Triton kernels of the ops: their numbers against the reference, on every launch path, shape and storage.

Interpreted on the CPU, and on a GPU where there is one. Sizes are small: the interpreter takes some 50 µs for an
operation of a program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf import kernels
from fastmaf.kernels import LinearArgs, PackedLayout
from fastmaf.kernels.float8 import BYTE, FLOAT8
from tests.core.helpers import padding_of
from tests.kernels.cases import (
    OPS,
    TRITON_MARKS,
    Case,
    check_contract,
    evaluate,
    leaves,
    make,
    poisoned,
    same,
    set_launch,
)
from tests.tolerances import F32, F64

pytestmark = TRITON_MARKS

SMALL: dict[str, Any] = {"hidden_features": (9,), "levels": 3}
ONE_OF_EACH = ["relu", "affine", "inverse", "flow"]


@pytest.fixture(autouse=True)
def poison(device: str) -> Iterator[None]:
    with poisoned(device):
        yield


def small(kind: str, batch: int, features: int = 13, **options: Any) -> Case:
    """Makes a call on a small block, or on a flow of two."""
    if kind.startswith("flow"):
        order = [torch.arange(features).roll(3), torch.arange(features).flip(0)]
        options = {"blocks": 2, "order": order, **options}
    return make(kind, batch, features, **{**SMALL, **options})


def against_reference(case: Case, inputs: dict[str, Tensor] | None = None) -> None:
    same(evaluate(case, "triton", F32, inputs), evaluate(case, "torch", F64))


@pytest.mark.parametrize("batch, draws", [(1, 24), (3, 8), (17, 4)])
@pytest.mark.parametrize("kind", OPS)
def test_float32_contract(device: str, kind: str, batch: int, draws: int) -> None:
    if device == "cpu" and batch != 3 and kind.startswith(("affine, ", "inverse, ", "flow, ")):
        pytest.skip("too long where it is interpreted: how log-scales are bounded is no matter of the batch")
    check_contract(lambda seed: small(kind, batch, seed=seed, device=device), draws, "triton")


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_whole_panels_and_vectors(device: str, kind: str) -> None:
    """Layers whose sides are multiples of 16, as those of every large model; in the other tests they are not."""
    for batch in (1, 5):
        against_reference(small(kind, batch, 32, widths="own", hidden_features=(16, 32), device=device))


@pytest.mark.parametrize(
    "kind, rows, columns, programs, batch",
    [
        ("relu", 16, 16, 64, 1),
        ("relu", 16, 32, 64, 17),
        ("relu", 32, 16, 1, 3),
        ("linear", 16, 16, 2, 33),
        ("affine", 16, 16, 64, 1),
        ("affine", 32, 16, 64, 17),
        ("flow", 32, 16, 64, 1),
        ("flow", 16, 32, 1, 3),
        ("flow", 16, 16, 64, 17),
    ],
)
def test_launch_paths(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str, rows: int, columns: int, programs: int, batch: int
) -> None:
    """Split and unsplit sums, several tiles of samples, of rows and of columns, several segments of each."""
    set_launch(monkeypatch, device, rows, columns, programs)
    features, hidden = {"affine": (21, (37,)), "flow": (21, (37, 19))}.get(kind, (70, (37,)))
    against_reference(small(kind, batch, features, hidden_features=hidden, levels=None, device=device))


def test_more_partial_sums_than_are_added_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    set_launch(monkeypatch, device, 16, 16, 4096)
    against_reference(make("relu", 2, 35 * 16 + 1, hidden_features=(11,), device=device))


def test_launches_take_the_paths_meant(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What the test above relies on: many programs split the sums, few do not; and no path is left out."""
    from fastmaf.kernels.triton_common import device as triton_parts

    seen: list[tuple[str, dict[str, Any]]] = []

    def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
        seen.append((kernel.__name__, options))
        original(kernel, grid, *args, **options)

    original = triton_parts.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("fastmaf.kernels.") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", launch)

    def paths(programs: int, batch: int, features: int = 37) -> set[tuple[object, ...]]:
        seen.clear()
        set_launch(monkeypatch, device, 16, 16, programs)
        against_reference(make("relu", batch, features, hidden_features=(11,), device=device))
        # Of the forward pass the first two, of the backward pass the others.
        keys = ("SPLIT", "LANES", "MANY", "NEED_X", "WEIGHT")
        return {(name, *(options.get(key) for key in keys)) for name, options in seen}

    forward, backward = "_masked_linear_fwd_kernel", "_masked_linear_bwd_kernel"
    sms = 1 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    assert (forward, True, True, None, None, None) in paths(64, 1)
    assert (forward, False, False, None, None, None) in paths(1, 16 * sms * 2)
    assert (backward, None, True, False, True, "store") in paths(1, 8)
    inputs = (backward, None, False, True, True, "none")
    assert {inputs, (backward, None, True, True, False, "store")} <= paths(1, 9)
    assert {inputs, (backward, None, False, True, False, "store")} <= paths(1, 17)
    monkeypatch.undo()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastmaf.kernels.") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", launch)
    seen.clear()
    against_reference(make("relu", 1, 37, hidden_features=(11,), device=device))
    assert seen[0][1]["SPLIT"] is False, "few columns are not split, whatever the card"


@pytest.mark.parametrize(
    "most, batch, options",
    [
        (1024, 5, {"features": 17, "hidden_features": (33, 20), "levels": 2}),  # many units per level
        (4, 9, {"features": 17, "hidden_features": (20,), "levels": 2}),
        (4, 6, {"features": 29, "hidden_features": (5, 5), "degrees": "cyclic"}),  # most outputs at the end
        (1024, 17, {"features": 29, "hidden_features": (3,), "degrees": "cyclic"}),
        (1024, 1, {"features": 13, "hidden_features": (6, 9, 7), "levels": 5}),
        (8, 17, {"features": 13, "hidden_features": (6, 9, 7), "levels": 4}),
        (1024, 3, {"features": 70, "hidden_features": (40, 50), "levels": 50}),  # several groups of several steps
        (1024, 11, {"features": 45, "hidden_features": (36, 33, 21), "degrees": "random"}),
        (1024, 2, {"features": 45, "hidden_features": (90, 18), "degrees": "random"}),  # wide steps among others
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [16, 64])
def test_paths_of_the_inverse(
    monkeypatch: pytest.MonkeyPatch, device: str, options: dict[str, Any], most: int, batch: int, columns: int
) -> None:
    """Several launches, chunks of few dimensions, tiles of columns smaller and larger than what they walk over."""
    # Not by its dotted path: there the function hides the module of the same name.
    triton_kernel = sys.modules["fastmaf.kernels.flow.triton.inverse"]

    set_launch(monkeypatch, device, 32, columns, 2)
    monkeypatch.setattr(triton_kernel, "MOST_SAMPLES", most)
    case = make("inverse", batch, device=device, **options)
    against_reference(case)


@pytest.mark.parametrize(
    "features, degrees",
    [
        (1, [[0, 1, 1]]),
        (1, [[1], [0, 0]]),
        (2, [[0, 1, 1, 2], [1, 2]]),
        (13, [[0, 0, 0]]),
        (13, [[2, 3, 6, 10], [1, 5, 7, 11]]),
        (13, [[0, 8, 2], [11, 3], [4, 4, 9, 12, 13]]),
        (13, [[13, 13], [13]]),
        (7, [list(range(8)) * 3, list(range(1, 7))]),
        (5, [[1, 2, 2, 3, 4]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_degrees(device: str, kind: str, features: int, degrees: list[list[int]]) -> None:
    """Duplicates, units that see nothing or all, one and two dimensions, fewer, as many and more units than those."""
    # The seed gives no gradient that is a small difference of large terms, which float32 cannot tell to the tolerance.
    options: dict[str, Any] = {"degrees": [torch.tensor(d) for d in degrees], "levels": None, "seed": 1}
    for batch in (3,) if kind in ("inverse", "flow") else (1, 5):
        against_reference(
            small(kind, batch, features, hidden_features=tuple(map(len, degrees)), device=device, **options)
        )


@pytest.mark.parametrize("kind", OPS)
def test_an_empty_batch_has_zero_gradients(device: str, kind: str) -> None:
    found = evaluate(small(kind, 0, hidden_features=(29, 31), device=device), "triton", F32)
    for key, value in found.items():
        assert value.isfinite().all() and not value.any(), key
    assert found["result 0"].shape == (0, 29 if kind in ("linear", "relu") else 13)


def scattered(t: Tensor, offset: int) -> Tensor:
    """Returns a view that holds these numbers: every second column of rows that start late, or at an offset."""
    if t.dim() == 2:
        view = t.new_full((t.shape[0] + 1, 2 * t.shape[1]), torch.nan)[1:, ::2]
    else:
        view = t.new_full((t.numel() + offset + 7,), torch.nan)[offset : offset + t.numel()]
    return view.copy_(t)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_views(device: str, kind: str) -> None:
    """Also where the kernels count on whole vectors: a weight at an odd offset must not be read as aligned."""
    for offset, batch in ((1, 1), (3, 3)):
        case = small(kind, batch, 32, hidden_features=(16,), widths="own", device=device)
        views = {key: scattered(t.detach(), offset).requires_grad_() for key, t in leaves(case, F32).items()}
        assert not views["x"].is_contiguous() and views["weight 0"].storage_offset() == offset
        same(evaluate(case, "triton", F32, views), evaluate(case, "triton", F32))


@pytest.mark.parametrize("kind", ["relu", "affine"])
def test_transposed_expanded_and_sliced_inputs(device: str, kind: str) -> None:
    case = small(kind, 3, device=device)
    plain = leaves(case, F32)
    x = plain["x"].detach()
    expected = evaluate(case, "triton", F32)
    for view in (x.t().contiguous().t(), torch.cat((x * torch.nan, x))[3:], x.repeat(1, 2)[:, 13:]):
        assert torch.equal(view, x)
        same(evaluate(case, "triton", F32, {**plain, "x": view.requires_grad_()}), expected)
    row = {**plain, "x": x[:1].expand(3, 13).detach().requires_grad_()}
    twin = {**plain, "x": x[:1].repeat(3, 1).requires_grad_()}
    same(evaluate(case, "triton", F32, row), evaluate(case, "triton", F32, twin))


@pytest.mark.parametrize("kind", ["linear", *ONE_OF_EACH])
def test_gradients_of_some_inputs_only(device: str, kind: str) -> None:
    """As in training, where the data need none; and in a frozen flow, whose weights need none."""
    case = small(kind, 3, device=device)
    everything = evaluate(case, "triton", F32)
    for frozen in (["x"], [key for key in case.tensors if key != "x"]):
        inputs = leaves(case, F32)
        for key in frozen:
            inputs[key].requires_grad_(False)
        found = evaluate(case, "triton", F32, inputs)
        assert len(found) == len(everything) - len(frozen)
        same(found, {key: everything[key] for key in found})


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8], ids=str)
def test_weights_of_fewer_bits_are_rounded_weights(device: str, dtype: torch.dtype, kind: str) -> None:
    for batch in (3,) if kind.startswith(("inverse", "flow")) else (1, 3, 9):
        case = small(kind, batch, device=device)
        stored, rounded = leaves(case, F32), leaves(case, F64)
        for key in case.tensors:
            if key.startswith("weight"):
                fewer = stored[key].detach().to(dtype)
                stored[key], rounded[key] = fewer.view(BYTE) if dtype == FLOAT8 else fewer, fewer.double()
        found = evaluate(case, "triton", F32, stored)
        assert all(value.dtype == F32 for value in found.values())
        same(found, evaluate(case, "torch", F64, rounded))


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_every_float8_number_is_exact(device: str, batch: int) -> None:
    layout, stored, scale = PackedLayout(torch.full((16,), 16), 16), torch.arange(256, dtype=BYTE), 2.0**-9
    stored[stored % 128 == 127] = 0  # NaN, which is never stored
    parts = stored.to(device), torch.zeros(16, device=device), layout.prefix.to(device), layout.panels
    args = LinearArgs(*parts, weight_scale=scale)
    with kernels.use_backend("triton"):
        y = torch.cat([kernels.masked_linear(x, args) for x in torch.eye(16, device=device).split(batch)])
    expected = layout.unpack(stored.view(FLOAT8).double() * scale)
    assert len(expected.unique()) == 253 and torch.equal(y.t().cpu().double(), expected)


@pytest.mark.parametrize("kind, batch", [("linear", 1), ("linear", 33), ("affine, soft", 17), ("flow, free", 3)])
def test_the_gradient_of_the_padding_is_exactly_zero(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str, batch: int
) -> None:
    set_launch(monkeypatch, device, 16, 16, 2)
    case = small(kind, batch, levels=None, device=device)
    found = evaluate(case, "triton", F32)
    for k, layer in enumerate(case.layers):
        assert padding_of(layer).any(), "the test wants padding"
        assert not found[f"gradient of weight {k}"][padding_of(layer)].any()


@pytest.mark.parametrize(
    "kind, batch",
    [("relu", 17), ("affine", 3), ("affine, soft", 17), ("inverse", 3), ("inverse, soft", 3), ("flow", 3)],
)
def test_nan_stays_in_its_sample(device: str, kind: str, batch: int) -> None:
    case = small(kind, batch, device=device)
    clean, dirty = leaves(case, F32), leaves(case, F32)
    with torch.no_grad():
        dirty["x"][1, 4] = torch.nan
    expected, found = evaluate(case, "triton", F32, clean), evaluate(case, "triton", F32, dirty)
    others = [i for i in range(batch) if i != 1]
    for key in (*(key for key in found if key.startswith("result")), "gradient of x"):
        assert torch.equal(found[key][others], expected[key][others]), key
    assert found["result 0"][1].isnan().any()
    if "affine" in kind:
        assert torch.equal(found["result 0"][1].isnan(), torch.arange(13, device=device) == 4)
    if "inverse" in kind:  # one dimension after the other: those before know nothing of it
        assert torch.equal(found["result 0"][1, :4], expected["result 0"][1, :4]) and found["result 0"][1, 4].isnan()
        assert found["result 1"][1].isnan()


@pytest.mark.parametrize("kind", ["affine, soft", "affine, clamp", "affine, free"])
def test_nan_of_the_network_is_not_bounded_away(device: str, kind: str) -> None:
    case = small(kind, 3, device=device)
    inputs = leaves(case, F32)
    with torch.no_grad():
        inputs["bias 0"][9] = torch.nan  # the log-scale of dimension 4
    found = evaluate(case, "triton", F32, inputs)
    assert found["result 0"][:, 4].isnan().all() and found["result 2"][:, 4].isnan().all()
    assert found["result 1"].isnan().all()


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_same_every_time(monkeypatch: pytest.MonkeyPatch, device: str, kind: str) -> None:
    for programs, batch in ((64, 1), (8, 17)) if kind in ("relu", "inverse") else ((8, 3),):
        set_launch(monkeypatch, device, 16, 16, programs)
        case = small(kind, batch, device=device)
        first = evaluate(case, "triton", F32)
        for _ in range(19 if device == "cuda" else 1):
            again = evaluate(case, "triton", F32)
            assert all(torch.equal(first[key], again[key]) for key in first)


def test_unknown_activations_are_refused(device: str) -> None:
    case = small("relu", 1, device=device)
    t, layer = leaves(case, F32), case.layers[0]
    with kernels.use_backend("triton"), pytest.raises(ValueError, match="tanh"):
        kernels.masked_linear(t["x"], LinearArgs(t["weight 0"], t["bias 0"], layer.prefix, layer.layout.panels, "tanh"))
