"""Tests of the guarantees of every transform; the test file of a transform subclasses ``TransformContract``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.transforms import Transform
from tests.core.helpers import build, generator, jacobian, layers_of, normal, shared_widths
from tests.tolerances import F32, F64, assert_close

DTYPES = pytest.mark.parametrize("dtype", [F64, F32], ids=str)

# Each returns the values of x in another memory layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "column slice": lambda x: torch.cat((x, x, x), dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "strided columns": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "strided rows": lambda x: x.repeat_interleave(3, dim=0)[::3],
    "storage offset": lambda x: torch.cat((x.new_full((7,), torch.nan), x.flatten()))[7:].view(x.shape),
    "three-dimensional slice": lambda x: torch.stack((x, x), dim=2)[..., 1],
}


class TransformContract:
    """Subclasses define how their transform, far from the identity, and its data are built."""

    features: int

    def transform(self, dtype: torch.dtype = F64) -> Transform:
        raise NotImplementedError

    def fresh(self, dtype: torch.dtype = F64) -> Transform:
        """Returns a transform of the same configuration with other values."""
        raise NotImplementedError

    def data(self, n: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
        return normal(n, self.features, seed=seed, dtype=dtype)

    def flow(self, dtype: torch.dtype = F64) -> fastmaf.Flow:
        """Returns the transform in front of two blocks of a MAF."""
        blocks = build(self.features, hidden_features=(9, 7), order="random", dtype=dtype)
        return fastmaf.Flow(self.features, [self.transform(dtype), *blocks._transforms()])

    @DTYPES
    def test_round_trip(self, dtype: torch.dtype) -> None:
        transform, x, z = self.transform(dtype), self.data(65, dtype), normal(65, self.features, seed=1, dtype=dtype)
        with torch.no_grad():
            (there, ladj), (back, ladj_of_z) = transform(x), transform.inverse(z)
            assert_close("round_trip", transform.inverse(there)[0], x, "inverse(forward(x))")
            assert_close("round_trip", transform(back)[0], z, "forward(inverse(z))")
            assert_close("round_trip", transform.inverse(there)[1], -ladj, "ladj of the inverse")
            assert_close("round_trip", transform(back)[1], -ladj_of_z, "ladj of the inverse's result")
        assert there.dtype == back.dtype == ladj.dtype == ladj_of_z.dtype == dtype

    @DTYPES
    def test_ladj_is_the_log_determinant(self, dtype: torch.dtype) -> None:
        transform = self.transform(dtype)
        for seed in range(3):
            for function, x in (
                (transform, self.data(1, dtype, seed)[0]),
                (transform.inverse, normal(self.features, seed=seed, dtype=dtype)),
            ):
                slopes = jacobian(lambda v, function=function: function(v)[0], x)
                expected = torch.linalg.slogdet(slopes)
                assert float(expected.sign) == 1.0
                assert_close("slogdet", function(x[None])[1][0].detach(), expected.logabsdet)

    def test_gradients_of_both_directions(self) -> None:
        transform = self.transform()
        assert torch.autograd.gradcheck(transform, self.data(2).requires_grad_())
        assert torch.autograd.gradcheck(transform.inverse, normal(2, self.features).requires_grad_())

    @DTYPES
    def test_terms_per_dimension(self, dtype: torch.dtype) -> None:
        transform, x = self.transform(dtype), self.data(7, dtype)
        before = normal(7, self.features, seed=2, dtype=dtype)
        kept = before.clone()
        with torch.no_grad():
            z, ladj = transform(x)
            actual, terms = transform.forward_per_dim(x, before)
        assert_close("values", actual, z)
        assert_close("values", (terms - before).sum(dim=1), -ladj)
        assert torch.equal(before, kept), "the terms of earlier transforms were written to"
        for flow in (self.flow(dtype), fastmaf.Flow(self.features, [self.transform(dtype)])):
            if flow._like().dtype == dtype:  # without parameters and buffers a flow is float32
                assert_close("values", flow.nll_per_dim(x).sum(dim=1), -flow.log_prob(x))

    @pytest.mark.parametrize("batch", [0, 1, 7])
    def test_batches(self, batch: int) -> None:
        transform, flow, x = self.transform(), self.flow(), self.data(9)[:batch]
        (z, ladj), (back, ladj_of_inverse) = transform(x), transform.inverse(normal(9, self.features)[:batch])
        assert z.shape == back.shape == x.shape and ladj.shape == ladj_of_inverse.shape == (batch,)
        assert transform.forward_per_dim(x, torch.zeros_like(x))[1].shape == x.shape
        assert flow.log_prob(x).shape == (batch,) and flow.nll_per_dim(x).shape == x.shape
        assert flow.sample(batch).shape == x.shape
        for function in (transform, transform.inverse, flow):
            rows, whole = function(x), function(self.data(9))
            assert_close("values", rows[0].detach(), whole[0][:batch], "a row depends on its batch")
            assert_close("values", rows[1].detach(), whole[1][:batch], "a row depends on its batch")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_do_not_matter(self, layout: str) -> None:
        transform, x = self.transform(), self.data(6)
        other = LAYOUTS[layout](x)
        assert torch.equal(other, x) and (other.storage_offset() or not other.is_contiguous())
        for function in (transform, transform.inverse, lambda v: transform.forward_per_dim(v, other)):
            for actual, expected in zip(function(other), function(x), strict=True):
                assert_close("values", actual.detach(), expected)
        assert torch.equal(other, x), "the input was written to"

    def test_deepcopy_is_independent(self) -> None:
        flow, x = self.flow(), self.data(4)
        before, terms = flow.log_prob(x), flow.nll_per_dim(x)
        twin = copy.deepcopy(flow)
        assert torch.equal(twin.log_prob(x), before)
        with torch.no_grad():
            for tensor in (*flow.parameters(), *flow.buffers()):
                tensor.zero_()
        assert torch.equal(twin.log_prob(x), before) and torch.equal(twin.nll_per_dim(x), terms)

    def test_state_dict_round_trip(self) -> None:
        transform, other, x = self.transform(), self.fresh(), self.data(4)
        result = other.load_state_dict(copy.deepcopy(transform.state_dict()))
        assert not result.missing_keys and not result.unexpected_keys
        zeros = torch.zeros_like(x)
        for actual, expected in (
            (other(x), transform(x)),
            (other.inverse(x), transform.inverse(x)),
            (other.forward_per_dim(x, zeros), transform.forward_per_dim(x, zeros)),
        ):
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])

    @DTYPES
    def test_save_and_load(self, tmp_path: Path, dtype: torch.dtype) -> None:
        flow, x, path = self.flow(dtype), self.data(4, dtype), tmp_path / "flow.safetensors"
        flow.save(path)
        with shared_widths():
            again = fastmaf.load(path)
        assert again.transforms[0].config() == flow.transforms[0].config()  # type: ignore[operator, union-attr]
        assert torch.equal(again.log_prob(x), flow.log_prob(x))
        assert torch.equal(again.nll_per_dim(x), flow.nll_per_dim(x))
        assert torch.equal(again.sample(3, generator=generator()), flow.sample(3, generator=generator()))
        assert list(again.state_dict()) == list(flow.state_dict())
        assert str(again) == str(flow)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
    def test_inference_copy(self, dtype: torch.dtype) -> None:
        flow, x = self.flow(F32), self.data(9, F32)
        before = flow.log_prob(x)
        plain, small, rounded = flow.to_inference(F32), flow.to_inference(dtype), copy.deepcopy(flow)
        for layer, stored in zip(layers_of(rounded).values(), layers_of(small).values(), strict=True):
            layer.load_dense_(stored.dense_weight(), stored.bias)
        assert not any(p.requires_grad for p in (*plain.parameters(), *small.parameters()))
        assert torch.equal(plain.log_prob(x), before) and torch.equal(flow.log_prob(x), before)
        assert_close("values", small.log_prob(x), rounded.log_prob(x).detach())
        assert_close("round_trip", small.inverse(small(x)[0])[0], x)

    def test_changing_dtype_and_back(self) -> None:
        flow, x = self.flow(F32), self.data(5, F32)
        single = flow.log_prob(x).detach()
        back = copy.deepcopy(flow).to(F64).to(F32)
        assert torch.equal(back.log_prob(x), single) and torch.equal(back.nll_per_dim(x), flow.nll_per_dim(x))
        double = copy.deepcopy(flow).to(F64)
        assert double.log_prob(x.double()).dtype == F64
        assert_close("values", single, double.log_prob(x.double()))

    def test_what_became_float64_is_as_exact_as_float64(self, tmp_path: Path) -> None:
        flow, x = self.flow(F32).to(F64), self.data(5)
        assert_close("values", flow.nll_per_dim(x).sum(dim=1).detach(), -flow.log_prob(x))
        flow.save(tmp_path / "flow.safetensors")
        with shared_widths():
            again = fastmaf.load(tmp_path / "flow.safetensors")
        assert torch.equal(again.log_prob(x), flow.log_prob(x))
        assert torch.equal(again.nll_per_dim(x), flow.nll_per_dim(x))

    def test_meta(self) -> None:
        with torch.device("meta"):
            planned = self.flow(F32)
        flow = self.flow(F32)
        assert all(t.is_meta for t in (*planned.transforms[0].parameters(), *planned.transforms[0].buffers()))
        for optimiser in (fastmaf.optim.FusedAdam, torch.optim.Adam, None):
            actual = fastmaf.memory_estimate(planned, 4, optimiser)
            assert actual == fastmaf.memory_estimate(copy.deepcopy(flow).to("meta"), 4, optimiser) > 0
            assert fastmaf.memory_estimate(flow, 4, optimiser) > 0


def log_normal(z: Tensor) -> Tensor:
    """Returns the standard normal's log-density of each entry."""
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
