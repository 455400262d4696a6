"""The native library trusts no argument: what does not fit is refused by name, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmaf.kernels import AffineMap, affine_output, flow_forward, flow_inverse, level_schedule, masked_linear
from fastmaf.kernels.adam.update import Update
from tests.kernels.cases import OPS, evaluate, leaves, make, needs
from tests.kernels.native_calls import CALLS, LAYER, NUMBERS, Call, make_call
from tests.tolerances import F32, F64, assert_close

pytestmark = needs("native")

OPS_OF: dict[str, Callable[..., Any]] = {
    "linear forward": masked_linear,
    "affine forward": affine_output,
    "flow forward": flow_forward,
    "flow inverse": flow_inverse,
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.double() if t.is_floating_point() else t.to(torch.int16),
    "half": lambda t: t.half() if t.is_floating_point() else t.float(),
    "one short": lambda t: t[:-1] if t.dim() == 1 else t[:, :-1].contiguous(),
    "one long": lambda t: torch.cat((t, t[:1])),
    "another rank": lambda t: t[None],
    "empty": lambda t: t.new_empty(0),
    "not contiguous": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "meta": lambda t: t.to("meta"),
}


def fits(call: str, name: str, wrong: str) -> bool:
    """Whether a tensor is good all the same."""
    if wrong == "not contiguous":
        return name.startswith("grad_")  # autograd hands on gradients of any strides
    if name.startswith("weight") and wrong in ("dtype", "half"):
        return call.endswith(("backward", "norm"))  # converted
    if name.startswith("schedule") and wrong == "one long":
        return call != "flow inverse"  # nothing else reads its steps
    if name == "x":  # a batch of any size; the last input is one that no unit of the layer sees
        return wrong == "one long" and call.endswith("forward") and not call.startswith("affine") or (
            wrong == "one short" and call.startswith("linear")
        )  # fmt: skip
    return (name == "z" and wrong == "one long" and call == "flow inverse") or (
        # One fewer before a block: there is less saved of it.
        wrong == "empty"
        and name.startswith("permutation")
        and (name[-1] != "1" or not call.endswith(("backward", "adam")))
    )


def refused(call: Call, **changed: Tensor) -> str:
    """Returns the message; fails where the call is not refused, or writes to a tensor."""
    tensors = {**call.tensors, **{key.replace("_of_", " "): t for key, t in changed.items()}}
    before = {key: t.clone() for key, t in tensors.items()}
    with pytest.raises(ValueError) as caught:
        call.function(tensors)
        raise AssertionError(f"{list(changed)}: accepted")
    assert all(t.is_meta or torch.equal(t, before[key]) for key, t in tensors.items()), "written to"
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_tensors_are_refused(name: str, wrong: str) -> None:
    call = make_call(name)
    before = {key: t.clone() for key, t in call.tensors.items()}
    call.function(call.tensors)
    changed = {key for key, t in call.tensors.items() if not torch.equal(t, before[key])}
    assert changed == set(call.written)
    for key, value in call.tensors.items():
        kind = key.partition(" ")[0]
        if fits(name, key, wrong):
            call.function({**call.tensors, key: WRONG[wrong](value)})
            continue
        message = refused(call, **{key.replace(" ", "_of_"): WRONG[wrong](value)})
        # An activation of another dtype or size is at odds with the others, and those with one another.
        others = {"rows", *(k.partition(" ")[0] for k in call.tensors)} - {"x", "z", "h"}
        own = message.startswith((f"{kind} must", "x must have shape"))
        assert own or wrong != "meta" and any(word in message for word in others), f"{key}: {message}"


@pytest.mark.parametrize("name", CALLS)
def test_layouts_of_another_layer_are_refused(name: str) -> None:
    call = make_call(name)
    i = " 2" if name.startswith("flow") else ""
    prefix, panels = call.tensors[f"prefix{i}"], call.tensors[f"panels{i}"]
    step = torch.ones_like(panels).cumsum(0) - 1
    broken = {
        "negative panels": (prefix, -panels),
        "wider than the layer": (prefix, panels + 40 * step),
        "narrower than a row": (prefix, panels - step),
        "another start": (prefix, panels + 1),
        "a negative prefix": (prefix - 100, panels),
        "a prefix beyond the panel": (prefix + 1, panels),
        "a decreasing prefix": (prefix.flip(0), panels),
        "one row less": (prefix[1:], panels),
    }
    for what, (other_prefix, other_panels) in broken.items():
        tensors = {f"prefix{i.replace(' ', '_of_')}": other_prefix, f"panels{i.replace(' ', '_of_')}": other_panels}
        message = refused(call, **tensors)
        assert any(word in message for word in LAYER), f"{what}: {message}"
        # The same by writing to tensors that have been seen to be good.
        mine = make_call(name)
        mine.function(mine.tensors)
        if other_prefix.shape == prefix.shape:
            mine.tensors[f"prefix{i}"].copy_(other_prefix)
            mine.tensors[f"panels{i}"].copy_(other_panels)
            refused(mine)


@pytest.mark.parametrize("name", OPS_OF)
def test_ops_refuse_weights_of_another_layout_before_they_clear_the_padding(name: str) -> None:
    """Their first look at a weight writes to its padding."""
    call = make_call(name, OPS_OF[name])
    i, t = " 0" if name.startswith("flow") else "", call.tensors
    numel = t[f"weight{i}"].numel()
    whole = torch.ones(2, numel)
    broken = {
        "short": {"weight": whole[0, : numel // 2]},
        "one byte": {"weight": whole[0].to(torch.float8_e4m3fn)},
        "panels elsewhere": {"panels": 1000 * t[f"panels{i}"]},
        "decreasing panels": {"panels": -t[f"panels{i}"]},
        "negative prefix": {"prefix": t[f"prefix{i}"] - 1000},
        "int32 prefix": {"prefix": t[f"prefix{i}"].int()},
        "strided prefix": {"prefix": torch.stack((t[f"prefix{i}"],) * 2, 1)[:, 0]},
    }
    for what, wrong in broken.items():
        tensors = {**t, **{f"{key}{i}": value for key, value in wrong.items()}}
        with pytest.raises(ValueError, match="weight|prefix|panels"):
            call.function(tensors)
            raise AssertionError(f"{what}: accepted")
        assert bool((whole == 1).all()), f"{what}: written to"
    call.function(t)


def changed(schedule: Tensor, step: int, column: int, by: int) -> Tensor:
    schedule = schedule.clone()
    schedule[step, column] += by
    return schedule


def test_broken_schedules_are_refused() -> None:
    call = make_call("flow inverse")
    schedule = call.tensors["schedule 1"]
    for i, broken in enumerate([
        schedule[:0], schedule[:-1], schedule[:, :-1].contiguous(), schedule.long(), schedule.flip(0), schedule[0],
        changed(schedule, -1, 0, 1), changed(schedule, 0, 0, -100), changed(schedule, 0, 1, 1000),
        changed(schedule, 1, 0, 1000), changed(schedule, -1, 2, 1),
        level_schedule(torch.arange(1, 14), [torch.arange(1, 10), torch.arange(31) % 13 + 1]),
    ]):  # fmt: skip
        message = refused(call, schedule_of_1=broken)
        assert "schedule" in message or "weights" in message, f"{i}: {message}"
    call.function(call.tensors)
    call.tensors["schedule 1"][-1, 0] += 1
    assert "schedule of block 1" in refused(call)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("flow")])
def test_broken_permutations_are_refused_on_every_call(name: str) -> None:
    """Also those that were good once, and are written to in ways that torch does not count."""
    for i in range(3):
        for value in (-1, 13, 2**62, -(2**62)):
            call = make_call(name)
            key = f"permutation {i}"
            call.tensors[key] = torch.arange(13)
            call.function(call.tensors)
            good = call.tensors[key].clone()
            for write in ("numpy", "data"):
                target = call.tensors[key]
                if write == "numpy":
                    target.numpy()[3] = value
                else:
                    target.data[3] = value
                before = {k: t.clone() for k, t in call.tensors.items()}
                with pytest.raises(RuntimeError, match="permutation"):
                    call.function(call.tensors)
                assert all(torch.equal(t, before[k]) for k, t in call.tensors.items())
                target.data[3] = target[4]  # twice
                with pytest.raises(RuntimeError, match="permutation"):
                    call.function(call.tensors)
                target.data.copy_(good)
            call.function(call.tensors)


def test_lists_of_other_lengths_are_refused() -> None:
    from fastmaf.kernels.flow import native as flow
    from tests.core.helpers import build
    from tests.kernels.native_calls import args_of

    args, x = args_of(build(13, dtype=F32)), torch.zeros(2, 13)
    for name in args._fields:
        value: Any = getattr(args, name)
        if name != "activation":
            for broken in (value[:-1], [*value, value[-1]], []):
                with pytest.raises(ValueError, match="needs"):
                    flow.forward(x, args._replace(**{name: broken}), False)
    for numbers in ([2, 0, 1, 0], [0, 5, 1, 0], [0, 0, -1, 0], [0, 0, float("nan"), 0], [0, 2, 1, -1]):
        with pytest.raises(ValueError, match="found"):
            flow.forward(x, args._replace(maps=[*args.maps[:4], *map(float, numbers)]), False)
        with pytest.raises(ValueError, match="found"):
            AffineMap(*numbers).check()


def test_weights_that_steps_cannot_take_in_place_are_refused() -> None:
    """Weights of bfloat16, which forward passes take, and one weight of two layers."""
    for name in ("linear adam", "affine adam", "flow adam"):
        call = make_call(name)
        half = {key: t.bfloat16() for key, t in call.tensors.items() if key in call.written}
        assert "weight" in refused(call, **{key.replace(" ", "_of_"): t for key, t in half.items()})
    call = make_call("flow adam")
    rest = {f"{key}_of_3": call.tensors[f"{key} 0"] for key in ("weight", "prefix", "panels", "bias")}
    moments = {f"{key}_of_3": torch.zeros_like(call.tensors["weight 0"]) for key in ("exp_avg", "exp_avg_sq")}
    assert "share" in refused(call, **rest, **moments)


@pytest.mark.parametrize("kind", ["linear", "affine"])
def test_a_scale_is_for_steps_without_gradients_of_inputs(kind: str) -> None:
    import importlib

    from fastmaf.kernels import AffineArgs, LinearArgs
    from fastmaf.kernels.affine_output.args import AffineBatch
    from fastmaf.kernels.masked_linear.args import LinearBatch

    call = make_call(f"{kind} adam")
    t, before = call.tensors, {key: t.clone() for key, t in call.tensors.items()}
    args: Any = (
        LinearArgs(*[t[key] for key in LAYER])
        if kind == "linear"
        else AffineArgs(*[t[key] for key in LAYER], AffineMap())
    )
    batch_type: Any = LinearBatch if kind == "linear" else AffineBatch
    module = importlib.import_module(
        f"fastmaf.kernels.{'masked_linear' if kind == 'linear' else 'affine_output'}.native"
    )
    update = Update(t["exp_avg"], t["exp_avg_sq"], NUMBERS, scale=0.5)
    with pytest.raises(ValueError, match="scale"):
        module.adam_(batch_type(**{key: t[key] for key in batch_type._fields}), args, True, update)
    assert all(torch.equal(value, before[key]) for key, value in t.items())


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
