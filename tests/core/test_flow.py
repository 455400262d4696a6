"""Flow and its transforms: densities, samples, per-dimension terms, inversion of each part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.noise import normal_rows
from tests.core.helpers import blocks_of, build, generator, jacobian, normal
from tests.tolerances import assert_close


def test_log_prob_is_a_density() -> None:
    """The density integrates to 1 over a fine grid in two dimensions."""
    flow = build(2, hidden_features=(6, 6), scale=1.5)
    side = torch.linspace(-12.0, 12.0, 481, dtype=torch.float64)
    with torch.no_grad():
        log_prob = flow.log_prob(torch.cartesian_prod(side, side))
    assert float(log_prob.exp().sum() * (side[1] - side[0]) ** 2) == pytest.approx(1.0, abs=1e-3)


def test_samples_follow_the_density() -> None:
    """In one dimension: the mean of the samples' negative log-density is the entropy that the grid gives."""
    flow = build(1, scale=3.0)
    grid = torch.linspace(-30.0, 30.0, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_prob = flow.log_prob(grid)
        entropy = float(-(log_prob.exp() * log_prob).sum() * (grid[1] - grid[0]))
        actual = float(-flow.log_prob(flow.sample(20_000, generator=generator())).mean())
    assert actual == pytest.approx(entropy, abs=5 * math.sqrt(0.5 / 20_000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sample_and_log_prob_agree(dtype: torch.dtype) -> None:
    flow = build(37, blocks=3, degrees="random", order="random", dtype=dtype)
    with torch.no_grad():
        x, log_prob = flow.sample_and_log_prob(9, generator=generator(5))
        assert x.shape == (9, 37) and x.dtype == dtype and log_prob.shape == (9,)
        assert_close("sample_log_prob", log_prob, flow.log_prob(x))
        assert torch.equal(x, flow.sample(9, generator=generator(5)))


def test_samples_repeat_with_a_generator() -> None:
    flow = build(13)
    first, again, other = (flow.sample(4, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    flow.sample(4, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state), "a generator was given, but torch's global one moved"
    torch.manual_seed(3)
    first = flow.sample(4)
    assert not torch.equal(first, flow.sample(4))
    torch.manual_seed(3)
    assert torch.equal(first, flow.sample(4))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_sample_counts(n: int) -> None:
    x, log_prob = build(7).sample_and_log_prob(n)
    assert x.shape == (n, 7) and log_prob.shape == (n,)


def per_dim_by_hand(flow: fastmaf.MAF, x: Tensor) -> Tensor:
    """Returns ½z² + ½log 2π + Σ log_scale per dimension, read off the diagonals of the naive blocks' Jacobians."""
    rows = []
    for row in x:
        terms = torch.zeros_like(row)
        for block in flow.to_naive().blocks:
            terms = terms - jacobian(lambda v, block=block: block(v)[0], row).diagonal().log()
            row = block(row[None])[0][0]
        rows.append(terms + 0.5 * row**2 + 0.5 * math.log(2 * math.pi))
    return torch.stack(rows)


@pytest.mark.parametrize("order", ["natural", "alternate", "random"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_nll_per_dim(order: str, blocks: int) -> None:
    flow = build(13, blocks=blocks, order=order, degrees="random", hidden_features=(19, 11), scale=2.0)
    x = normal(4, 13)
    terms = flow.nll_per_dim(x)
    assert_close("values", terms.sum(dim=1), -flow.log_prob(x))
    assert_close("values", terms, per_dim_by_hand(flow, x).detach(), "a term stands at another dimension's place")


def test_nll_per_dim_of_a_diagonal_flow() -> None:
    """Two blocks, the second reversed, weights zero: every term is known by hand."""
    features = 5
    flow = build(features, order="alternate", log_scale_bound=None)
    shift, log_scale = normal(2, features, seed=1), 0.3 * normal(2, features, seed=2)
    with torch.no_grad():
        for i, block in enumerate(blocks_of(flow)):
            block.made.output.weight.zero_()
            order = torch.arange(features) if i == 0 else torch.arange(features).flip(0)
            block.made.output.bias.copy_(torch.stack((shift[i], log_scale[i]), dim=1)[order].flatten())
    x = normal(3, features, seed=3)
    z = ((x - shift[0]) * torch.exp(-log_scale[0]) - shift[1]) * torch.exp(-log_scale[1])
    assert_close("values", flow(x)[0], z)
    expected = 0.5 * z**2 + 0.5 * math.log(2 * math.pi) + log_scale.sum(dim=0)
    assert_close("values", flow.nll_per_dim(x), expected)


def test_clamp_and_soft_bound_by_hand() -> None:
    """Raw log-scales beyond the bound: the clamp stops at it and loses the gradient, tanh nears it and keeps one."""
    raw = torch.tensor([-9.0, -0.5, 0.25, 9.0], dtype=torch.float64)
    x = torch.ones(1, 4, dtype=torch.float64)
    for options, expected in (
        ({"log_scale_bound": 2.0, "soft_bound": False}, raw.clamp(-2, 2)),
        ({"log_scale_bound": 2.0, "soft_bound": True}, 2 * torch.tanh(raw / 2)),
        ({"log_scale_bound": None}, raw),
    ):
        flow = build(4, blocks=1, order="natural", **options)
        output = blocks_of(flow)[0].made.output
        with torch.no_grad():
            output.weight.zero_()
            output.bias.copy_(torch.stack((torch.zeros(4), raw), dim=1).flatten())
        z, ladj = flow(x)
        assert_close("values", z[0], torch.exp(-expected))
        assert_close("values", ladj[0], -expected.sum())
        (-ladj).backward()
        assert output.bias.grad is not None
        slope = output.bias.grad[1::2]
        if options["log_scale_bound"] is None:
            assert torch.equal(slope, torch.ones(4, dtype=torch.float64))
        elif options.get("soft_bound"):
            assert_close("gradients", slope, 1 - torch.tanh(raw / 2) ** 2)
            assert (slope > 0).all()
        else:
            assert torch.equal(slope, torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64))


def test_identity_start() -> None:
    flow = build(13, blocks=3, init="identity", order="random")
    x = normal(4, 13)
    z, ladj = flow(x)
    assert torch.equal(z, x) and torch.equal(ladj, torch.zeros(4, dtype=torch.float64))
    # It must be able to leave: the output layer has a gradient, and after one step so have the others.
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), f"{name} never moves"


def test_permutation_by_hand() -> None:
    permutation = fastmaf.Permutation(torch.tensor([2, 0, 3, 1]))
    x = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    z, ladj = permutation(x)
    assert torch.equal(z, torch.tensor([[12.0, 10.0, 13.0, 11.0]])) and torch.equal(ladj, torch.zeros(1))
    back, ladj = permutation.inverse(z)
    assert torch.equal(back, x) and torch.equal(ladj, torch.zeros(1))
    z, terms = permutation.forward_per_dim(x, x + 0.5)
    assert torch.equal(terms, z + 0.5)


@pytest.mark.parametrize("wrong", [[0, 0, 1], [1, 2, 3], [0, 1, -1], [[0, 1, 2]], [0.4, 1.6, 2.2]], ids=str)
def test_what_is_no_permutation_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="permutation"):
        fastmaf.Permutation(torch.tensor(wrong))


class Moved(fastmaf.MAF):
    """A flow whose samples are moved."""

    def inverse(self, z: Any) -> tuple[Tensor, Tensor]:
        x, ladj = super().inverse(z)
        return x + 100, ladj


def test_samples_come_from_an_inverse_of_a_subclass_or_of_the_instance() -> None:
    flow = fastmaf.MAF(3, 2, 8, seed=0)
    plain = flow.sample(4, seed=1)
    flow.inverse = lambda z: (z, z.sum(1))  # type: ignore[method-assign, assignment, union-attr]
    assert torch.equal(flow.sample(4, seed=1), normal_rows(4, 3, 1, 0, plain))
    flow.__class__ = Moved
    del flow.inverse
    assert torch.equal(flow.sample(4, seed=1), plain + 100)
    assert torch.equal(flow.rsample_and_log_prob(4, seed=1)[0].detach(), plain + 100)


class Scale(fastmaf.Transform):
    """A transform that a user adds."""

    def __init__(self, features: int, factor: float) -> None:
        super().__init__()
        self.features, self.factor = features, factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, x.new_full((x.shape[0],), self.features * math.log(self.factor))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z / self.factor, z.new_full((z.shape[0],), -self.features * math.log(self.factor))


def test_other_transforms_find_a_place() -> None:
    blocks = blocks_of(build(6, order="natural"))
    flow = fastmaf.Flow(6, [blocks[0], Scale(6, 3.0), fastmaf.Permutation(torch.randperm(6)), blocks[1]])
    x = normal(4, 6)
    with torch.no_grad():
        z, ladj = flow(x)
        back, ladj_back = flow.inverse(z)
        assert_close("round_trip", back, x)
        assert_close("values", ladj_back, -ladj)
        expected = blocks[0](x)[1] + 6 * math.log(3.0)
        assert_close("values", fastmaf.Flow(6, [blocks[0], Scale(6, 3.0)])(x)[1], expected)
    with pytest.raises(NotImplementedError, match="Scale"):
        flow.nll_per_dim(x)


def test_a_flow_of_transforms_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6.*5|5.*6"):
        fastmaf.Flow(6, [fastmaf.Permutation(torch.arange(5))])


def test_to_naive_is_a_copy() -> None:
    flow, x = build(7), normal(3, 7)
    naive = flow.to_naive()
    before = naive.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    assert torch.equal(naive.log_prob(x), before)


def test_the_leaky_model_scores_but_does_not_invert() -> None:
    flow = build(9, degrees="random", hidden_features=(20, 20), strict=False)
    assert torch.isfinite(flow.log_prob(normal(2, 9))).all()
    assert_close("values", flow.log_prob(normal(2, 9)), flow.to_naive().log_prob(normal(2, 9)))
    for call in (lambda: flow.inverse(normal(2, 9)), lambda: flow.sample(2), lambda: flow.sample_and_log_prob(2)):
        with pytest.raises(fastmaf.NotInvertibleError, match="mask|own input|strict"):
            call()


def test_counts() -> None:
    flow = build(13, blocks=2, hidden_features=(7, 5))
    visible = 0
    for block in blocks_of(flow):
        degrees = [torch.arange(1, 14), *(d.long() for d in block.made.degrees)]
        for below, above in zip(degrees, degrees[1:], strict=False):
            visible += int((above[:, None] >= below[None, :]).sum())
        visible += 2 * int((degrees[0][:, None] > degrees[-1][None, :]).sum())
    assert flow.visible_weights == visible
    assert flow.stored_weights == sum(p.numel() for name, p in flow.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("wrong, words", [
    ({"blocks": 0}, "blocks"),
    ({"features": 0}, "features"),
    ({"hidden_features": ()}, "hidden_features"),
    ({"hidden_features": (4, 0)}, "hidden_features"),
    ({"levels": 0}, "levels"),
    ({"degrees": "nonsense"}, "nonsense"),
    ({"order": "nonsense"}, "nonsense"),
    ({"init": "nonsense"}, "nonsense"),
    ({"log_scale_bound": 0.0}, "log_scale_bound"),
    ({"log_scale_bound": -1.0}, "log_scale_bound"),
    ({"order": [torch.arange(6)]}, "order|permutation"),
    ({"order": [torch.arange(6), torch.zeros(6, dtype=torch.long)]}, "order|permutation"),
    ({"order": [torch.arange(6), torch.arange(5)]}, "order|permutation"),
    ({"degrees": [torch.tensor([1, 2, 3, 4])]}, "degrees"),
    ({"degrees": [torch.tensor([1, 2, 3, 7]), torch.tensor([1, 2, 3])]}, "degrees"),
    ({"degrees": [torch.tensor([1, 2, 3, -1]), torch.tensor([1, 2, 3])]}, "degrees"),
    ({"degrees": [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3])]}, "degrees"),
    ({"degrees": [torch.tensor([1.5, 2, 3, 4]), torch.tensor([1, 2, 3])]}, "degrees"),
], ids=str)  # fmt: skip
def test_arguments_are_checked(wrong: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"features": 6, "blocks": 2, "hidden_features": (4, 3), **wrong}
    with pytest.raises(ValueError, match=words):
        fastmaf.MAF(**arguments)
