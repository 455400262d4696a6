"""Transforms the other way round, alone and in inverse autoregressive flows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.flow.prepared import PreparedFlow
from tests.core.helpers import build, correlated, generator, jacobian, normal, train
from tests.io.damage import changed
from tests.tolerances import F32, F64, assert_close, error

pytestmark = pytest.mark.usefixtures("backend")


def iaf(features: int, **options: Any) -> fastmaf.IAF:
    return fastmaf.IAF(features, **{"blocks": 3, "hidden_features": (17, 12), "seed": 0, "dtype": F64, **options})


def one_by_one(flow: fastmaf.Flow, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z and ladj by the transforms alone, without the ops of whole flows."""
    ladj = x.new_zeros(len(x))
    for transform in flow.transforms:
        x, term = transform(x)
        ladj = ladj + term
    return x, ladj


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("order", ["natural", "alternate", "random"])
@pytest.mark.parametrize("features", [1, 2, 13])
def test_a_flow_is_the_inverse_of_a_maf(features: int, order: str, batch: int) -> None:
    flow, maf = (cls(features, 3, (17, 12), order=order, seed=0, dtype=F64) for cls in (fastmaf.IAF, fastmaf.MAF))
    turned = [
        fastmaf.Permutation(part.inverse_permutation) if isinstance(part, fastmaf.Permutation) else part
        for part in reversed(maf.transforms)
    ]
    maf = fastmaf.MAF.from_transforms(features, [t.transform if isinstance(t, fastmaf.Inverted) else t for t in turned])
    for part, other in zip(reversed(flow.transforms), maf.transforms, strict=True):
        if isinstance(part, fastmaf.Inverted):
            other.load_state_dict(part.transform.state_dict())
    z = normal(batch, features)
    with torch.no_grad():
        for found, expected in zip(flow.inverse(z), maf(z), strict=True):
            assert torch.equal(found, expected)
        x, _ = maf(z)
        for found, expected in zip(flow(x), maf.inverse(x), strict=True):
            assert torch.equal(found, expected)
        assert_close("inverse", flow(x)[0], z)
        assert_close("values", flow.log_prob(x), flow._base_log_prob(z) - maf(z)[1])


@pytest.mark.parametrize("features", [1, 2, 7])
def test_ladj_is_the_log_determinant(features: int) -> None:
    flow, x = iaf(features), normal(features)
    for of in (flow, flow.inverse):
        expected = torch.linalg.slogdet(jacobian(lambda v, of=of: of(v)[0], x)).logabsdet
        assert_close("slogdet", of(x[None])[1][0], expected)


