"""The native library trusts no argument: what does not fit is refused by name, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.kernels import level_schedule
from tests.core.helpers import blocks_of, build, normal
from tests.kernels.cases import OPS, evaluate, leaves, make, needs
from tests.tolerances import F32, F64, assert_close

pytestmark = needs("native")

NONE = torch.empty(0, dtype=torch.int64)


def arguments(op: str) -> dict[str, Any]:
    """Returns good arguments of an op of the library, by the names of its schema."""
    made = blocks_of(build(13, blocks=1, order="natural", degrees="random", hidden_features=(9, 31), dtype=F32))[0].made
    hidden, output = made.hidden[0], made.output
    x, h = normal(4, 13, dtype=F32), normal(4, 31, dtype=F32).relu()
    out = op.startswith("affine")
    layer, rows = (output, 26) if out else (hidden, 9)
    everything: dict[str, Any] = {
        "x": x, "z": x, "h": h, "weight": layer.weight.detach(), "bias": layer.bias.detach(), "prefix": layer.prefix,
        "tiles": layer.layout.table, "activation": "relu", "bound": 5.0, "soft": False, "y": normal(4, rows, dtype=F32),
        "grad_y": normal(4, rows, dtype=F32), "grad_z": x, "grad_ladj": normal(4, dtype=F32), "grad_log_scale": x,
        "log_scale": x.tanh(), "need_grad_x": True, "need_grad_weight": True, "need_inputs": True, "scale": 1.0,
        "exp_avg": torch.zeros(layer.weight.shape), "exp_avg_sq": torch.zeros(layer.weight.shape),
        "adam": [1e-3, 0.9, 0.999, 1e-8, 0.1, 0.0, 1e-3, 0.0, 0.0], "schedules": [made.schedule],
        "permutations": [NONE, NONE], "bounds": [5.0], "softs": [False],
    }  # fmt: skip
    if op == "flow_inverse":
        everything |= {
            "weights": [k.weight.detach() for k in made.layers], "biases": [k.bias.detach() for k in made.layers],
            "prefixes": [k.prefix for k in made.layers], "tiles": [k.layout.table for k in made.layers],
        }  # fmt: skip
    return {a.name: everything[a.name] for a in native(op)._schema.arguments}


def native(op: str) -> Any:
    return getattr(torch.ops.fastmaf_native, op).default


LAYER_OPS = [
    f"{op}{way}" for op in ("masked_linear", "affine_output") for way in ("", "_backward", "_adam_", "_squared_norm")
]

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.int16),
    "half": lambda t: t.half() if t.is_floating_point() else t.float(),
    "one short": lambda t: t[:-1] if t.dim() == 1 else t[:, :-1].contiguous(),
    "one long": lambda t: torch.cat((t, t[:1])),
    "another rank": lambda t: t[None],
    "empty": lambda t: t.new_empty(0),
    "not contiguous": lambda t: torch.stack((t, t), dim=-1)[..., 0],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", LAYER_OPS)
def test_wrong_tensors_are_refused(op: str, wrong: str) -> None:
    good = arguments(op)
    native(op)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in good.items()})
    for name, value in good.items():
        if not isinstance(value, Tensor):
            continue
        if (
            op.startswith("masked")
            and name == "x"
            and (wrong == "one short" or (op, wrong) == ("masked_linear", "one long"))
        ):
            continue  # fits: this layer does not see the last input, and a batch may have any size
        with pytest.raises(RuntimeError, match=op) as caught:
            native(op)(**{**good, name: WRONG[wrong](value)})
        assert "Internal" not in str(caught.value), f"{name}: {caught.value}"


@pytest.mark.parametrize("op", LAYER_OPS)
def test_layouts_of_another_layer_are_refused(op: str) -> None:
    good = arguments(op)
    other = arguments("masked_linear" if op.startswith("affine") else "affine_output")
    tiles, prefix = good["tiles"], good["prefix"]
    assert tiles.shape[0] >= 3
    broken = {
        "of another layer": {"tiles": other["tiles"], "prefix": other["prefix"]},
        "tiles of another layer": {"tiles": other["tiles"]},
        "negative": {"tiles": -tiles},
        "one missing": {"tiles": tiles[:-1]},
        "swapped": {"tiles": tiles.flip(0)},
        "one twice": {"tiles": torch.cat((tiles[:1], tiles))},
        "huge offset": {"tiles": tiles + torch.tensor([0, 0, 0, 2**30], dtype=torch.int32)},
        "wider": {"tiles": tiles + torch.tensor([0, 0, 4, 0], dtype=torch.int32)},
        "prefix beyond the tile": {"prefix": prefix + 100},
        "negative prefix": {"prefix": prefix - 100},
        "decreasing prefix": {"prefix": prefix.flip(0)},
    }
    for name, arguments_of in broken.items():
        with pytest.raises(RuntimeError, match=op):
            native(op)(**{**good, **arguments_of})
            raise AssertionError(f"{name}: accepted")


def changed(schedule: Tensor, step: int, column: int, by: int) -> Tensor:
    schedule = schedule.clone()
    schedule[step, column] += by
    return schedule


def test_broken_inverses_are_refused() -> None:
    good = arguments("flow_inverse")
    schedule, identity = good["schedules"][0], torch.arange(13)
    native("flow_inverse")(**good)
    native("flow_inverse")(**{**good, "permutations": [identity, identity.flip(0)]})
    broken: dict[str, list[Any]] = {
        "z": [good["z"].double(), good["z"].half(), good["z"][:, :-1].contiguous(), good["z"][0], good["z"].t()],
        "schedules": [[], [schedule, schedule]] + [[s] for s in (
            schedule[:0], schedule[:-1], schedule[:, :-1].contiguous(), schedule.long(), schedule.flip(0),
            changed(schedule, -1, 0, 1), changed(schedule, 0, 0, -100), changed(schedule, 0, 1, 1000),
            changed(schedule, 0, 2, 1), changed(schedule, 1, 0, 1000), changed(schedule, -1, 2, 1),
            level_schedule(torch.arange(1, 14), [torch.arange(1, 10), torch.arange(31) % 13 + 1]),
        )],
        "permutations": [[], [NONE], [NONE] * 3, [identity[:-1], NONE], [identity.int(), NONE], [identity + 1, NONE],
                         [NONE, identity - 1]],
        "bounds": [[], [5.0, 5.0]],
        "softs": [[], [False, False]],
    }  # fmt: skip
    for name in ("weights", "biases", "prefixes", "tiles"):
        layers = good[name]
        broken[name] = [[], layers[:-1], layers[::-1], [layers[0].to(torch.int16), *layers[1:]]]
        broken[name] += [[t[:-1] for t in layers], [t[None] for t in layers]]
    for name, values in broken.items():
        for i, value in enumerate(values):
            with pytest.raises(RuntimeError, match="flow_inverse"):
                native("flow_inverse")(**{**good, name: value})
                raise AssertionError(f"{name} {i}: accepted")


@pytest.mark.parametrize("op", [*LAYER_OPS, "flow_inverse"])
def test_inputs_are_not_written_to(op: str) -> None:
    good = arguments(op)
    writable = {a.name for a in native(op)._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    flat = {n: v for n, v in good.items() if n not in writable and isinstance(v, (Tensor, list))}
    before = {n: [torch.as_tensor(t).clone() for t in (v if isinstance(v, list) else [v])] for n, v in flat.items()}
    native(op)(**good)
    for name, value in flat.items():
        now = [torch.as_tensor(t) for t in (value if isinstance(value, list) else [value])]
        assert all(torch.equal(a, b) for a, b in zip(now, before[name], strict=True)), name


@pytest.fixture
def poison() -> Iterator[None]:
    """Makes torch fill what it does not initialise with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", [0, 1, 9, 65])
