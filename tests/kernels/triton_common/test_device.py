"""What the Triton kernels are made of, each for itself; which tensors they take, and in which precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels import dispatch
from fastmaf.kernels.affine_output import torch as reference
from fastmaf.kernels.affine_output.affine_map import SCALE_FIRST, SHIFT_FIRST, SIGMOID, TANH, AffineMap
from fastmaf.kernels.affine_output.args import AffineArgs, AffineBatch
from fastmaf.kernels.triton_common import launch_table
from tests.core.helpers import build, generator, normal
from tests.kernels.cases import MAPS, TRITON_MARKS, evaluate, make, poisoned, same
from tests.tolerances import F32, F64, assert_close

pytestmark = TRITON_MARKS
EPS = torch.finfo(F32).eps
# In units of rounding: of one exponential or tangent, whatever its size. 1.1 was seen; a GPU's exp2 may lose 2 each.
ELEMENTWISE = {"cpu": 2.0, "cuda": 6.0}


@pytest.fixture(autouse=True)
def poison(device: str) -> Iterator[None]:
    with poisoned(device):
        yield


def at_log_scale(
    kind: str, u: Tensor, device: str, backend: str = "triton", dtype: torch.dtype = F32
) -> dict[str, Tensor]:
    """Evaluates an affine output of x = 1, shift 0 and the raw log-scales ``u``; float32 numbers."""
    case = make(kind, 2, u.numel(), hidden_features=(2,), widths="own", device=device)
    bias = torch.stack((torch.zeros_like(u), u), dim=1).flatten()
    zero = torch.zeros_like(case.tensors["weight 0"])
    tensors = case.tensors | {"weight 0": zero, "bias 0": bias.to(device), "x": torch.ones_like(case.tensors["x"])}
    inputs = {key: t.to(dtype, copy=True).requires_grad_() for key, t in tensors.items()}
    return evaluate(case, backend, dtype, inputs)


def relative(found: Tensor, expected: Tensor) -> float:
    """Returns the largest relative error of one number, in units of float32 rounding."""
    expected = expected.to(found.device)
    return float(((found.double() - expected) / expected).abs().max()) / EPS


def test_exponential_of_each_size(device: str) -> None:
    u = torch.cat((torch.linspace(-86, 86, 191), torch.logspace(-30, 1, 40), torch.zeros(1))).to(F32).to(F64)
    found = at_log_scale("affine, free", u, device)
    assert relative(found["result 0"][1], torch.exp(-u)) <= ELEMENTWISE[device]
    assert torch.equal(found["result 2"][1].double().cpu(), u)


def test_exponential_at_the_ends_of_float32(device: str) -> None:
    """As torch.exp: finite up to 88.72, then infinite, zero on the other side; NaN only for NaN."""
    u = torch.tensor([88.3, 88.5, 88.7, 89.0, 1e3, 1e6, 1e9, 1e10, 1e20, 3e38, math.inf], dtype=F32)
    for sign in (-1.0, 1.0):
        found = at_log_scale("affine, free", (sign * u).double(), device)["result 0"][0].cpu()
        expected = torch.exp(-sign * u)
        # What is so small that it has lost digits may be flushed to zero.
        assert torch.allclose(found, expected, rtol=ELEMENTWISE[device] * EPS, atol=1.2e-38), (found, expected)


def test_tangent_of_each_size(device: str) -> None:
    size = torch.cat((torch.logspace(-30, 2, 97), torch.linspace(0.25, 0.35, 30)))  # it changes its way at 0.3
    u = torch.cat((size, -size[::2])).to(F32).to(F64)
    found, expected = at_log_scale("affine, soft", u, device), at_log_scale("affine, soft", u, device, "torch", F64)
    assert relative(found["result 2"][0], 0.5 * torch.tanh(u / 0.5)) <= ELEMENTWISE[device]
    assert (found["result 2"].abs() <= 0.5).all()
    same(found, expected)


@pytest.mark.parametrize("kind", ["affine, softplus", "affine, sigmoid", "affine, soft clip", "affine, scale first"])
def test_scale_maps_of_each_size(device: str, kind: str) -> None:
    """Log-scales are logarithms of sums: within some roundings of 1, or of themselves where they are larger."""
    size = torch.cat((torch.logspace(-30, 1.9, 97), torch.linspace(0.05, 20, 60)))
    u = torch.cat((size, -size[::2], torch.zeros(1))).to(F32).to(F64)
    found, expected = at_log_scale(kind, u, device), at_log_scale(kind, u, device, "torch", F64)
    a, truth = found["result 2"][0], expected["result 2"][0]
    assert float(((a.double() - truth) / truth.abs().clamp_min(1)).abs().max()) / EPS <= ELEMENTWISE[device]
    same(found, expected)


@pytest.mark.parametrize("kind", ["affine, softplus", "affine, sigmoid"])
def test_scale_maps_at_the_ends_of_float32(device: str, kind: str) -> None:
    u = torch.tensor([100.0, 1e4, 3e38, math.inf, -100.0, -1e4, -3e38, -math.inf], dtype=F64)
    found, expected = (
        at_log_scale(kind, u, device)["result 2"][0],
        at_log_scale(kind, u, device, "torch", F64)["result 2"][0],
    )
    assert torch.allclose(found.double(), expected, rtol=ELEMENTWISE[device] * EPS, atol=ELEMENTWISE[device] * EPS)


def test_the_soft_bound_of_what_is_not_finite(device: str) -> None:
    found = at_log_scale("affine, soft", torch.tensor([math.inf, -math.inf, 0.0], dtype=F64), device)
    assert found["result 2"][0].tolist() == [0.5, -0.5, 0.0]
    assert found["gradient of bias 0"][1::2].isfinite().all() and not found["gradient of bias 0"][[1, 3]].any()


@pytest.mark.parametrize("kind", ["affine, clamp", "affine, free"])
def test_the_clamp_at_its_limits(device: str, kind: str) -> None:
    """At the limit itself, which float32 rounds up, and one number beside it on both sides."""
    bound = torch.tensor(0.2, dtype=F32)
    inside, outside = torch.nextafter(bound, torch.zeros(())), torch.nextafter(bound, torch.ones(()))
    u = torch.stack((bound, inside, outside, torch.tensor(9.0), torch.tensor(0.0)))
    u = torch.cat((u, -u))
    found = at_log_scale(kind, u.double(), device)
    clamped = u.abs() >= bound if kind == "affine, clamp" else torch.zeros(10, dtype=torch.bool)
    expected = u.clamp(-bound, bound) if kind == "affine, clamp" else u
    assert torch.equal(found["result 2"][0].cpu(), expected)
    gradient = found["gradient of bias 0"].cpu()[1::2]
    assert torch.equal(gradient == 0, clamped)
    truth = at_log_scale(kind, u.double(), device, "torch", F32)["gradient of bias 0"][1::2]
    assert_close("gradients", gradient, truth.cpu())


def test_log_determinants_are_summed_in_more_than_float32(device: str) -> None:
    """Many terms of one size: in float32 their sum would stand still, or be off by many units."""
    from fastmaf.kernels.affine_output import triton as triton_kernel

    for count in (1, 3, 1500):
        shares = 1e6 + normal(count, 5, seed=count).to(device)
        shares[0] -= 1e6 * count
        found = triton_kernel.ladj_of(shares)
        assert found.dtype == F32 and found.shape == (5,)
        assert_close("values", found, shares.sum(0))


@pytest.mark.parametrize("slots, features", [(1, 300), (3, 37), (70, 37)])
@pytest.mark.parametrize("bias, relu, act, add", [(0, 0, 0, 0), (1, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_partial_sums(device: str, slots: int, features: int, bias: bool, relu: bool, act: bool, add: bool) -> None:
    """Panels of different counts; what is no partial sum of a column holds NaN."""
    from fastmaf.kernels.masked_linear import triton as triton_kernel

    n = 3
    of_panels = torch.randint(0, slots + 1, (-(-features // 16),), generator=generator(slots))
    of_panels[0] = slots
    counts = of_panels.repeat_interleave(16)[:features].contiguous()
    partial = normal(slots, n, features, dtype=F32)
    is_sum = (torch.arange(slots)[:, None] < counts)[:, None, :].expand_as(partial)
    expected = torch.where(is_sum, partial, 0).double().sum(0)
    terms = {"bias": normal(features, seed=1, dtype=F32), "act": normal(n, features, seed=2, dtype=F32).relu()}
    terms["add"] = normal(n, features, seed=3, dtype=F32)
    expected = expected + terms["bias"] if bias else expected
    expected = expected.relu() if relu else expected
    expected = torch.where(terms["act"] > 0, expected, 0) if act else expected
    expected = expected + terms["add"] if add else expected
    given = {key: terms[key].to(device) for key, use in (("bias", bias), ("act", act), ("add", add)) if use}
    partial = torch.where(is_sum, partial, torch.nan).to(device)
    out = torch.empty(n, features, device=device)
    found = triton_kernel.sum_slots(out, partial, counts.int().to(device), relu=bool(relu), **given)
    assert found is out
    assert_close("values", found, expected.to(device))


@pytest.mark.parametrize("features", [1, 511, 513])
def test_gradients_through_the_transform(device: str, features: int) -> None:
    """More dimensions than one program takes."""
    from fastmaf.kernels.affine_output import triton as triton_kernel

    grad_z, grad_a, z = (normal(2, features, seed=i).to(F32) for i in range(3))
    grad_ladj, a = normal(2, seed=3).to(F32), normal(2, features, seed=4).to(F32).clamp(-0.5, 0.5)
    h, x = torch.empty(0), normal(2, features, seed=5).to(F32)
    for affine_map in (*MAPS.values(), AffineMap(SHIFT_FIRST, TANH), AffineMap(SCALE_FIRST, TANH, 0.75)):
        args = AffineArgs(h, h, h, h, affine_map)
        given = [t.to(device) for t in (z, a - 1 if affine_map.scale == SIGMOID else a, x)]
        for last in (grad_a, None):
            t = [None if i is None else i.to(device) for i in (grad_z, grad_ladj, last)]
            found = triton_kernel.grad_product(AffineBatch(*t, h, *given), args)
            wide = [torch.zeros_like(z).double() if i is None else i.double() for i in (grad_z, grad_ladj, last)]
            truths = reference.grad_product(AffineBatch(*wide, h, *(i.double().cpu() for i in given)), args)
            for own, truth in zip(found, truths, strict=True):
                assert_close("gradients", own, truth.to(device))


@pytest.mark.parametrize("name", ["tf32", "tf32x3", "bf16"])
def test_a_card_without_a_precision_refuses_it(device: str, name: launch_table.Precision) -> None:
    flow, x = build(5, dtype=F32), normal(3, 5, dtype=F32)
    with fastmaf.use_backend("triton"), torch.no_grad():
        expected = flow.to(device).log_prob(x.to(device))
        with launch_table.use_precision(name):
            if device == "cpu":
                for run in (lambda: flow.log_prob(x), lambda: flow.sample(2)):
                    with pytest.raises(ValueError, match=rf"'{name}'.*8\.0.*6\.1"):
                        run()
            else:
                assert torch.allclose(flow.log_prob(x.to(device)), expected, rtol=0.1)
            with launch_table.use_precision("ieee"):
                assert torch.equal(flow.log_prob(x.to(device)), expected)
            assert launch_table.precision(80) == name
        assert launch_table.precision(80) == "ieee"
        assert torch.equal(flow.log_prob(x.to(device)), expected)
        with pytest.raises(KeyError), launch_table.use_precision(name):
            raise KeyError
        assert launch_table.precision(80) == "ieee"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_tensors_that_are_not_taken(monkeypatch: pytest.MonkeyPatch, device: str, op: str) -> None:
    def why_not(dtype: torch.dtype, where: str = device) -> str | None:
        return dispatch.why_not(op, "triton", torch.empty(2, dtype=dtype, device=where))

    assert why_not(F32) is None
    for dtype in (F64, torch.float16):
        reason = why_not(dtype)
        assert reason is not None and str(dtype) in reason and "float32" in reason
    for value in ("0", ""):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        reason = why_not(F32, "cpu")
        assert reason is not None and "cuda" in reason.lower() and "on cpu" in reason
    monkeypatch.delenv("TRITON_INTERPRET")
    assert why_not(F32, "cpu") is not None
    with pytest.raises(fastmaf.BackendUnavailableError, match="on cpu"), fastmaf.use_backend("triton"):
        build(3, dtype=F32).log_prob(torch.zeros(1, 3))
    from fastmaf.kernels.triton_common import device as triton_parts

    assert "TRITON_INTERPRET=1" in str(triton_parts.why_not(torch.empty(2)))
    with triton_parts.recording(61, 6):
        assert why_not(F32, "cpu") is None
    assert why_not(F32, "cpu") is not None


def test_float64_is_refused(device: str) -> None:
    flow = build(3).to(device)
    with fastmaf.use_backend("triton"):
        with pytest.raises(fastmaf.BackendUnavailableError, match="float64"):
            flow.log_prob(torch.zeros(1, 3, dtype=F64, device=device))
        with pytest.raises(fastmaf.BackendUnavailableError, match="float64"):
            flow.sample(2)


def test_cpu_tensors_go_elsewhere_by_default(device: str) -> None:
    for op in dispatch.OPS:
        expected = "triton" if device == "cuda" else "native" if dispatch.missing(op, "native") is None else "torch"
        assert dispatch.default_backend(op, torch.empty(2, device=device)) == expected


@pytest.mark.parametrize("capability, sms, n", [(61, 6, 1), (90, 132, 64)])
def test_recorded_launches_are_not_made(device: str, capability: int, sms: int, n: int) -> None:
    from fastmaf.kernels.triton_common import device as triton_parts

    case = make("flow", n, 13, device=device)
    with triton_parts.recording(capability, sms) as launches:
        evaluate(case, "triton", F32)
    names = {launched.kernel.__name__ for launched in launches}
    assert {"_masked_linear_fwd_kernel", "_affine_output_fwd_kernel", "_masked_linear_bwd_kernel"} <= names
    table = launch_table.TABLES[capability]
    rows = {launched.options["BLOCK_J"] for launched in launches if "BLOCK_J" in launched.options}
    assert rows == {(table.lanes if n == 1 else table.dot).rows}
    assert all(launched.grid >= 0 and launched.args[0].dtype == F32 for launched in launches[:1])
    made = len(launches)
    evaluate(make("linear", 1, 5, device=device), "triton", F32)
    assert len(launches) == made, "launches are noted after the end of the block"


def test_fused_multiply_adds_are_asked_for() -> None:
    """Triton's default for them has changed between versions, and with it the rounding of every product."""
    from fastmaf.kernels.triton_common import device as triton_parts

    flow = build(13, blocks=2, dtype=F32)
    flow.validate_args = False  # launches that are recorded leave results as they were allocated
    with fastmaf.use_backend("triton"), triton_parts.recording(61, 6) as launches:
        flow.log_prob(normal(2, 13, dtype=F32)).sum().backward()
        flow.sample(2)
    kernels = {launched.kernel.__name__ for launched in launches}
    assert len(kernels) >= 5 and {"_panel_ahead_kernel", "_panel_solve_kernel"} <= kernels
    assert all(launched.options["enable_fp_fusion"] is True for launched in launches)


