"""Batch normalisation and ActNorm, alone and after the blocks of flows."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.training import graph_keys
from tests.core.helpers import correlated, jacobian, normal, train
from tests.io.damage import changed
from tests.io.model_files import Parts
from tests.tolerances import F32, F64, assert_close, error

D = 5


def data(n: int = 64, features: int = D, dtype: torch.dtype = F64) -> Tensor:
    return (normal(n, features) * torch.arange(1, features + 1) - 3).to(dtype)


def batch_norm(features: int = D, **options: Any) -> fastmaf.BatchNorm:
    norm = fastmaf.BatchNorm(features, dtype=F64, **options)
    with torch.no_grad():
        norm.log_scale.copy_(0.3 * normal(features, seed=5))
        norm.shift.copy_(normal(features, seed=6))
    return norm


@pytest.mark.parametrize("features", [1, 2, 7])
@pytest.mark.parametrize("batch", [2, 3, 33])
def test_batch_norm_is_that_of_torch(batch: int, features: int) -> None:
    norm, theirs = batch_norm(features, momentum=0.2), nn.BatchNorm1d(features, momentum=0.2, dtype=F64)
    with torch.no_grad():
        theirs.weight.copy_(norm.log_scale.exp())
        theirs.bias.copy_(norm.shift)
    for seed in range(3):
        x = (normal(batch, features, seed=seed) * 3 + 1).requires_grad_()
        leaves = [x, norm.shift]
        weights = normal(batch, features, seed=9)
        expected = torch.autograd.grad((theirs(x) * weights).sum(), [x, theirs.bias])
        for found, other in zip(torch.autograd.grad((norm(x)[0] * weights).sum(), leaves), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-13)  # of two rows, all but cancels
        assert_close("values", norm.running_mean, theirs.running_mean)
        assert_close("values", norm.running_var, theirs.running_var)
        assert_close("values", norm(x)[0], theirs(x))
    norm.eval(), theirs.eval()
    for count in (0, 1, batch):
        assert error(norm(x[:count])[0], theirs(x[:count])) < 1e-13
    before = norm.running_mean.clone()
    norm.inverse(norm(x)[0])
    assert torch.equal(norm.running_mean, before)


def test_log_determinants_of_batch_norm() -> None:
    norm, x = batch_norm(), data()
    z, ladj = norm(x)
    slope = norm.log_scale - 0.5 * (x.var(0, correction=0) + norm.eps).log()
    assert ladj.shape == (64,)
    assert_close("values", ladj, slope.sum().expand(64))
    z, terms = norm.forward_per_dim(x, torch.zeros_like(x))
    assert_close("values", terms, -slope.expand(64, D))
    assert_close("values", z, norm(x)[0])
    # Through the variance of the batch, too: scaling x changes ladj, and not z.
    scaled = torch.tensor(1.0, dtype=F64, requires_grad=True)
    (slope_of_ladj,) = torch.autograd.grad(norm(scaled * x)[1].mean(), scaled)
    assert slope_of_ladj.item() == pytest.approx(-D, rel=1e-4)
    norm.eval()
    expected = torch.linalg.slogdet(jacobian(lambda v: norm(v)[0], x[0])).logabsdet
    assert_close("slogdet", norm(x[:1])[1][0], expected)
    back, ladj_back = norm.inverse(norm(x)[0])
    assert_close("inverse", back, x)
    assert torch.equal(ladj_back, -norm(x)[1])


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_without_a_variance(batch: int) -> None:
    with pytest.raises(ValueError, match=f"BatchNorm needs a batch of at least 2 rows in training, .*found {batch}"):
        batch_norm()(data(batch))
    norm = fastmaf.ActNorm(D, dtype=F64)
    with pytest.raises(ValueError, match=f"ActNorm starts by .* at least 2 rows; found {batch}"):
        norm(data(batch))
    assert norm.eval()(data(batch))[0].shape == (batch, D)
    norm.train()(data())
    assert norm(data(batch))[0].shape == (batch, D)


def test_batch_norm_has_no_inverse_in_training() -> None:
    flow = fastmaf.MAF(D, 2, 8, normalization="batch", dtype=F64)
    for use in (lambda: flow.sample(3), lambda: flow.inverse(data(3)), lambda: flow.rsample_and_log_prob(3)):
        with pytest.raises(fastmaf.NotInvertibleError, match="BatchNorm has no inverse in training"):
            use()
    assert flow.eval().sample(3).shape == (3, D)


def test_a_batch_that_is_not_finite_leaves_the_statistics() -> None:
    flow = fastmaf.MAF(D, 2, 8, normalization="batch", dtype=F64, validate_args=False)
    step = fastmaf.TrainingStep(flow, fastmaf.optim.FusedAdam(flow.parameters()))
    x = data()
    x[3, 2] = math.nan
    with pytest.raises(fastmaf.NonFiniteLossError):
        step(x)
    assert all(bool(value.isfinite().all()) for value in flow.state_dict().values())
    act = fastmaf.ActNorm(D, dtype=F64)
    act(x)
    assert not act.initialized and torch.equal(act.shift, torch.zeros_like(act.shift))
    act(data())
    assert act.initialized


@pytest.mark.parametrize("features", [1, 2, 7])
def test_the_start_of_act_norm(features: int) -> None:
    norm, x = fastmaf.ActNorm(features, dtype=F64), data(64, features)
    assert torch.equal(norm.eval()(x)[0], x) and not norm.initialized
    z, ladj = norm.train()(x)
    assert z.mean(0).abs().max().item() < 1e-14
    assert_close("values", z.std(0, correction=0), torch.ones(features, dtype=F64))
    assert_close("values", ladj, -x.std(0, correction=0).log().sum().expand(64))
    assert_close("values", norm(x + 1)[0], z + norm.log_scale.exp()), "the second batch does not start it"
    assert_close("slogdet", ladj[0], torch.linalg.slogdet(jacobian(lambda v: norm(v)[0], x[0])).logabsdet)
    assert_close("inverse", norm.inverse(z)[0], x)
    fitted = fastmaf.ActNorm(features, dtype=F64).fit_(x.numpy())
    assert torch.equal(fitted(x)[0], z) and fitted.initialized
    per_dim, terms = fastmaf.ActNorm(features, dtype=F64).forward_per_dim(x, torch.zeros_like(x))
    assert torch.equal(per_dim, z)
    assert_close("values", -terms.sum(1), ladj)
    assert all(p.requires_grad for p in norm.parameters()) and len([*norm.parameters()]) == 2


def test_a_constant_dimension_is_centred() -> None:
    x = data(dtype=F32)
    x[:, 1], x[:, 3] = 0.1, 0.0
    norm = fastmaf.ActNorm(D)
    z, _ = norm(x)
    assert torch.equal(norm.log_scale[[1, 3]], torch.zeros(2)) and z[:, [1, 3]].abs().max().item() < 1e-7
    tiny = fastmaf.ActNorm(D).fit_(1e-20 * data(dtype=F32))
    assert tiny(1e-20 * data(dtype=F32))[0].std(0, correction=0).sub(1).abs().max().item() < 1e-5


def test_what_fit_refuses() -> None:
    norm = fastmaf.ActNorm(D, dtype=F64)
    for x, words in (
        (data(1), r"x must have shape \[n, 5\] with n >= 2; found \[1, 5\]"),
        (data(4, 3), r"found \[4, 3\]"),
        (data() * math.inf, "x must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            norm.fit_(x)
    for make, words in (
        (lambda: fastmaf.ActNorm(0), "features must be at least 1; found 0"),
        (lambda: fastmaf.BatchNorm(0), "features must be at least 1; found 0"),
        (lambda: fastmaf.BatchNorm(2, eps=0.0), "eps must be positive; found 0.0"),
        (lambda: fastmaf.BatchNorm(2, momentum=1.5), r"momentum must lie in \[0, 1\]; found 1.5"),
        (
            lambda: fastmaf.MAF(2, normalization="layer"),
            "normalization must be one of 'batch', 'act', or None; found 'la",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_a_state_dict_tells_whether_the_start_is_over() -> None:
    started, fresh, x = fastmaf.ActNorm(D, dtype=F64).fit_(data()), fastmaf.ActNorm(D, dtype=F64), data() + 7
    other = copy.deepcopy(fresh)
    other.load_state_dict(started.state_dict())
    assert torch.equal(other(x)[0], started(x)[0]), "a loaded state is started anew"
    other.load_state_dict(fresh.state_dict())
    assert other(x)[0].mean(0).abs().max().item() < 1e-13, "a state that is not started does not start"
    average = fastmaf.ActNorm(D, dtype=F64)
    for target, source in zip(average.state_dict().values(), started.state_dict().values(), strict=True):
        target.copy_(source)  # as moving averages of weights are kept
    assert torch.equal(average(x)[0], started(x)[0])


@pytest.mark.parametrize(("cls", "order"), [(fastmaf.MAF, "alternate"), (fastmaf.IAF, "natural")])
@pytest.mark.parametrize("kind", ["batch", "act"])
def test_trained_flows(kind: Any, cls: type[fastmaf.MAF], order: Any, tmp_path: Path) -> None:
    flow = cls(6, 2, 16, order=order, normalization=kind, whitening=1, seed=0, dtype=F64)
    norms = {"batch": fastmaf.BatchNorm, "act": fastmaf.ActNorm}[kind]
    kinds = [type(part) for part in flow.transforms if not isinstance(part, fastmaf.Permutation)]
    block = fastmaf.Inverted if cls is fastmaf.IAF else fastmaf.AffineAutoregressive
    assert kinds == [fastmaf.GaussianWhitening, block, norms, block, norms]
    x = 4 * correlated(256, 6) + 10
    losses = train(flow, x, steps=40 if cls is fastmaf.IAF else 80)
    assert losses[-1] < losses[0]
    flow.eval()
    z, ladj = flow(x[:8])
    expected = torch.linalg.slogdet(jacobian(lambda v: flow(v)[0], x[0])).logabsdet
    assert error(ladj[0], expected) < 1e-10
    with torch.no_grad():
        back, ladj_back = flow.inverse(z)
        assert error(back, x[:8]) < 1e-11 and error(ladj_back, -ladj) < 1e-11
        sample, log_prob = flow.sample_and_log_prob(8, seed=3)
        assert error(flow.log_prob(sample), log_prob) < 1e-10
        assert error(flow.sample(5, seed=3, start=3), sample[3:]) < 1e-12
        assert error(-flow.nll_per_dim(x).sum(1), flow.log_prob(x)) < 1e-12
        flow.save(path := tmp_path / "flow.safetensors")
        again = fastmaf.load(path)
        assert type(again) is cls and torch.equal(again.eval().log_prob(x), flow.log_prob(x))
        assert all(torch.equal(again.state_dict()[name], value) for name, value in flow.state_dict().items())
        other = cls(6, 2, 16, order=order, normalization=kind, whitening=1, seed=1, dtype=F64)
        other.load_state_dict(flow.state_dict())
        for twin in (other, copy.deepcopy(flow), flow.to_inference(F64)):
            assert torch.equal(twin.eval().log_prob(x), flow.log_prob(x))
        assert error(copy.deepcopy(flow).float().log_prob(x.float()), flow.log_prob(x)) < 1e-4


@pytest.mark.parametrize("kind", ["batch", "act"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(kind: Any, dtype: torch.dtype) -> None:
    flow, x = fastmaf.MAF(D, 2, 8, normalization=kind, seed=0), data(dtype=F32)
    expected = flow.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("values", flow.log_prob(x), expected)
    assert flow.to_inference().log_prob(x).dtype == F32
    norm = {"batch": fastmaf.BatchNorm, "act": fastmaf.ActNorm}[kind](D, dtype=dtype)
    z, ladj = norm(x.to(dtype))
    assert z.dtype == ladj.dtype == dtype and z.float().mean(0).abs().max().item() < 0.05
    assert all(value.dtype in (dtype, torch.bool) for value in norm.state_dict().values())


def test_a_flow_on_the_meta_device() -> None:
    for kind in ("batch", "act"):
        flow = fastmaf.MAF(D, 2, 8, normalization=kind, device="meta")  # type: ignore[arg-type]
        assert fastmaf.memory_estimate(flow, 8) > 0


def test_nan_in_training_is_explained() -> None:
    """By a pass of the whole batch, as no row passes a BatchNorm alone."""
    flow, x = fastmaf.MAF(D, 2, 8, order="natural", normalization="batch", seed=0), data(dtype=F32)
    with torch.no_grad():
        flow.transforms[0].made.output.bias[::2] = -1e38  # type: ignore[union-attr, index]
    x[3] = 3.3e38
    with pytest.raises(FloatingPointError, match=r"log_prob is NaN in 64 of 64 rows.* in transforms\[1\] \(BatchNorm"):
        flow.log_prob(x)
    assert all(bool(value.isfinite().all()) for value in flow.state_dict().values())


@pytest.mark.slow
def test_compiled_flows() -> None:
    x = data()
    for kind in ("batch", "act"):
        flow = fastmaf.MAF(D, 2, 8, normalization=kind, seed=0, dtype=F64)  # type: ignore[arg-type]
        twin = copy.deepcopy(flow)
        try:
            torch.compiler.reset()
            compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
            if kind == "act":
                with pytest.raises(Exception, match="ActNorm starts by its first batch"):
                    compiled(x)
                torch.compiler.reset()
                flow.log_prob(x)
                twin.log_prob(x)
                compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
            for _ in range(2):
                assert_close("values", compiled(x), twin.log_prob(x))
            for name, value in flow.state_dict().items():
                assert torch.equal(value, twin.state_dict()[name]) or error(value, twin.state_dict()[name]) < 1e-13
        finally:
            torch.compiler.reset()


class NLL(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.flow = fastmaf.MAF(D, 2, 8, normalization=kind, seed=0, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed = torch.distributed
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    states = {}
    for kind in ("act", "batch"):
        model = nn.parallel.DistributedDataParallel(NLL(kind))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(3):
            model(data(64 if step else 32)[16 * rank : 16 * rank + 16]).backward()
            if not step and kind == "act":
                states["start"] = copy.deepcopy(model.module.flow.transforms[1].state_dict())
            optimizer.step()
            optimizer.zero_grad()
        model(data(32))  # the buffers of the first process are sent at the next pass
        states[kind] = dict(model.module.named_parameters())
    torch.save(states, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_start_alike(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for kind in ("start", "act", "batch"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), f"{kind}: {name} differs among processes"
    flow = NLL("act").flow
    flow.log_prob(data(32))
    for name, value in flow.transforms[1].state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(first["start"][name], value, rtol=1e-12, atol=1e-12)


def test_which_passes_may_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    act, batch = fastmaf.ActNorm(D, dtype=F64), batch_norm()
    assert act.needs_eager and not copy.deepcopy(act).eval().needs_eager
    act(data())
    assert not act.needs_eager
    assert batch.needs_eager and not batch.eval().needs_eager
    monkeypatch.setattr(graph_keys, "can_replay", lambda flow: True)
    for kind in ("act", "batch"):
        flow, x = fastmaf.MAF(D, 2, 8, normalization=kind, dtype=F64), data()  # type: ignore[arg-type]
        keys = graph_keys.FlowKeys(flow)
        assert keys.of(x) is None
        flow.log_prob(x)
        assert (keys.of(x) is None) == (kind == "batch")
        flow.eval()
        assert (key := keys.of(x)) is not None and keys.of(x) == key
        flow.train()
        assert (keys.of(x) is None) == (kind == "batch")


def test_files_from_strangers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    norms = [fastmaf.ActNorm(D).fit_(data(dtype=F32)), fastmaf.BatchNorm(D)]
    fastmaf.Flow(D, norms, fastmaf.LowRankGaussian(D, 2)).save(path)
    content = path.read_bytes()
    batch, base = ("transforms", 1), ("base",)
    for at, value, words in (
        (("transforms", 0, "features"), 4, r"transforms\[0\]\.features: expected 5, the flow's; found 4"),
        ((*batch, "eps"), 0, r"transforms\[1\]\.eps: expected a finite number at least 1e-30"),
        ((*batch, "momentum"), 1.5, r"transforms\[1\]\.momentum: expected a finite number"),
        ((*batch, "type"), "act_norm", r"transforms\[1\]: unknown entry"),
        (base, [], "configuration.base: expected an object"),
        ((*base, "type"), "Evil", r"configuration\.base\.type: expected one of 'standard_normal'"),
        ((*base, "type"), "student_t", r"configuration\.base: the entry 'trainable' is missing"),
        ((*base, "rank"), 10**9, r"configuration\.base\.rank: expected at most 5, the features; found 1000000000"),
        ((*base, "rank"), 3, r"tensor base\.factors: expected \(5, 3\) torch\.float32, found \(5, 2\)"),
        ((*base, "features"), 6, r"configuration\.base\.features: expected 5, the flow's; found 6"),
        ((*base, "more"), 6, r"configuration\.base: unknown entry 'more'"),
    ):
        path.write_bytes(changed(content, "fastmaf", at, value))
        with pytest.raises(fastmaf.CheckpointError, match=words):
            fastmaf.load(path)
    for name, number, words in (
        ("transforms.1.running_var", -1.0, r"tensor transforms\.1\.running_var must be not negative; found -1"),
        ("transforms.1.log_scale", 1e9, r"tensor transforms\.1\.log_scale must be at most 87\.3 in size"),
        ("base.log_scale", -100.0, r"tensor base\.log_scale must be at most 87\.3 in size; found 100"),
        ("base.loc", math.inf, r"'base\.loc' holds values that are not finite"),
    ):
        parts = Parts.of(content)
        parts.replace(name, np.full(D, number, np.float32))
        path.write_bytes(parts.joined())
        with pytest.raises(fastmaf.CheckpointError, match=words):
            fastmaf.load(path)