def test_trained_flows() -> None:
    """By both directions of the Kullback-Leibler divergence; the gradients of the densities are those of autograd."""
    data, flow = correlated(256, 6), iaf(6, hidden_features=16)
    assert train(flow, data, steps=60)[-1] < train(copy.deepcopy(flow), data, steps=1)[0] + 0.5
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(20):
        x, log_prob = flow.rsample_and_log_prob(64)
        (log_prob + 0.5 * (x - 1).square().sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        z, ladj = flow(data)
        x, back = flow.inverse(z)
        assert error(x, data) < 1e-11 and error(back, -ladj) < 1e-11
        sample, log_prob = flow.sample_and_log_prob(20, seed=1)
        assert error(flow.log_prob(sample), log_prob) < 1e-11
        rows = flow.sample(8, seed=1, start=12)
        assert error(rows, sample[12:]) < 1e-13
    leaves = [leaf := data[:4].clone().requires_grad_(), *flow.parameters()]
    z, ladj = one_by_one(flow, leaf)
    expected = torch.autograd.grad((ladj - 0.5 * z.square().sum(1)).sum(), leaves)
    for found, other in zip(torch.autograd.grad(flow.log_prob(leaf).sum(), leaves), expected, strict=True):
        assert_close("gradients", found, other)
    assert_close("values", -flow.nll_per_dim(data).sum(1), flow.log_prob(data))


@pytest.mark.parametrize("by_samples", [False, True])
def test_steps_of_fused_adam_are_those_of_adam(by_samples: bool) -> None:
    flow = iaf(5)
    twin, x = copy.deepcopy(flow), normal(6, 5)
    fused, adam = (
        cls(one.parameters(), lr=1e-2) for cls, one in ((fastmaf.optim.FusedAdam, flow), (torch.optim.Adam, twin))
    )

    def loss(of: fastmaf.IAF) -> Tensor:
        if not by_samples:
            return -of.log_prob(x).mean()
        sample, log_prob = of.rsample_and_log_prob(8, seed=0)
        return (log_prob + (sample - 1).square().sum(1)).mean()

    for _ in range(3):
        assert fused.minimize(loss(flow))
        adam.zero_grad()
        loss(twin).backward()
        adam.step()
    assert error(flow.sample(4, seed=1), twin.sample(4, seed=1)) < 1e-9
    step = fastmaf.TrainingStep(flow, fused, fastmaf.Guards(max_grad_norm=1.0))
    assert not step(x).skipped


def block(seed: int, **options: Any) -> fastmaf.AffineAutoregressive:
    made = fastmaf.MADE(5, (9, 7), degrees="random", generator=generator(seed), dtype=F64, **options)
    return fastmaf.AffineAutoregressive(made)


def permutation(seed: int) -> fastmaf.Permutation:
    return fastmaf.Permutation(torch.randperm(5, generator=generator(seed)))


SEQUENCES: dict[str, list[Any]] = {
    "both directions": [block(0), permutation(1), fastmaf.Inverted(block(2)), fastmaf.Inverted(block(3)), block(4)],
    "permutations": [fastmaf.Inverted(block(1)), permutation(2), fastmaf.Inverted(block(3)), permutation(5)],
    "activations": [fastmaf.Inverted(block(0)), fastmaf.Inverted(block(1, activation="identity"))],
    "a permutation within": [fastmaf.Inverted(permutation(1)), block(2), fastmaf.Inverted(permutation(3))],
    "other transforms": [
        fastmaf.Inverted(fastmaf.ElementwiseAffine(normal(5), 0.1 * normal(5, seed=1))),
        fastmaf.Inverted(block(1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_any_sequence(name: str, tmp_path: Path) -> None:
    flow, x = fastmaf.Flow(5, SEQUENCES[name]), normal(4, 5)
    z, ladj = flow(x)
    for found, expected in zip((z, ladj), one_by_one(flow, x), strict=True):
        assert_close("inverse", found, expected)
    with torch.no_grad():
        assert_close("inverse", flow(x)[0], z)
        back, ladj_back = flow.inverse(z)
    assert_close("inverse", back, x)
    assert_close("inverse", ladj_back, -ladj)
    assert_close("values", -flow.nll_per_dim(x).sum(1), flow.log_prob(x))
    flow.save(path := tmp_path / "flow.safetensors")
    again = fastmaf.load(path)
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and repr(again) == repr(flow)
    assert torch.equal(pickle.loads(pickle.dumps(flow)).log_prob(x), flow.log_prob(x))


def test_consecutive_blocks_run_as_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x, calls = iaf(5), normal(4, 5), []
    for name in ("forward", "inverse"):
        own = getattr(PreparedFlow, name)

        def counted(self: PreparedFlow, x: Tensor, own: Any = own, name: str = name) -> Any:
            calls.append((name, len(self.args.schedules)))
            return own(self, x)

        monkeypatch.setattr(PreparedFlow, name, counted)
    with torch.no_grad():
        flow.log_prob(x)
        flow.sample(3)
    assert calls == [("inverse", 3), ("forward", 3)]


def test_what_changes_within_is_noticed() -> None:
    flow, x = iaf(5, order="random"), normal(4, 5)

    def found(of: fastmaf.Flow) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return of.log_prob(x), of.sample(3, seed=0)

    values = [found(flow)]
    inner: Any = next(part for part in flow.transforms if isinstance(part, fastmaf.Inverted))
    changes = [
        lambda: inner.transform.made.output.bias.data.add_(0.1),
        lambda: setattr(inner.transform, "log_scale_bound", 0.1),
        lambda: setattr(inner, "transform", block(7)),
        lambda: flow.transforms[0].permutation.copy_(torch.tensor([1, 0, 3, 2, 4])),
        lambda: inner.transform.register_forward_hook(lambda module, given, result: (result[0] + 1, result[1])),
    ]
    for k, change in enumerate(changes):
        change()
        values.append(found(flow))
        assert not torch.equal(values[-1][1], values[-2][1]), f"change {k} is not seen by sample"
        if k < 4:  # a hook of ``forward`` is no part of the inverse
            assert not torch.equal(values[-1][0], values[-2][0]), f"change {k} is not seen by log_prob"
            for one, other in zip(values[-1], found(copy.deepcopy(flow)), strict=True):
                assert torch.equal(one, other)


def test_a_file_of_an_iaf(tmp_path: Path) -> None:
    flow, x, path = (
        iaf(5, dtype=F32, base=fastmaf.StudentT(5, 4.0)),
        normal(4, 5, dtype=F32),
        tmp_path / "a.safetensors",
    )
    flow.save(path, card=tmp_path / "card.md")
    again = fastmaf.load(path)
    assert type(again) is fastmaf.IAF and torch.equal(again.log_prob(x), flow.log_prob(x))
    card = (tmp_path / "card.md").read_text("utf-8")
    assert "3 × inverted affine autoregressive" in card and "| Hidden units of a block | (17, 12) |" in card
    assert "| Base | student t |" in card and "`fastmaf.IAF`" in card
    flow.to_inference().save(path)
    rounded = fastmaf.load(path)
    assert torch.equal(rounded.log_prob(x), flow.to_inference().log_prob(x))
    assert not any(parameter.requires_grad for parameter in rounded.parameters())


def test_files_from_strangers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    fastmaf.Flow(5, [fastmaf.Inverted(block(0))]).save(path)
    content, place = path.read_bytes(), ("transforms", 0)
    for at, value, words in (
        ((*place, "transform"), None, r"transforms\[0\]\.transform: expected an object; found None"),
        ((*place, "other"), 1, r"transforms\[0\]: unknown entry 'other'"),
        ((*place, "transform", "type"), "inverted", r"transforms\[0\]\.transform\.type: expected one of"),
        ((*place, "transform", "type"), "logit", r"transforms\[0\]\.transform: the entry 'alpha' is missing"),
        (
            (*place, "transform", "features"),
            4,
            r"\[0\]\.transform\.features: expected 5, the flow's; found 4",
        ),
        ((*place, "transform", "hidden_features", 0), 10**8, r"transforms\.0\.transform\.made\.degrees_0: expected"),
        ((*place, "type"), "permutation", r"transforms\[0\]: unknown entry 'transform'"),
    ):
        path.write_bytes(changed(content, "fastmaf", at, value))
        with pytest.raises(fastmaf.CheckpointError, match=words):
            fastmaf.load(path)


def test_what_cannot_be_inverted() -> None:
    with pytest.raises(TypeError, match="not inverted; found Inverted"):
        fastmaf.Inverted(fastmaf.Inverted(block(0)))
    with pytest.raises(TypeError, match=r"expected a fastmaf\.Transform that is not inverted; found Linear"):
        fastmaf.Inverted(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(fastmaf.NotInvertibleError, match="leaky output mask"):
        fastmaf.IAF(5, 2, 16, strict=False)
    leaky = [fastmaf.Inverted(part) for part in build(5, order="natural", strict=False).transforms]  # type: ignore[arg-type]
    flow = fastmaf.Flow(5, leaky)
    assert flow.sample(3).shape == (3, 5)
    for _ in range(2):
        with pytest.raises(fastmaf.NotInvertibleError, match="leaky output mask"):
            flow.log_prob(normal(2, 5))
