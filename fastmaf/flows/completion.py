"""Completion: exact samples of some dimensions given the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaf.bases import StandardNormal
from fastmaf.nn.dropout import without_dropout
from fastmaf.transforms import (
    ActNorm,
    AffineAutoregressive,
    BatchNorm,
    ElementwiseAffine,
    Inverted,
    Logit,
    MonotonicRQS,
    Permutation,
    Transform,
)
from fastmaf.transforms.base import given
from fastmaf.validation import as_sizes, as_tensor, broadcast_batches, check_finite, check_samples, validates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ELEMENTWISE = (ActNorm, BatchNorm, ElementwiseAffine, Logit)  # each number of z depends on one of x alone


def complete(
    flow: Any,
    x: Tensor | ArrayLike,
    known: Tensor | ArrayLike,
    shape: int | Sequence[int],
    context: Tensor | ArrayLike | None,
    generator: torch.Generator | None,
    seed: int | None,
    start: int,
) -> Tensor:
    """Implements ``Flow.complete``.

    Where the known dimensions come first in every block, z of these is a function of x of these alone, f restricted to
    them, and the rest of z is independent of it:

        z_known = f(x)_known,    z_rest ~ N(0, I),    x = f⁻¹(z)
    """
    x, mask = as_tensor("x", x, flow._like()), _as_mask(known, flow.features)
    flow._check("x", x)
    transforms = flow._transforms()
    masks = [known.to(x.device) for known in known_along(transforms, mask)]
    if not flow.has_standard_base and 0 < int(mask.sum()) < flow.features:
        found = flow if type(flow.base) is StandardNormal else flow.base  # a flow may replace the density of its base
        raise ValueError(f"complete needs a standard normal base; found that of {type(found).__name__}")
    sizes = as_sizes("shape", shape)
    of: Tensor | None = flow._as_context(context)
    if of is not None:
        batch = broadcast_batches("x", x, of)
        x, of = x.expand(*batch, x.shape[-1]), of.expand(*batch, of.shape[-1])
    batch, noise = flow._base_sample((*sizes, *x.shape[:-1]), generator, seed, start)
    # What is not known may hold anything, and becomes anything in between: zero keeps it finite.
    z = torch.where(masks[0], x, 0).reshape(-1, flow.features)
    if validates(flow.validate_args, z):
        check_finite("the known part of x", z)
    rows = None if of is None else of.reshape(-1, of.shape[-1])
    with without_dropout(flow):  # it acts on the direct pass of blocks: forward, or of inverted ones inverse
        for transform, after in zip(transforms, masks[1:], strict=True):
            z = torch.where(after, transform(z, *given(transform, rows))[0], 0)
        z = torch.where(masks[-1], z.expand(*sizes, *z.shape).reshape(noise.shape), noise)
        if of is not None:
            rows = of.expand(*sizes, *of.shape).reshape(-1, of.shape[-1])
        found, _ = flow._inverse_of_noise(z, rows)
    if validates(flow.validate_args, found):
        check_samples(flow, z, found, context=rows)
    return torch.where(masks[0], x, found.reshape(*batch, flow.features))


def _as_mask(known: Tensor | ArrayLike, features: int) -> Tensor:
    try:
        mask = torch.as_tensor(known, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"known must be a mask of bool [{features}]; found {known!r}") from None
    if mask.dtype != torch.bool or mask.shape != (features,):
        raise ValueError(f"known must be a mask of bool [{features}]; found {mask.dtype} {list(mask.shape)}")
    return mask


def known_along(transforms: Sequence[Transform], known: Tensor) -> list[Tensor]:
    """Returns which numbers are known before each transform and after the last.

    Args:
        transforms: in the order in which they are applied to x.
        known: bool ``[D]``, on the CPU.

    Raises:
        ValueError: a transform makes known dimensions depend on others, or is a normalisation in training.
        NotInvertibleError: a block has a leaky output mask.
    """
    all_or_none = bool(known.all()) or not bool(known.any())
    dims = torch.arange(len(known), device="cpu")  # the dimension of x at each place
    result = [known]
    for i, transform in enumerate(transforms):
        name = f"transforms[{i}] ({type(transform).__name__})"
        inner: Transform | None = transform
        while isinstance(inner, Inverted):
            inner = inner.transform
        if inner is not None and inner.needs_eager:
            raise ValueError(
                f"{name} changes with the batches that it maps in training: call flow.eval() before complete"
            )
        if type(inner) is Permutation:
            dims = transform(dims[None].to(inner.permutation.device))[0][0].cpu()
        elif isinstance(inner, (AffineAutoregressive, MonotonicRQS)):
            if isinstance(inner, AffineAutoregressive):
                inner.check_invertible()
            _check_block(name, inner.made.schedule[:, 0], dims, known)
        elif type(inner) not in _ELEMENTWISE and not all_or_none:
            raise ValueError(
                f"{name} may make the known dimensions depend on the others: complete needs autoregressive blocks, "
                "permutations and element-wise maps"
            )
        result.append(known[dims])
    return result


def _check_block(name: str, finished: Tensor, dims: Tensor, known: Tensor) -> None:
    """Raises ValueError if known dimensions depend on others.

    Args:
        name: of the block.
        finished: how many places are finished after each step of its inverse; those of one step depend on the places of
            the steps before alone.
        dims: the dimension of x at each place.
        known: which of these are known.
    """
    known = known[dims]
    unknown = (~known).nonzero().flatten()
    if not len(unknown) or not bool(known.any()):
        return
    first, last = int(unknown[0]), int(known.nonzero()[-1])
    before = finished[finished <= last]  # what the last known place depends on
    if len(before) and first < int(before[-1]):
        raise ValueError(
            f"{name} makes dimension {int(dims[last])}, which is known, depend on dimension {int(dims[first])}, which "
            "is not: the known dimensions must come first in the order of every block. A MAF of order='natural' takes "
            "the first k as known, one with other orders those k with which all of them begin; blocks in "
            "order='alternate' have none in common"
        )
