"""What autoregressive transforms have in common: a MADE gives each dimension the parameters of an element-wise map."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmaf import hooks
from fastmaf.kernels import composite
from fastmaf.kernels.flow.network_inverse import network_inverse
from fastmaf.kernels.flow.torch.network import Network
from fastmaf.kernels.flow.torch.solve import solve
from fastmaf.kernels.op import records_gradients
from fastmaf.nn import MADE
from fastmaf.nn.dropout import without_dropout
from fastmaf.transforms.base import Transform
from fastmaf.transforms.fallback import warn_of_layers
from fastmaf.transforms.implicit import implicit_inverse


class Autoregressive(Transform):
    """An element-wise map whose parameters for dimension d are the outputs of a network that has seen those before d.

    Forward, the network is called. The inverse takes one step per distinct degree of the last hidden layer and reads
    each weight once, in plain torch; its backward pass is a triangular solve, of about the arithmetic and the memory of
    one backward pass of the network. Where modules must be called, the inverse takes one pass of the network per step,
    and its backward pass one backward pass per step, which cannot be differentiated again, other than by
    ``torch.func``. Within ``torch.compile`` the steps are unrolled. Dropout is ignored: it inverts the transform in
    evaluation mode.

    Subclasses define the map, which has no parameters of its own.
    """

    made: MADE
    map_without_op: str | None = None
    """What the map is called, where no op of whole blocks computes it."""

    def map_forward(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and log dz/dx ``[...]`` for x ``[...]`` and the outputs for it ``[..., outputs]``."""
        raise NotImplementedError

    def map_inverse(self, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x and log dx/dz ``[...]`` for z ``[...]`` and the outputs for it ``[..., outputs]``."""
        raise NotImplementedError

    @property
    def context_features(self) -> int:  # type: ignore[override]
        """The size of the network's context, 0 for none."""
        return getattr(self.made, "context_features", 0)  # also of networks of other classes

    @property
    def calls_modules(self) -> bool:
        """Whether the network must be called as a module, because of hooks, parametrisations or other classes."""
        return hooks.any_global() or type(self.made) is not MADE or self.made.calls_modules

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._warn_of_layers(x)
        z, terms = self.map_forward(x, self._outputs(x, context))
        return z, terms.sum(1)

    def forward_per_dim(self, x: Tensor, terms: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._warn_of_layers(x)
        z, own = self.map_forward(x, self._outputs(x, context))
        return z, terms - own

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._warn_of_layers(z)
        # Within torch.compile too, since the steps write in place, and read pointers.
        if torch.compiler.is_dynamo_compiling() or (self.calls_modules and composite.needed()):
            return self._inverse_by_modules(z, context)
        if not self.calls_modules:
            return network_inverse(z, self.made.network(context), self.map_inverse, self.steps)
        with torch.no_grad():
            x, ladj = self._inverse_by_modules(z, context)
        if not records_gradients([z, *self.made.parameters(), *([] if context is None else [context])]):
            return x, ladj

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            with without_dropout(self.made):
                return self.map_forward(x, self._outputs(x, context))

        return implicit_inverse(forward, x, z, self._finished())

    def steps(self, z: Tensor, network: Network) -> tuple[Tensor, Tensor]:
        """Computes the inverse, level by level, without gradients."""
        return solve(z, network, self.map_inverse)

    def _outputs(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns the network's outputs ``[N, D, outputs]``; networks of other classes may take no context."""
        result: Tensor = self.made(x) if context is None else self.made(x, context)
        return result

    def _warn_of_layers(self, x: Tensor) -> None:
        if type(self.made) is MADE:
            warn_of_layers(self.made, self.map_without_op, x)

    def _finished(self) -> list[int]:
        """Returns the number of dimensions that are finished after each step; networks may be of other classes."""
        return self.made.finished if isinstance(self.made, MADE) else self.made.schedule[:, 0].tolist()

    def _inverse_by_modules(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverts with one call of the network per level."""
        x, terms = torch.zeros_like(z), torch.zeros_like(z)
        dimension = torch.arange(self.features, device=z.device)
        with without_dropout(self.made):
            for finished in self._finished():
                found, terms = self.map_inverse(z, self._outputs(x, context))
                # Unfinished dimensions are zero: they could overflow, and infinity times a weight of zero is NaN.
                x = torch.where(dimension < finished, found, 0)
        return x, terms.sum(1)