def test_an_inverse_sends_its_tables_once() -> None:
    """Sending waits for the device, and cannot be part of a CUDA graph; another weight has an address of its own."""
    from fastmaf.kernels.triton_common import device as triton_parts

    flow, z = build(13, blocks=3, order="random", dtype=F32), normal(2, 13, dtype=F32)

    def tables() -> tuple[list[Tensor], list[int]]:
        """Returns the tables of addresses, and where the others lie."""
        with torch.no_grad(), fastmaf.use_backend("triton"), triton_parts.recording(61, 6) as launches:
            flow.inverse(z)
        arguments = [dict(zip(one.kernel.arg_names, one.args, strict=False)) for one in launches]
        others = ("items_ptr", "group_ptr", "chunks_ptr")
        return (
            [one["layers_ptr"] for one in arguments],
            [one[name].data_ptr() for one in arguments for name in others if name in one],
        )

    first, others = tables()
    assert len(first) >= 6
    assert all(a is b for a, b in zip(first, tables()[0], strict=True)) and tables()[1] == others
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2)
    assert all(a is b for a, b in zip(first, tables()[0], strict=True)), "weights that stayed where they were"
    before = [one.clone() for one in first]
    bias = flow.transforms[1].made.output.bias  # type: ignore[union-attr]
    bias.data = bias.data.clone()
    now, still = tables()
    assert sum(not torch.equal(a, b) for a, b in zip(now, before, strict=True)) >= 2, "the launches of one block"
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True)), "a recorded graph reads them"
    assert still == others


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_samples_can_be_captured() -> None:
    """In a CUDA graph of the user's, which follows weights and buffers that are written in place."""
    flow = build(13, blocks=3, order="random", dtype=F32, whitening=4).to("cuda")
    whitening = flow.transforms[0]
    z = normal(5, 13, dtype=F32).cuda()
    with torch.no_grad():
        flow.inverse(z)
        flow.log_prob(z)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x, ladj = flow.inverse(z)
            log_prob = flow.log_prob(z)
        for seed in range(3):
            whitening.fit_(normal(40, 13, seed=seed, dtype=F32).cuda())  # type: ignore[union-attr, operator]
            flow.transforms[1].permutation.copy_(torch.randperm(13))  # type: ignore[union-attr, operator]
            graph.replay()
            for found, expected in zip((x, ladj, log_prob), (*flow.inverse(z), flow.log_prob(z)), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["relu", "flow"])
def test_operands_in_two_parts_are_complete(monkeypatch: pytest.MonkeyPatch, device: str, kind: str) -> None:
    """The interpreter multiplies parts in float32: what they leave out of an operand would show."""
    if device == "cpu":
        monkeypatch.setitem(launch_table._NEEDS, "tf32x3", 61)
    elif torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no TF32")
    case = make(kind, 17, 13, hidden_features=(9,), levels=3, device=device)
    with launch_table.use_precision("tf32x3"):
        found = evaluate(case, "triton", F32)
    same(found, evaluate(case, "torch", F64))
    with launch_table.use_precision("ieee"):
        exact = evaluate(case, "triton", F32)
    assert any(not torch.equal(found[key], exact[key]) for key in found), "operands were not divided"
