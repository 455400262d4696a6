"""Transforms in a row: a map of data ``[..., D]`` to z, and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmaf.flows.rows import are_rows, by_rows, tensor_like
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.nn import MADE, MaskedLinear, zero_padding_
from fastmaf.runs import Runs
from fastmaf.transforms import Transform
from fastmaf.validation import as_tensor, check_context, check_finite, validates

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Composition(nn.Module):
    """The composition f = f_k ∘ … ∘ f_1 of transforms: the part of a ``Flow`` that knows no distribution.

    It converts and checks arguments, gives ``[..., D]`` to the transforms as ``[N, D]``, and runs consecutive blocks
    as one op. Arguments and errors are those of ``Flow``.
    """

    validate_args: bool | None = None  # also of flows that were pickled without the attribute

    def __init__(self, features: int, transforms: Iterable[Transform], *, validate_args: bool | None = None) -> None:
        super().__init__()
        self.features = features
        self.validate_args = validate_args
        self._runs = Runs()
        self.transforms = nn.ModuleList(transforms)
        for i, transform in enumerate(self.transforms):
            if not isinstance(transform, Transform):
                raise TypeError(f"transform {i} must be a fastmaf.Transform; found {type(transform).__name__}")
            if transform.features != features:
                raise ValueError(
                    f"transform {i} ({type(transform).__name__}) has {transform.features} features, the flow {features}"
                )
        sizes = {transform.context_features for transform in self._transforms()} - {0}
        if len(sizes) > 1:
            raise ValueError(f"transforms take contexts of different sizes: found context_features {sorted(sizes)}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_runs", Runs())  # of flows that were pickled without it

    def _transforms(self) -> list[Transform]:
        # Not through nn.Module.__getattr__, which is slow.
        transforms = self._modules["transforms"]
        assert transforms is not None
        return [transform for transform in transforms._modules.values() if isinstance(transform, Transform)]

    @property
    def context_features(self) -> int:
        """C, the size of the context; 0 for a flow without one."""
        return max([0, *[transform.context_features for transform in self._transforms()]])

    @outside_autocast
    def forward(self, x: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Maps data to the base: z = f(x).

        Args:
            x: ``[..., D]``.
            context: ``[..., C]``, of a batch shape that broadcasts with that of ``x``; None for a flow without one.

        Returns:
            ``z`` ``[..., D]`` and ``ladj`` ``[...]``, ``log |det dz/dx|`` in nats.

        Raises:
            ValueError: the shape, dtype or device of ``x`` or ``context`` does not fit the flow, a context is missing
                or unexpected, or, with ``validate_args``, one of them is not finite.
            TypeError: ``x`` or ``context`` is neither a tensor nor an array of numbers.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> z, ladj = flow(torch.randn(5, 3))
            >>> z.shape, ladj.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        if not are_rows(x, context):
            return self._by_rows(Composition.forward, "x", x, context)
        self._check("x", x, finite=True)
        return self._runs.forward(self._transforms(), x, self._as_context(context))

    @outside_autocast
    def inverse(self, z: Tensor | ArrayLike, context: Tensor | ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Maps the base to data: x = f⁻¹(z), exactly.

        Dropout is ignored: in training mode it inverts the flow in evaluation mode.

        Args:
            z: ``[..., D]``.
            context: as ``forward``.

        Returns:
            ``x`` ``[..., D]`` and ``ladj`` ``[...]``, ``log |det dx/dz|`` in nats.

        Raises:
            ValueError, TypeError: as ``forward``.
            NotInvertibleError: as ``sample``.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x, ladj = flow.inverse(torch.randn(5, 3))
            >>> torch.allclose(flow(x)[1], -ladj, atol=1e-4)
            True
        """
        if not are_rows(z, context):
            return self._by_rows(Composition.inverse, "z", z, context)
        self._check("z", z, finite=True)
        return self._runs.inverse(self._transforms(), z, self._as_context(context))

    def _inverse_of_noise(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``inverse`` of noise, which needs no checks."""
        replaced = type(self).inverse is not Composition.inverse or "inverse" in vars(self)
        if not replaced:
            return self._unchecked_inverse(z, context)
        return self.inverse(z) if context is None else self.inverse(z, context)

    @outside_autocast
    def _unchecked_inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._runs.inverse(self._transforms(), z, context)

    def _check(self, name: str, x: Tensor, *, finite: bool = False) -> None:
        if x.shape[-1:] != (self.features,):
            raise ValueError(f"{name} must have shape [..., {self.features}]; found {list(x.shape)}")
        self._check_like(name, x)
        if finite and validates(self.validate_args, x):
            check_finite(name, x)

    def _check_like(self, name: str, x: Tensor) -> None:
        like = self._like()
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} must be {like.dtype} on {like.device}, like the flow; found {x.dtype} on {x.device}"
            )

    def _as_context(self, context: Tensor | ArrayLike | None) -> Tensor | None:
        """Returns a context ``[..., C]`` as a tensor, after checks; that one is missing is found by ``given``."""
        if context is None:
            return None
        context = as_tensor("context", context, self._like())
        check_context(context, self.context_features)
        self._check_like("context", context)
        if validates(self.validate_args, context):
            check_finite("context", context.reshape(-1, context.shape[-1]))
        return context

    def _by_rows(
        self, method: Callable[[Any, Tensor, Tensor | None], Any], name: str, x: Tensor | ArrayLike, context: Any
    ) -> Any:
        """Calls a method of rows, after checks of shapes and types: it checks values itself."""
        x = as_tensor(name, x, self._like())
        self._check(name, x)
        return by_rows(lambda rows, of: method(self, rows, of), name, x, self._as_context(context))

    def _like(self) -> Tensor:
        """Returns a tensor of the flow's dtype and device, not a weight that ``to_inference`` stored in fewer bits."""
        return tensor_like(self)

    @property
    def visible_weights(self) -> int:
        """Number of weights that the masks let through."""
        return sum(layer.layout.visible for layer in self._layers())

    @property
    def stored_weights(self) -> int:
        """Number of stored weights: the visible ones and padding."""
        return sum(layer.layout.numel for layer in self._layers())

    def zero_padding_(self) -> None:
        """Sets the padding of all packed weights to zero.

        Ops do so before they read a weight, and ``state_dict`` does before it returns one. Call it after writing to
        parameters where other code reads ``weight``, such as a CUDA graph.
        """
        zero_padding_(self._layers())

    def _layers(self) -> list[MaskedLinear]:
        return [layer for made in self._mades() for layer in made.layers]

    def _mades(self) -> list[MADE]:
        return [module for module in self.modules() if isinstance(module, MADE)]

    def _saved_numel(self, n: int) -> int:
        return self._runs.saved_numel(self._transforms(), n)
