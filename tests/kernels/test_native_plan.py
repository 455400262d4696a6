"""The pointers that the native backend keeps from call to call: they follow every change of a flow's tensors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf import kernels
from fastmaf.kernels import FlowArgs, native_library
from fastmaf.kernels.flow import native_plan
from tests.core.helpers import blocks_of, build, normal
from tests.kernels.cases import needs
from tests.kernels.native_calls import args_of
from tests.tolerances import F32, F64, assert_close

pytestmark = needs("native")

D = 13


def flow_of(seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> fastmaf.MAF:
    options = {"order": "random", "degrees": "random", "hidden_features": (20, 31), **options}
    return build(D, seed=seed, dtype=dtype, **options)


def agree(flow: Any, dtype: torch.dtype = F64) -> None:
    """Fails unless both backends have the same values, both ways, and gradients."""
    found = []
    for backend in ("native", "torch"):
        with kernels.use_backend(backend):
            x = normal(5, D, dtype=dtype).requires_grad_(not torch.is_inference_mode_enabled())
            z, ladj = flow(x)
            with torch.no_grad():
                back = flow.inverse(z)[0]
            grads = (
                torch.autograd.grad((z.sin().sum() + ladj.sum()), [x, *flow.parameters()]) if x.requires_grad else ()
            )
            found.append([z.detach(), ladj.detach(), back, *grads])
    for value, expected in zip(*found, strict=True):
        assert_close("gradients", value, expected)


def replace(flow: Any, change: Callable[[Tensor], Tensor]) -> None:
    for parameter in flow.parameters():
        parameter.data = change(parameter.data)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written to": lambda flow: replace(flow, lambda t: t.mul_(1.1)),
    "other memory": lambda flow: replace(flow, lambda t: 1.1 * t),
    "parts of one tensor": lambda flow: replace(flow, lambda t: torch.cat((t, t))[: len(t)]),
    "loaded": lambda flow: flow.load_state_dict(
        {key: t * 1.1 if t.is_floating_point() else t for key, t in flow.state_dict().items()}
    ),
    "assigned": lambda flow: flow.load_state_dict({k: t.clone() for k, t in flow.state_dict().items()}, assign=True),
    "new parameters": lambda flow: [
        setattr(layer, "weight", torch.nn.Parameter(2 * layer.weight.detach()))
        for block in blocks_of(flow) for layer in block.made.layers
    ],
    "swapped blocks": lambda flow: [
        setattr(blocks_of(flow)[0], "made", blocks_of(flow)[1].made),
    ],
    "frozen": lambda flow: flow.requires_grad_(False).requires_grad_(True),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_flows(change: str) -> None:
    flow = flow_of()
    agree(flow)
    CHANGES[change](flow)
    agree(flow)


def test_other_dtypes_and_copies_in_turn() -> None:
    flow = flow_of()
    agree(flow)
    single, twin, shared = copy.deepcopy(flow).float(), copy.deepcopy(flow), copy.copy(flow)
    replace(twin, lambda t: 1.2 * t)
    other = flow_of(3)
    for _ in range(2):
        for each in (twin, other, shared, flow):
            agree(each)
        agree(single, F32)
    flow.float()
    agree(flow, F32)
    args, x = args_of(flow), normal(5, D, dtype=F32)
    halves = args._replace(weights=[weight.bfloat16() for weight in args.weights])
    rounded = args._replace(weights=[weight.float() for weight in halves.weights])
    with kernels.use_backend("native"):
        assert not torch.equal(kernels.flow_forward(x, args)[0], kernels.flow_forward(x, rounded)[0])
        assert torch.equal(kernels.flow_forward(x, halves)[0], kernels.flow_forward(x, rounded)[0])


def same_address(t: Tensor, smaller: Tensor) -> None:
    """Gives a tensor the memory that it has, as another one that is shorter or of another dtype."""
    before = t.data_ptr(), t._version
    t.data = smaller
    assert before == (t.data_ptr(), t._version), "the test wants a change that neither shows"


@pytest.mark.parametrize("change", ["shorter", "narrower", "strided"])
@pytest.mark.parametrize("name", ["weights", "biases", "prefixes", "panels", "schedules", "permutations"])
def test_other_tensors_at_the_same_address_are_refused(name: str, change: str) -> None:
    from fastmaf.kernels.flow import native

    args, x = args_of(flow_of(dtype=F32)), normal(5, D, dtype=F32)
    args = FlowArgs(*[[t.clone() for t in part] for part in args[:6]], *args[6:])  # type: ignore[arg-type]
    native.forward(x, args, True)
    native.inverse(x, args)
    t = getattr(args, name)[1]
    if change == "shorter":
        same_address(t, t.data[:-1])
    elif change == "strided":
        same_address(t, t.data[::2])
    else:
        same_address(t, t.data.view(torch.int16 if t.is_floating_point() else torch.uint8)[: len(t)])
    for call in (lambda: native.forward(x, args, True), lambda: native.inverse(x, args)):
        if (name, change) != ("schedules", "shorter") and (name, change) != ("schedules", "strided"):
            with pytest.raises(ValueError):
                call()
    if name == "schedules":
        with pytest.raises(ValueError):
            native.inverse(x, args)


def test_other_layouts_by_data_are_refused() -> None:
    """Neither the object nor its count of writes tells that a tensor has other memory with other numbers."""
    from fastmaf.kernels.masked_linear import native

    layer = blocks_of(flow_of(dtype=F32))[0].made.hidden[0]
    x, prefix, panels = normal(3, D, dtype=F32), layer.prefix.clone(), layer.layout.panels.clone()
    args = kernels.LinearArgs(layer.weight.detach(), layer.bias.detach(), prefix, panels)
    native.forward(x, args)
    for t, broken in ((prefix, prefix + 5), (panels, panels + 1), (prefix, prefix - 20)):
        good = t.data
        t.data = broken
        with pytest.raises(ValueError, match="prefix and panels"):
            native.forward(x, args)
        t.data = good
        native.forward(x, args)
    prefix.add_(5)
    with pytest.raises(ValueError, match="prefix and panels"):
        native.forward(x, args)


def test_plans_of_other_threads_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flows that share a layout share the place of the plan; another thread may fill it at any time."""
    args, fits = args_of(flow_of(dtype=F32)), native_plan.FlowPlan.fits
    other = args._replace(weights=[2 * weight for weight in args.weights])
    x = normal(5, D, dtype=F32)
    with kernels.use_backend("native"):
        expected = kernels.flow_forward(x, args)[0]
        assert not torch.equal(kernels.flow_forward(x, other)[0], expected)
        kernels.flow_forward(x, args)

        def interrupted(self: Any, own: FlowArgs, dtype: torch.dtype) -> bool:
            found = fits(self, own, dtype)
            monkeypatch.setattr(native_plan.FlowPlan, "fits", fits)
            native_plan.flow_plan(other, dtype)
            return found

        monkeypatch.setattr(native_plan.FlowPlan, "fits", interrupted)
        assert torch.equal(kernels.flow_forward(x, args)[0], expected)


