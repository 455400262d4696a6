"""One call of an op as data: what goes in, and its values and gradients on any backend, device and dtype."""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastmaf import kernels
from fastmaf.flows import Flow
from fastmaf.kernels import AffineArgs, AffineMap, LinearArgs, bounded_map, dispatch, flow_args
from fastmaf.kernels.affine_output.affine_map import CLAMP, SCALE_FIRST, SHIFT_FIRST, SIGMOID, SOFT_CLIP, SOFTPLUS
from fastmaf.kernels.triton_common import launch_table
from fastmaf.kernels.triton_common.launch_table import Launch, Table, take_cpu_tensors
from fastmaf.transforms import Permutation
from tests.core.helpers import blocks_of, build, generator, normal
from tests.tolerances import F32, F64, assert_close, assert_float32, distance

# Both forms and all scale maps, some of them strict enough to matter at the log-scales of these tests.
MAPS = {
    "clamp": bounded_map(0.2, False),
    "soft": bounded_map(0.5, True),
    "free": AffineMap(),
    "softplus": AffineMap(SCALE_FIRST, SOFTPLUS, epsilon=1e-3),
    "sigmoid": AffineMap(SCALE_FIRST, SIGMOID, 2.0, 1e-3),
    "soft clip": AffineMap(SHIFT_FIRST, SOFT_CLIP, 0.7),
    "scale first": AffineMap(SCALE_FIRST, CLAMP, 0.4),
}
_BOUNDED = bounded_map(5.0, False)
OPS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "linear": ("masked_linear", ("identity",)),
    "relu": ("masked_linear", ("relu",)),
    "affine": ("affine_output", (_BOUNDED,)),
    **{f"affine, {name}": ("affine_output", (affine_map,)) for name, affine_map in MAPS.items()},
    "inverse": ("inverse", ("relu", _BOUNDED)),
    "inverse, soft": ("inverse", ("identity", MAPS["soft"])),
    **{f"inverse, {name}": ("inverse", ("relu", MAPS[name])) for name in ("free", "softplus", "sigmoid", "soft clip")},
    "flow": ("flow", ("relu", _BOUNDED)),
    "flow, soft": ("flow", ("identity", MAPS["soft"])),
    "flow, free": ("flow", ("relu", MAPS["free"])),
    "flow, mixed": ("flow", ("relu", MAPS["softplus"], MAPS["soft clip"], MAPS["sigmoid"])),
}


def needs(backend: str) -> pytest.MarkDecorator:
    """Returns a mark that skips tests where an op has no such backend."""
    missing = next((why for op in dispatch.OPS if (why := dispatch.missing(op, backend)) is not None), None)
    return pytest.mark.skipif(missing is not None, reason=str(missing))


# Where the Triton kernels run: interpreted on the CPU (only where no GPU is, see tests/conftest.py), and on a GPU.
INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(not take_cpu_tensors(), reason="the Triton kernels are compiled here")
)
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
TRITON_MARKS = [
    pytest.mark.slow,  # the interpreter
    needs("triton"),
    pytest.mark.parametrize("device", [INTERPRETED, ON_GPU]),
    # numpy, which interprets, warns of what tests do on purpose; but an index that was divided by zero is a fault.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("error:divide by zero encountered in (fmod|floor_divide):RuntimeWarning"),
]


@contextlib.contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fills all memory that torch hands out with NaN, and keeps the small products of the reference on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A warning, not an error, where torch's own kernels on a GPU are not deterministic: those are the reference's.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all(), "the tests want poisoned memory"
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def set_launch(
    monkeypatch: pytest.MonkeyPatch, device: str, rows: int, columns: int, programs: int, most_samples: int = 16
) -> None:
    """Sets the launch parameters of every card; no smaller than a matrix product may be where it is compiled.

    Compiled programs have several warps: with one, a missing barrier could not show.
    """
    warps = 1
    if device == "cuda":
        rows, columns = max(rows, 16), max(columns, 16)
        warps = 8 if rows > 16 else 4
    one = Launch(rows, columns, warps=warps, programs_per_sm=programs)
    pairs = one._replace(stages=min(2, columns))  # as all tables have it: a thread's columns side by side
    solve = Launch(16, 8, warps=warps, programs_per_sm=1)
    for key in launch_table.TABLES:
        table = Table(pairs, pairs, one, one, one, one, most_samples, solve)
        monkeypatch.setitem(launch_table.TABLES, key, table)
    monkeypatch.setattr(launch_table, "MOST_ROUNDS", 0)  # few columns are split as well


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fails where the results of ``evaluate`` differ by more than rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close("gradients" if "gradient" in key else "values", found[key], value, key)


