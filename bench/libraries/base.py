"""The interface of the adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEARNING_RATE = 1e-4


class Size(NamedTuple):
    """The size of a flow: D, the units of each hidden layer of a block, and the number of blocks.

    ``levels`` limits the number of distinct hidden degrees in fastmaf's flow; other libraries have no such option.
    """

    features: int
    hidden: tuple[int, ...]
    blocks: int
    levels: int | None = None

    def one_width(self, library: str) -> int:
        """Returns the width of the hidden layers, for a library that supports only equal ones."""
        if len(set(self.hidden)) != 1:
            raise ValueError(f"{library} needs hidden layers of equal width; found {self.hidden}")
        return self.hidden[0]

    @property
    def dense_weights(self) -> int:
        """The weights of all layers, whether masked or not."""
        widths = (self.features, *self.hidden, 2 * self.features)
        return self.blocks * sum(a * b for a, b in pairwise(widths))

    def __str__(self) -> str:
        return f"D = {self.features:,}, hidden {self.hidden}, {self.blocks} block{'s' if self.blocks > 1 else ''}"


class Library(ABC):
    """A masked autoregressive flow of one library, with random weights, used as the users of the library would.

    Batches are float32 tensors ``[N, D]`` on its device.
    """

    # Sampling takes D passes of the whole network per block, so that their time can be extrapolated from a few.
    inverts_by_passes: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    loading: ClassVar[str] = "into an existing model"

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        self.size, self.seed, self.device = size, seed, device

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-densities ``[N]`` in nats, without recording gradients."""

    @abstractmethod
    def new_optimizer(self) -> None:
        """Creates an Adam optimiser with the rate ``LEARNING_RATE``."""

    @abstractmethod
    def train_step(self, x: Tensor) -> None:
        """Takes one step of Adam on the mean negative log-likelihood of ``x``."""

    @abstractmethod
    def sample(self, n: int) -> Tensor:
        """Draws ``n`` samples ``[n, D]``."""

    @abstractmethod
    def inverse(self, z: Tensor, passes: int) -> Tensor:
        """Inverts the flow; if ``inverts_by_passes``, only the block next to the base, by some of its D passes.

        z and the result are then in the order in which the block generates the dimensions, of which the first
        ``passes`` are final.
        """

    @abstractmethod
    def counterpart(self) -> Any:
        """Returns a module with the same weights and the same function, from code that this library does not share.

        For fastmaf that is the naive model, for all others a ``ConvertedFlow``.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the weights to a file."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Reads them back."""


class TorchLibrary(Library):
    """A library whose flow is a torch module, trained and stored as its examples do."""

    optimizer: torch.optim.Optimizer

    def __init__(self, size: Size, seed: int, device: str = "cpu") -> None:
        super().__init__(size, seed, device)
        torch.manual_seed(seed)
        self.model = self.build().to(device)

    @abstractmethod
    def build(self) -> Any:
        """Returns the module, with weights from torch's global generator."""

    def density(self, x: Tensor) -> Tensor:
        """Returns the log-densities ``[N]``, recording gradients."""
        return self.model.log_prob(x)

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        return self.density(x)

    def new_optimizer(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def train_step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (-self.density(x).mean()).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.model.sample(n)

    def save(self, path: Path) -> None:
        save_file(self.model.state_dict(), path)

    def load(self, path: Path) -> None:
        self.model.load_state_dict(load_file(path, device=self.device))
