"""What every side of a benchmark can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LEARNING_RATE = 1e-4


class Size(NamedTuple):
    """The size of a flow: D, the units of each hidden layer of a block, and how many blocks.

    ``levels`` bounds the distinct hidden degrees of fastmaf's flow; the others know no such thing.
    """

    features: int
    hidden: tuple[int, ...]
    blocks: int
    levels: int | None = None

    @property
    def dense_weights(self) -> int:
        """Weights of all layers, whether a mask lets them through or not."""
        widths = (self.features, *self.hidden, 2 * self.features)
        return self.blocks * sum(a * b for a, b in zip(widths, widths[1:], strict=False))


class Side(ABC):
    """One way of running a masked autoregressive flow, as the users of a library would run it.

    Building it draws its weights at random. Batches are float32 tensors ``[N, D]`` on its device.

    Attributes:
        inverts_by_passes: a sample takes D passes of the whole network a block, so that a few of them tell how long all
            would take.
        trains: whether it can.
        loads_into_itself: whether ``load`` needs a model of the same shape, or builds it.
    """

    inverts_by_passes: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    loads_into_itself: ClassVar[bool] = True
    size: Size
    seed: int
    device: str

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        self.size, self.seed, self.device = size, seed, device

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-densities ``[N]`` in nats, without recording gradients."""

    @abstractmethod
    def new_optimizer(self) -> None:
        """Starts Adam anew, with the rate ``LEARNING_RATE`` and no moments."""

    @abstractmethod
    def train_step(self, x: Tensor) -> None:
        """Takes one step of Adam on the mean negative log-likelihood of ``x``."""

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """Draws ``n`` samples ``[n, D]``."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """Returns the data of base points ``z``, which stand in the frame of the twin's z."""

    @abstractmethod
    def passes(self, z: Tensor, count: int) -> Tensor:
        """Does ``count`` of the D passes that the inverse of the block next to the base takes.

        Args:
            z: ``[N, D]`` in the order in which that block generates the dimensions.
            count: how many; the first ``count`` dimensions are then final.

        Returns:
            ``[N, D]`` in the same order.
        """

    @abstractmethod
    def twin(self) -> nn.Module:
        """Returns the same function with the same weights, from code that this side does not share.

        For fastmaf's sides that is the naive model, for all others fastmaf's on its default backend. It has
        ``log_prob`` and returns (z, ladj) when called; where the side inverts by passes, its attribute ``last`` is the
        block next to the base.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the weights to a file."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Reads them back."""


class TorchSide(Side):
    """A side that is a torch module: stochastic gradient descent and files as its users write them."""

    model: Any
    optimizer: torch.optim.Optimizer

    def loss(self, x: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood."""
        loss: Tensor = -self.model.log_prob(x).mean()
        return loss

    def log_prob(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model.log_prob(x)
        return found

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def train_step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        found: Tensor = self.model.sample(n)
        return found

    def save(self, path: Path) -> None:
        save_file(self.model.state_dict(), path)

    def load(self, path: Path) -> None:
        self.model.load_state_dict(load_file(path, device=self.device))
