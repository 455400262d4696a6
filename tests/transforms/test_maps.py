"""Blocks with other element-wise maps, fixed affine maps, and transforms the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastmaf
from tests.core.helpers import build, generator, normal
from tests.tolerances import F32, F64, assert_close, error

MAPS = [
    fastmaf.AffineMap.of(form, scale, limit=limit, epsilon=epsilon)
    for form in ("shift_first", "scale_first")
    for scale, limit, epsilon in (
        ("clamp", 0.7, 0.0),
        ("tanh", 1.5, 0.0),
        ("softplus", float("inf"), 1e-3),
        ("sigmoid", 2.0, 1e-3),
        ("soft_clip", 7.0, 0.0),
        ("soft_clip", float("inf"), 0.0),
    )
]


def flow_of(affine_map: fastmaf.AffineMap, dtype: torch.dtype = F64) -> fastmaf.Flow:
    made = fastmaf.MADE(7, (16, 12), generator=generator(1), dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return fastmaf.Flow(7, [fastmaf.AffineAutoregressive(made, affine_map=affine_map)])


@pytest.mark.parametrize("affine_map", MAPS, ids=lambda one: "-".join([*one.names, str(one.limit)]))
@pytest.mark.parametrize("backend", ["torch", None])
def test_blocks_of_every_map(affine_map: fastmaf.AffineMap, backend: str | None, tmp_path: Path) -> None:
    flow, x = flow_of(affine_map), normal(4, 7)
    with fastmaf.use_backend(backend):
        z, ladj = flow(x)
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0])
        assert_close("slogdet", torch.linalg.slogdet(jacobian)[1], ladj[0])
        back, ladj_back = flow.inverse(z)
        assert error(back, x) < 1e-12 and error(ladj_back, -ladj) < 1e-12
        assert_close("values", -flow.nll_per_dim(x).sum(1), flow.log_prob(x))
        flow.save(tmp_path / "flow.safetensors")
        assert torch.equal(fastmaf.load(tmp_path / "flow.safetensors").log_prob(x), flow.log_prob(x))
    block = flow.transforms[0]
    block.affine_map = fastmaf.AffineMap.of("scale_first", "softplus", epsilon=0.5)  # type: ignore[union-attr, assignment]
    assert error(flow.log_prob(x), ladj - 0.5 * z.square().sum(1)) > 1e-3, "the map that it had before is still used"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("first", "clamp"), "form must be one of 'shift_first', 'scale_first'; found 'first'"),
        (("shift_first", "exp"), "scale must be one of"),
        (("shift_first", "sigmoid"), "SIGMOID needs a finite limit"),
    ],
)
def test_wrong_maps(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastmaf.AffineMap.of(*arguments)


def test_what_has_no_other_maps_says_so() -> None:
    from fastmaf.naive import NaiveMAF

    flow = fastmaf.MAF.from_transforms(7, list(flow_of(MAPS[3]).transforms))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="affine_map"):
        NaiveMAF.of(flow) if hasattr(NaiveMAF, "of") else flow.to_naive()


def test_elementwise_affine(tmp_path: Path) -> None:
    shift, log_scale = normal(5), normal(5, seed=1)
    transform, x = fastmaf.ElementwiseAffine(shift, log_scale), normal(3, 5, seed=2)
    z, ladj = transform(x)
    torch.testing.assert_close(z, x * log_scale.exp() + shift)
    assert ladj.shape == (3,) and bool((ladj == log_scale.sum()).all())
    back, ladj_back = transform.inverse(z)
    torch.testing.assert_close(back, x)
    assert torch.equal(ladj_back, -ladj)
    flow = fastmaf.Flow(5, [transform])
    assert_close("values", -flow.nll_per_dim(x).sum(1), flow.log_prob(x))
    flow.save(tmp_path / "flow.safetensors")
    assert torch.equal(fastmaf.load(tmp_path / "flow.safetensors").log_prob(x), flow.log_prob(x))
    with pytest.raises(ValueError, match=r"one length; found \[5\], \[4\]"):
        fastmaf.ElementwiseAffine(shift, log_scale[:4])


def test_inverted_blocks() -> None:
    """An inverse autoregressive flow: the density of its samples, and its gradients."""
    made = fastmaf.MADE(6, 16, generator=generator(0), dtype=F64)
    block = fastmaf.AffineAutoregressive(made)
    flow = fastmaf.Flow(6, [fastmaf.Inverted(block)])
    x, log_prob = flow.sample_and_log_prob(4, generator=generator(1))
    assert_close("values", flow.log_prob(x), log_prob)
    z, ladj = block(x)
    assert error(flow.transforms[0].inverse(x)[0], z) == 0  # type: ignore[operator, union-attr]
    grads = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    back, ladj = block._inverse_by_modules(x, None)
    density = ladj - 0.5 * back.square().sum(1)
    for found, expected in zip(grads, torch.autograd.grad(density.sum(), list(flow.parameters())), strict=True):
        assert_close("gradients", found, expected)
    assert build(3, dtype=F32) is not None
