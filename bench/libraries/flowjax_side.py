"""flowjax: ``masked_autoregressive_flow`` as its documentation builds it, on JAX's CPU backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy
import optax
import paramax
import torch
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train.losses import MaximumLikelihoodLoss
from flowjax.train.train_utils import step as flowjax_step
from torch import Tensor, nn
from torch.nn import functional

from fastmaf.bench.libraries.base import LEARNING_RATE, Library, Size
from fastmaf.bench.libraries.converted import ConvertedFlow, DenseBlock

SMALLEST_SCALE = 1e-2


class Flowjax(Library):
    """flowjax with its own training step and optax's Adam; every call is compiled by JAX and waited for."""

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        self.key = jax.random.key(seed)
        model = masked_autoregressive_flow(
            self.key,
            base_dist=paramax.non_trainable(Normal(jnp.zeros(size.features))),
            flow_layers=size.blocks,
            nn_width=size.one_width("flowjax"),
            nn_depth=len(size.hidden),
        )
        # As in its fit_to_data.
        self.parameters, self.static = equinox.partition(
            model, equinox.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
        )
        jax.block_until_ready(self.parameters)
        self.optimizer = optax.adam(LEARNING_RATE)
        self.loss = MaximumLikelihoodLoss()
        self._log_prob = equinox.filter_jit(lambda model, x: model.log_prob(x))
        self._sample = equinox.filter_jit(lambda model, key, n: model.sample(key, (n,)))
        self._passes = equinox.filter_jit(_passes)
        self._last: Any = None  # the last block's bijection with its masks applied

    @property
    def model(self) -> Any:
        """The flow with its parameters."""
        return equinox.combine(self.parameters, self.static)

    def log_prob(self, x: Tensor) -> Tensor:
        return _torch(self._log_prob(self.model, _jax(x)))

    def new_optimizer(self) -> None:
        self._last = None  # about to change
        self.state = self.optimizer.init(self.parameters)

    def train_step(self, x: Tensor) -> None:
        self._last = None
        self.parameters, self.state, _ = flowjax_step(
            self.parameters, self.static, _jax(x), optimizer=self.optimizer, opt_state=self.state, loss_fn=self.loss
        )
        jax.block_until_ready(self.parameters)

    def sample(self, n: int) -> Tensor:
        self.key, key = jax.random.split(self.key)
        return _torch(self._sample(self.model, key, n))

    def inverse(self, z: Tensor, passes: int) -> Tensor:
        if self._last is None:  # masked once, as for all D passes of a sample
            self._last = _last_block(self._layers())
        return _torch(self._passes(self._last, _jax(z), passes))

    def _layers(self) -> Any:
        """Returns the stacked layers, each a masked autoregressive bijection and a permutation."""
        return self.model.bijection.bijection.bijection

    def counterpart(self) -> nn.Module:
        autoregressive, permutation = self._layers().bijections
        layers = autoregressive.masked_autoregressive_mlp.layers
        weights = [_torch(paramax.unwrap(layer.weight)) for layer in layers]
        biases = [_torch(layer.bias) for layer in layers]
        # The network's outputs are added to the parameters of the identity: shift 0, and the raw scale of scale 1.
        biases[-1] = biases[-1].clone()
        biases[-1][:, 1::2] += math.log(math.expm1(1 - SMALLEST_SCALE))
        features, hidden = self.size.features, self.size.hidden
        degrees = [torch.arange(h) % (features - 1) + 1 for h in hidden]
        order, blocks = torch.arange(features), []
        # Of two dimensions it makes no permutation but a flip.
        after = _torch(permutation.permutation[0]).long() if features > 2 else [order.flip(0)] * self.size.blocks
        for i, next_order in enumerate(after):
            blocks.append(DenseBlock([w[i] for w in weights], [b[i] for b in biases], degrees, order))
            order = order[next_order]
        return ConvertedFlow(blocks, lambda raw: torch.log(functional.softplus(raw) + SMALLEST_SCALE))

    def save(self, path: Path) -> None:
        equinox.tree_serialise_leaves(path, self.parameters)

    def load(self, path: Path) -> None:
        self._last = None
        self.parameters = equinox.tree_deserialise_leaves(path, self.parameters)
        jax.block_until_ready(self.parameters)


@equinox.filter_jit
def _last_block(layers: Any) -> Any:
    """Returns the last of the stacked layers' autoregressive bijection with the masks applied to its weights."""
    last = jax.tree.map(lambda leaf: leaf[-1] if equinox.is_array(leaf) else leaf, layers)
    return paramax.unwrap(last).bijections[0]


def _passes(block: Any, z: Any, count: int) -> Any:
    """Does ``count`` of the steps of the block's own inverse, a scan over all dimensions."""

    def invert(row: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            return block.inv_scan_fn(carry, None, condition=None)

        (x, _), _ = jax.lax.scan(body, (row, 0), None, length=count)
        return x

    return jax.vmap(invert)(z)


def _jax(x: Tensor) -> Any:
    return jnp.asarray(x.numpy())


def _torch(x: Any) -> Tensor:
    return torch.from_numpy(numpy.array(x))