@pytest.mark.parametrize("kind", OPS)
def test_every_output_is_written(kind: str, batch: int) -> None:
    for dtype in (F32, F64):
        case = make(kind, batch, 61, hidden_features=(48, 32))
        inputs, expected = leaves(case, dtype), evaluate(case, "torch", dtype)
        sizes = {t.numel() for t in (*inputs.values(), *expected.values())}
        waste = [torch.full((n,), torch.nan, dtype=dtype) for n in sizes for _ in range(4)]
        del waste  # what the allocator hands out next is full of NaN, workspaces included
        for key, value in evaluate(case, "native", dtype, inputs).items():
            assert_close("gradients" if "gradient" in key else "values", value, expected[key], key)


@pytest.mark.parametrize("batch", [9, 33])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", OPS)
def test_what_is_not_finite_stays_in_its_sample(kind: str, value: float, batch: int) -> None:
    case = make(kind, batch, 37, hidden_features=(29, 31))
    clean, sample = evaluate(case, "native", F32), batch // 2
    inputs = leaves(case, F32)
    inputs["x"].data[sample, 0] = value
    found = evaluate(case, "native", F32, inputs)
    others = torch.arange(batch) != sample
    for key in ("result 0", "gradient of x"):
        assert torch.equal(found[key][others], clean[key][others]), key
    assert not found["result 0"][sample].isfinite().all()
    reference = evaluate(case, "torch", F32, inputs)["result 0"][sample]
    assert torch.equal(found["result 0"][sample].isfinite(), reference.isfinite())


@pytest.mark.parametrize("dtype, log_scale", [(F32, 100.0), (F64, 800.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["affine, free", "inverse, free"])
def test_overflow_is_infinite_and_underflow_zero(kind: str, sign: float, dtype: torch.dtype, log_scale: float) -> None:
    """A log-scale beyond exp's range in the last dimension, which nothing reads, and from the bias alone."""
    case = make(kind, 17, 13)
    last = max(k for k in case.tensors if k.startswith("bias"))
    case.tensors[last][-1] = sign * log_scale
    with torch.no_grad():
        found, expected = (
            evaluate(case, backend, dtype, {k: t.to(dtype) for k, t in case.tensors.items()})
            for backend in ("native", "torch")
        )
    if sign == (-1.0 if kind.startswith("affine") else 1.0):
        assert expected["result 0"][:, -1].isinf().all(), "the test wants an overflow"
    for key, value in expected.items():
        finite = value.isfinite()
        assert torch.equal(found[key].isfinite(), finite) and not found[key].isnan().any(), key
        assert torch.equal(found[key][~finite], value[~finite]), key
        torch.testing.assert_close(found[key][finite], value[finite])