class Case(NamedTuple):
    """An op's floating point inputs by name, rounded to float32, and its call on them."""

    tensors: dict[str, Tensor]
    call: Callable[[dict[str, Tensor]], Any]
    layers: list[Any]


def make(kind: str, batch: int, features: int = 13, *, seed: int = 0, device: str = "cpu", **options: Any) -> Case:
    """Makes a call of one of ``OPS`` on the layers of ``build(options)``: of a block, or of a flow of three.

    The numbers are the same on every device.
    """
    name, rest = OPS[kind]
    options = {"degrees": "random", "hidden_features": (9, 31), "scale": 1.5, "seed": seed, **options}
    if name == "flow":
        options = {"blocks": 3, "order": [torch.arange(features), *_orders(features, seed)], **options}
    flow = build(features, **{"blocks": 1, "order": "natural", **options}).to(device)
    mades = [block.made for block in blocks_of(flow)]
    made = mades[0]
    layers = {"masked_linear": [made.hidden[0]], "affine_output": [made.output]}.get(name)
    layers = [layer for each in mades for layer in each.layers] if layers is None else layers
    panels = [layer.layout.panels for layer in layers]
    prefixes = [layer.prefix for layer in layers]
    tensors = {"x": normal(batch, features, seed=seed + 100).to(device)}
    if name == "affine_output":
        tensors["h"] = normal(batch, layers[0].in_features, seed=seed + 101).relu().to(device)
    for k, layer in enumerate(layers):
        tensors |= {f"weight {k}": layer.weight.detach(), f"bias {k}": layer.bias.detach()}

    def call(t: dict[str, Tensor]) -> Any:
        weights, biases = ([t[f"{what} {k}"] for k in range(len(layers))] for what in ("weight", "bias"))
        if name == "masked_linear":
            return kernels.masked_linear(t["x"], LinearArgs(weights[0], biases[0], prefixes[0], panels[0], *rest))
        if name == "affine_output":
            args = AffineArgs(weights[0], biases[0], prefixes[0], panels[0], *rest)
            return kernels.affine_output(t["h"], t["x"], args)
        depth = len(made.layers)
        parts = [slice(k, k + depth) for k in range(0, len(layers), depth)]
        activation, *maps = rest
        blocks = [
            kernels.Block(*(part[of] for part in (weights, biases, prefixes, panels)), m.schedule, activation, of_block)
            for of, m, of_block in zip(parts, mades, itertools.cycle(maps), strict=False)
        ]
        op = kernels.flow_forward if name == "flow" else kernels.flow_inverse
        return op(t["x"], flow_args(blocks, permutations_of(flow)))

    return Case({key: value.to(F32).to(F64) for key, value in tensors.items()}, call, layers)


def _orders(features: int, seed: int) -> list[Tensor]:
    """Returns an order for the second block, and the same for the third: one block without a permutation before it."""
    return [torch.randperm(features, generator=generator(seed))] * 2


def permutations_of(flow: Flow) -> list[Tensor | None]:
    """Returns the permutation before each block of a flow and after the last, or None."""
    result: list[Tensor | None] = [None]
    for transform in flow.transforms:
        if isinstance(transform, Permutation):
            result[-1] = transform.permutation
        else:
            result.append(None)
    return result


def leaves(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype, copy=True).requires_grad_() for key, value in case.tensors.items()}


def evaluate(
    case: Case, backend: str, dtype: torch.dtype, inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns the op's values and the gradients of every input that requires one, by name."""
    inputs = leaves(case, dtype) if inputs is None else inputs
    with kernels.use_backend(backend):
        results = case.call(inputs)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [normal(*r.shape, seed=200 + i).to(F32).to(r) for i, r in enumerate(results)]
        wanted = {key: t for key, t in inputs.items() if t.requires_grad}
        grads = torch.autograd.grad(results, list(wanted.values()), upstream) if wanted else ()
    values = {f"result {i}": r.detach() for i, r in enumerate(results)}
    return values | {f"gradient of {key}": g for key, g in zip(wanted, grads, strict=True)}


def check_contract(make_draw: Callable[[int], Case], draws: int = 6, backend: str = "native") -> None:
    """Checks that a backend's float32 errs at most a factor more than the float32 reference, over several draws.

    An image's log-determinant is one number, and its error a draw of one: ``draws`` times the batch should be 24 or
    more for the ratio of two such errors to exceed 2 by luck less than once in a thousand times.
    """
    own: dict[str, list[tuple[float, float]]] = defaultdict(list)
    peer: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(draws):
        case = make_draw(seed)
        truth = evaluate(case, "torch", F64)
        for name, errors in ((backend, own), ("torch", peer)):
            for key, found in evaluate(case, name, F32).items():
                errors[key].append(distance(found, truth[key]))
    assert_float32(own, peer)
