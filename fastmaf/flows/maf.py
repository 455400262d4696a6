"""Masked autoregressive flows (MAF)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastmaf.bases import Base
from fastmaf.degrees import (
    DegreeKind,
    OrderKind,
    check_features,
    hidden_degrees,
    layer_sizes,
    orders,
    warn_if_disconnected,
)
from fastmaf.flows.base import Flow
from fastmaf.kernels import AffineMap
from fastmaf.nn import MADE, Init
from fastmaf.transforms import ActNorm, AffineAutoregressive, BatchNorm, GaussianWhitening, Permutation, Transform
from fastmaf.validation import as_integer, default_device

M = TypeVar("M", bound="MAF")
Normalization: TypeAlias = Literal["batch", "act"]
_NORMALIZATIONS: dict[str, type[ActNorm | BatchNorm]] = {"batch": BatchNorm, "act": ActNorm}


class MAF(Flow):
    """A masked autoregressive flow: affine autoregressive blocks, each with an order of the dimensions::

        z[d] = (x[d] − shift[d]) exp(−log_scale[d]),    shift[d], log_scale[d] = MADE(x[0..d−1])

    in the order of the block. Where consecutive blocks have different orders, a ``Permutation`` stands between them,
    and a last one restores the order of x, so that ``z[..., d]`` belongs to ``x[..., d]``. Sampling costs the
    arithmetic of one forward pass.

    The defaults are meant for ``torch.optim.Adam`` with a learning rate of 1e-3 up to about a thousand dimensions, and
    of 2e-5 for images of 12,288. The bound on log-scales was chosen by measurement (``bench/stability.py``): a clamp at
    ±5 in every block gives a higher held-out NLL, and lets the density of outliers vanish.

    Args:
        features: D.
        blocks: number of affine autoregressive blocks.
        hidden_features: number of units of each hidden layer of the MADE of a block; an integer gives one hidden layer.
        degrees: degrees of the hidden units: ``"spread"``, ``"random"``, ``"cyclic"``, one tensor per hidden layer for
            all blocks, or one such list per block. See ``fastmaf.degrees.hidden_degrees``.
        order: ``"natural"``, ``"alternate"`` (reversed in every second block), ``"random"``, or one permutation per
            block.
        log_scale_bound: log-scales of each block stay within ± this many nats; None leaves them free. ``"auto"`` is
            ``max(1, 7 / blocks)``, so that up to 7 blocks reach ±7 nats together.
        levels: maximum number of distinct hidden degrees. Sampling takes at most ``levels + 1`` dependent steps per
            block.
        seed: makes degrees, orders and parameters repeatable; None draws from torch's global generator.
        soft_bound: bound the log-scales by ``B tanh(u / B)`` instead of by a clamp, which has no gradient beyond the
            bound.
        activation: of the hidden layers; see ``MADE``. Blocks with other activations than ``"relu"`` and
            ``"identity"``, and those with ``residual`` or a context, are slower: see the guide on density estimation.
        residual: residual blocks in the networks, of ``hidden_features`` such as ``(64, 64, 64)``; see ``MADE``.
        context_features: C, the size of the context of a conditional flow; 0 for none.
        dropout: the probability with which a hidden unit is zero in training mode. ``inverse`` and ``sample`` ignore
            it.
        init: ``"linear"``; ``"identity"``: output layers start at zero, so that z = x before training; or
            ``"mirrored"``: networks start nearly linear, with small outputs, which is meant for many correlated
            dimensions: see the guide "Densities beside other libraries".
        strict: False uses the leaky output mask of the published notebook, for comparison; such a model has no
            inverse.
        whitening: rank of a ``GaussianWhitening`` in front of the blocks, ``transforms[0]``, which is the identity
            until its ``fit_`` is called. None: no whitening.
        normalization: ``"batch"`` puts a ``BatchNorm`` after each block, ``"act"`` an ``ActNorm``, which the first
            batch in training starts. None: neither; consecutive blocks then run as one op, which is faster.
        base: the distribution of z, which is converted to ``device`` and ``dtype``; None for the standard normal one.
            See ``Flow``.
        device: the device of the parameters. ``"meta"`` allocates nothing, for ``memory_estimate`` of flows that may be
            too large for the machine.
        dtype: the dtype of the parameters.
        validate_args: as ``Flow``.
        affine_map: the element-wise map of the blocks, an ``AffineMap`` or the name of a library for its map
            (``"nflows"``, ``"normflows"``, ``"zuko"``), in place of the one above. The bound of log-scales is part of
            it: ``log_scale_bound`` and ``soft_bound`` must then be left at their defaults.

    Raises:
        TypeError, ValueError: an argument is out of range; the message states what was expected and found.

    Warns:
        ConnectivityWarning: the degrees leave inputs unread or outputs unconditioned.

    References:
        Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation.

    Example:
        >>> flow = fastmaf.MAF(features=2, blocks=3, hidden_features=(64, 64), seed=0)
        >>> x = torch.randn(256, 2) * torch.tensor([1.0, 3.0])
        >>> optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        >>> for _ in range(20):
        ...     loss = -flow.log_prob(x).mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """

    _class_in_files = "MAF"

    def __init__(
        self,
        features: int,
        blocks: int = 7,
        hidden_features: int | Sequence[int] = (512, 512),
        *,
        degrees: DegreeKind | Sequence[Tensor] | Sequence[Sequence[Tensor]] = "spread",
        order: OrderKind | Sequence[Tensor] = "alternate",
        log_scale_bound: float | Literal["auto"] | None = "auto",
        levels: int | None = None,
        seed: int | None = None,
        soft_bound: bool = True,
        activation: str | Sequence[str] = "relu",
        residual: bool = False,
        context_features: int = 0,
        dropout: float = 0.0,
        init: Init = "linear",
        strict: bool = True,
        whitening: int | None = None,
        normalization: Normalization | None = None,
        base: Base | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        validate_args: bool | None = None,
        affine_map: AffineMap | str | None = None,
    ) -> None:
        features, blocks = check_features(features), as_integer("blocks", blocks)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1; found {blocks}")
        if normalization not in (None, *_NORMALIZATIONS):
            known = ", ".join(map(repr, _NORMALIZATIONS))
            raise ValueError(f"normalization must be one of {known}, or None; found {normalization!r}")
        hidden_features = layer_sizes(hidden_features)
        generator = None if seed is None else torch.Generator().manual_seed(as_integer("seed", seed))
        order_of_block = orders(order, features, blocks, generator=generator)
        # Degrees are drawn before weights, so that they do not depend on dtype and init; both are drawn on the CPU, so
        # that a seed gives the same model on every device.
        drawn = [
            hidden_degrees(kind, features, hidden_features, levels=levels, residual=residual, generator=generator)
            for kind in _degrees_by_block(degrees, blocks)
        ]
        # What a residual block reads and is read by, the layer that it is added to is, too.
        warn_if_disconnected(features, [layers[:1] for layers in drawn] if residual else drawn)
        where = default_device() if device is None else torch.device(device)
        built_on = "meta" if where.type == "meta" else "cpu"
        make: dict[str, Any] = {"device": built_on, "dtype": dtype}
        options: dict[str, Any] = {"strict": strict, "init": init, "generator": generator, **make}
        options |= {"activation": activation, "residual": residual, "dropout": dropout}
        options["context_features"] = context_features
        networks = [MADE(features, hidden_features, degrees=d, **options) for d in drawn]
        map_options = _map_options(affine_map, log_scale_bound, soft_bound, blocks)
        affine = [self._turned(AffineAutoregressive(made, **map_options)) for made in networks]
        first = [] if whitening is None else [GaussianWhitening(features, whitening, **make)]
        if normalization is None:
            transforms = [*first, *interleave_permutations(affine, order_of_block)]
        else:
            parts = [part for block in affine for part in (block, _NORMALIZATIONS[normalization](features, **make))]
            order_of_part = [order for order in order_of_block for _ in (0, 1)]
            transforms = [*first, *interleave_permutations(parts, order_of_part)]
        if isinstance(base, Base):  # else Flow refuses it
            base.to(networks[0].output.bias.dtype)
        super().__init__(features, transforms, base, validate_args=validate_args)
        self.to(where)

    @staticmethod
    def _turned(block: AffineAutoregressive) -> Transform:
        """Returns the transform of this class of flows for a block."""
        return block

    @classmethod
    def from_transforms(cls: type[M], features: int, transforms: Iterable[Transform], base: Base | None = None) -> M:
        """Builds a MAF from existing transforms.

        Args:
            features: D.
            transforms: the transforms, in the order in which they are applied to x.
            base: as ``Flow``.

        Raises:
            TypeError, ValueError: as ``Flow``.

        Example:
            >>> block = fastmaf.AffineAutoregressive(fastmaf.MADE(3, 16))
            >>> fastmaf.MAF.from_transforms(3, [block]).sample(2).shape
            torch.Size([2, 3])
        """
        flow = cls.__new__(cls)
        Flow.__init__(flow, features, transforms, base)
        return flow


def _degrees_by_block(degrees: Any, blocks: int) -> Sequence[DegreeKind | Sequence[Tensor]]:
    if isinstance(degrees, str) or not len(degrees) or isinstance(degrees[0], Tensor):
        return [degrees] * blocks  # type: ignore[list-item]  # a kind, or one tensor per hidden layer for all blocks
    if len(degrees) != blocks:
        raise ValueError(f"degrees given per block need one entry per block: expected {blocks}, found {len(degrees)}")
    return list(degrees)


def _map_options(affine_map: AffineMap | str | None, bound: Any, soft: bool, blocks: int) -> dict[str, Any]:
    """Returns the arguments of ``AffineAutoregressive`` that describe the element-wise map."""
    if affine_map is None:
        bound = max(1.0, 7 / blocks) if bound == "auto" else bound
        return {"log_scale_bound": bound, "soft_bound": soft and bound is not None}
    if bound != "auto" or not soft:
        raise ValueError(
            "affine_map contains the bound of log-scales: leave log_scale_bound and soft_bound at their defaults, or "
            f"affine_map; found log_scale_bound={bound!r}, soft_bound={soft!r} beside affine_map={affine_map!r}"
        )
    if isinstance(affine_map, str):
        return {"affine_map": AffineMap.named(affine_map)}
    if not isinstance(affine_map, AffineMap):
        raise TypeError(f"affine_map must be an AffineMap, the name of a library or None; found {affine_map!r}")
    return {"affine_map": affine_map}


def interleave_permutations(blocks: Sequence[Transform], order_of_block: Sequence[Tensor]) -> list[Transform]:
    """Returns the blocks with a ``Permutation`` where the order changes, and a last one that restores the order of x.

    Args:
        blocks: transforms that process the dimensions in the order in which they are given.
        order_of_block: the order of the dimensions of x for each block, int64 ``[D]``.
    """
    natural = torch.arange(order_of_block[0].numel(), device="cpu")
    frame = natural  # frame[k]: the dimension of x at position k
    result: list[Transform] = []
    for block, order in zip((*blocks, None), (*order_of_block, natural), strict=True):
        if not torch.equal(frame, order):
            # By NumPy, on this thread: torch would wait for others longer than this takes.
            result.append(Permutation(torch.from_numpy(np.argsort(frame.numpy())[order.numpy()])))
            frame = order
        if block is not None:
            result.append(block)
    return result
