"""Normalizing flows: sequences of transforms over a base distribution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmaf.bases import StandardNormal, base_config
from fastmaf.flows.distribution import FlowDistribution
from fastmaf.flows.inference import inference_copy
from fastmaf.flows.sampling import Sampler
from fastmaf.io.model_card import ModelCard
from fastmaf.io.write_flow import write_flow
from fastmaf.kernels.autocast import outside_autocast
from fastmaf.naive import NaiveMAF
from fastmaf.sharing import check_parts
from fastmaf.transforms import transform_config

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Flow(Sampler):
    """A normalizing flow: invertible transforms f = f_k ∘ … ∘ f_1 from data x to z, of a base distribution q::

        log p(x) = log q(f(x)) + log |det df/dx|

    ``log_prob``, ``nll_per_dim``, ``forward`` and ``inverse`` accept tensors ``[..., D]`` of the dtype and device of
    the flow, and NumPy arrays and nested lists, which are converted to these. Each vector of D numbers is called a row;
    rows are numbered in row-major order. The transforms themselves operate on ``[N, D]``. Densities and
    log-determinants are in nats.

    A flow with transforms that take a context c is a conditional density p(x | c). Its methods then need a ``context``
    ``[..., C]``, whose batch shape is broadcast with that of x or z; transforms without a context ignore it.

    Consecutive affine autoregressive blocks run as one op. Blocks with hooks, pruned or parametrised weights or modules
    of other classes are called as modules instead, which is slower: ``inverse`` then calls the network of a block once
    per level.

    Ambient ``torch.autocast`` has no effect, forward or backward, since half precision would change densities by nats.
    Within an autocast region, bfloat16 and float16 inputs are converted to the dtype of the flow.

    As with every PyTorch model, a process that is forked after an op ran on several threads hangs at its next such op.
    Start processes with the method ``"spawn"`` or ``"forkserver"``, fork before the first op, or call
    ``torch.set_num_threads(1)`` first.

    Args:
        features: D.
        transforms: the transforms, in the order in which they are applied to x.
        base: q, such as a ``fastmaf.StudentT``, of the dtype and device of the transforms; None for the standard normal
            distribution, with which alone blocks and base run as one op.
        validate_args: whether values are checked, as in ``torch.distributions``; also an attribute. If so, methods
            raise ValueError for arguments that are not finite, and FloatingPointError for densities that are NaN and
            for samples that are not finite. Otherwise such numbers are returned; they affect only their own row. None
            checks on the CPU only, since checking on a GPU would wait for it. Values are never checked within
            ``torch.compile``, a trace, a CUDA graph or a functorch transform.

    Raises:
        TypeError: a transform is not a ``fastmaf.Transform``, or the base not a ``fastmaf.Base``.
        ValueError: the transforms, the base and the flow have different numbers of features, or another dtype, or
            transforms take contexts of different sizes.

    References:
        Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan 2021, Normalizing Flows for Probabilistic
        Modeling and Inference.

    Example:
        >>> made = fastmaf.MADE(features=3, hidden_features=16)
        >>> flow = fastmaf.Flow(3, [fastmaf.Logit(3), fastmaf.AffineAutoregressive(made)])
        >>> flow.log_prob(torch.rand(5, 3)).shape
        torch.Size([5])
        >>> flow.sample((2, 4)).shape
        torch.Size([2, 4, 3])

        A conditional flow:

        >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16, context_features=2)
        >>> context = torch.randn(5, 2)
        >>> flow.log_prob(torch.randn(5, 3), context).shape
        torch.Size([5])
        >>> flow.sample(10, context).shape
        torch.Size([10, 5, 3])
    """

    _class_in_files = "Flow"

    @outside_autocast
    def distribution(
        self, context: Tensor | ArrayLike | None = None, *, validate_args: bool | None = None
    ) -> FlowDistribution:
        """Returns the flow as a ``torch.distributions.Distribution``.

        Args:
            context: ``[*batch, C]``, what the flow is conditioned on, which makes ``batch`` the batch shape; None for a
                flow without a context.
            validate_args: as of ``torch.distributions``.

        Raises:
            TypeError, ValueError: as ``FlowDistribution``.

        Example:
            >>> flow = fastmaf.MAF(features=2, blocks=2, hidden_features=16)
            >>> prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
            >>> guide = flow.distribution()
            >>> z = guide.rsample((64,))
            >>> (guide.log_prob(z) - prior.log_prob(z)).mean().backward()
        """
        return FlowDistribution(self, context, validate_args=validate_args)

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        *,
        card: str | os.PathLike[str] | ModelCard | None = None,
    ) -> None:
        """Writes the flow to a safetensors file; ``fastmaf.load`` reads it.

        The file is replaced atomically: a crash leaves either the old file or the new one. Blocks, layers and
        parameters that are used in several places are shared again after loading.

        Args:
            path: the file, usually named ``*.safetensors``.
            metadata: further strings; ``fastmaf.load_with_extras`` returns them.
            extras: further tensors; ``fastmaf.load_with_extras`` returns them.
            card: a file for a model card in Markdown, in which architecture, size and versions are filled in and the
                rest is left to you; a ``fastmaf.io.model_card.ModelCard`` fills in more.

        Raises:
            OutputError: the card would replace a card that was edited, or another file; nothing was written.
            ValueError: ``metadata`` contains the reserved key ``"fastmaf"``, a tensor of the flow is not finite or
                on the device ``meta``, or two tensors of the flow overlap in memory without being the same tensor.
            TypeError: the class of a transform is not in ``fastmaf.transforms.TRANSFORMS``, that of the base not in
                ``fastmaf.bases.BASES``, or a module is pruned, parametrised or of another class.
            OSError: the file cannot be written; an earlier file stays intact.

        Example:
            >>> import pathlib, tempfile
            >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     flow.save(pathlib.Path(folder, "flow.safetensors"), metadata={"unit": "mm"})

            With a model card:

            >>> with tempfile.TemporaryDirectory() as folder:
            ...     card = pathlib.Path(folder, "MODEL_CARD.md")
            ...     flow.save(pathlib.Path(folder, "flow.safetensors"), card=card)
            ...     "| Hidden units of a block | (16) |" in card.read_text("utf-8")
            True
        """
        config = self.config()
        if card is not None:
            card = card if isinstance(card, ModelCard) else ModelCard(card)
            card.check(path)
        write_flow(self, config, path, metadata, extras)
        if card is not None:
            card.write(self, config, path)

    def config(self) -> dict[str, Any]:
        """Returns the configuration of the flow as it is saved: class, features, transforms and, unless it is the
        standard normal one, base, in plain JSON types.

        Raises:
            TypeError: the class of a transform is not in ``fastmaf.transforms.TRANSFORMS``, that of the base not in
                ``fastmaf.bases.BASES``, or a module is pruned, parametrised or of another class.
        """
        check_parts(self)
        transforms = [transform_config(transform) for transform in self.transforms]
        base = {} if type(self.base) is StandardNormal else {"base": base_config(self.base)}
        return {"class": self._class_in_files, "features": self.features, "transforms": transforms, **base}

    def to_inference(self, dtype: torch.dtype = torch.bfloat16) -> Flow:
        """Returns a frozen copy for scoring and sampling, with weights stored in ``dtype``.

        The weights take half the memory as bfloat16 and a quarter as float8: 67 MB, not 268, of seven blocks of 12,288
        features and (512, 512) hidden units. Activations, biases and sums keep the dtype of the flow (float32). The
        copy is an exact flow: ``inverse`` inverts ``forward``. Its densities differ from the original's by the rounding
        of the weights, a relative 2⁻⁸ each at most with bfloat16 and 2⁻⁴ with float8: compare both on data before
        float8 is relied upon. In three trained models z changed by 0.3 to 0.8% with bfloat16 and by 5 to 15% with
        float8, norm-wise. Its parameters require no gradients.

        Only the Triton kernels read float8 weights. The native ones take bfloat16 weights, which are made of them at
        the first call and kept, so that on a CPU float8 saves space in files alone; the torch backend converts them in
        every call.

        Args:
            dtype: ``torch.bfloat16`` or ``torch.float8_e4m3fn`` for a float32 flow, or the dtype of the flow for a
                plain frozen copy.

        Raises:
            ValueError: another ``dtype``, or a weight that is to be float8 is not finite.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> flow.to_inference().sample(4).shape
            torch.Size([4, 3])
        """
        return inference_copy(self, dtype)

    def to_naive(self) -> NaiveMAF:
        """Returns a copy as a dense model, which multiplies masks and weights and inverts with one pass per dimension.

        It has no dropout.

        Raises:
            TypeError: the flow has transforms other than permutations and affine autoregressive blocks, or another base
                than the standard normal distribution.

        Example:
            >>> flow = fastmaf.MAF(features=3, blocks=2, hidden_features=16)
            >>> x = torch.randn(5, 3)
            >>> torch.allclose(flow.to_naive().log_prob(x), flow.log_prob(x), atol=1e-4)
            True
        """
        if not self.has_standard_base:
            raise TypeError(f"a naive MAF has a standard normal base; found {type(self.base).__name__}")
        return NaiveMAF.from_transforms(self.features, self._transforms())