def test_several_flows_of_one_layout_from_several_threads() -> None:
    args, x = args_of(flow_of(dtype=F32)), normal(5, D, dtype=F32)
    with kernels.use_backend("native"):
        all_args = [args._replace(weights=[k * w for w in args.weights]) for k in range(1, 5)]
        expected = [kernels.flow_forward(x, one)[0] for one in all_args]

        def work(i: int) -> bool:
            return all(
                torch.equal(kernels.flow_forward(x, all_args[(i + j) % 4])[0], expected[(i + j) % 4]) for j in range(50)
            )

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(8)))


def test_flows_that_are_built_in_inference_mode() -> None:
    """Their tensors count no writes."""
    with torch.inference_mode():
        flow = flow_of()
        agree(flow)
        args = args_of(flow)
        with kernels.use_backend("native"):
            kernels.flow_forward(normal(5, D), args)
            args.prefixes[1].add_(100)
            with pytest.raises(ValueError, match="prefix and panels"):
                kernels.flow_forward(normal(5, D), args)


def test_a_plan_keeps_no_weights() -> None:
    flow = flow_of()
    agree(flow)
    weight = weakref.ref(blocks_of(flow)[0].made.hidden[0].weight)
    replace(flow, lambda t: t.clone())
    kept = [weakref.ref(block.made.output.weight) for block in blocks_of(flow)]
    del flow
    gc.collect()
    assert weight() is None and all(ref() is None for ref in kept)


def test_errors_are_made_anew() -> None:
    """One that is raised again would keep the tensors of all calls that it came from."""
    seen = []
    for _ in range(2):
        with pytest.raises(MemoryError) as caught:
            native_library.check(1)
        seen.append(caught.value)
    assert seen[0] is not seen[1]
    with pytest.raises(RuntimeError, match="error 77"):
        native_library.check(77)
