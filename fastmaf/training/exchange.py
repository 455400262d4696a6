"""Averages of gradients over processes that train together, by factors where these are fewer bytes.

The gradient of a packed weight is an outer product over the batch, ``gradᵀ x``, so that of all processes together is
the outer product of their stacked factors. A process sends ``N (in + out)`` numbers of a layer to each other one,
instead of about twice the weight's: at D = 12,288, two layers of 512 units and 8 samples a process, 1.25 MB of a block
instead of 76 MB. Each process then forms the same sum in its own step of Adam.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastmaf.kernels.factored_grad import FactoredGrad, GradientSink
from fastmaf.kernels.masked_linear.args import LinearBatch
from fastmaf.training.failures import agree, connected, fail
from fastmaf.training.gradient_sink import Gradients, backward


class ProcessesDifferError(RuntimeError):
    """Processes that are to train one model together hold different ones; nothing was trained.

    Example:
        >>> issubclass(fastmaf.ProcessesDifferError, RuntimeError)
        True
    """


class Exchange:
    """Communication of the processes of a group, each of which calls the same methods in the same order.

    Args:
        group: the processes.
        parameters: set to those of the group's first process.

    Attributes:
        sent: bytes that this process has sent to each other one, for measurements.

    Raises:
        ProcessesDifferError: in every process, where parameters differ in number, shapes or dtypes.
        ProcessFailedError: a process has failed before.
    """

    def __init__(self, group: Any, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.sent = 0
        first = dist.get_global_rank(group, 0)
        self.total()
        # Before the broadcast, which would end the process where sizes differ.
        forms = "\n".join(f"{tuple(parameter.shape)} {parameter.dtype}" for parameter in parameters)
        if parameters and (found := self.first_difference([digest(forms.encode())])):
            raise ProcessesDifferError(
                f"the parameters of process {found[0]} differ from those of process 0 in number, shapes or dtypes: "
                "build the model with the same arguments and the same seed in all processes"
            )
        with connected():
            for parameter in parameters:
                dist.broadcast(parameter.data, first, group=group)

    def first_difference(self, digests: Sequence[bytes]) -> tuple[int, int] | None:
        """Returns the first process, and the number of its first digest, that differs from those of the first one.

        All processes must give equally many digests.
        """
        own = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).to(self.device)
        found = self.stack(own.view(len(digests), -1))().view(self.size, len(digests), -1)
        wrong = (found != found[0]).any(2).nonzero().tolist()
        return (wrong[0][0], wrong[0][1]) if wrong else None

    def total(self, *numbers: float) -> list[float]:
        """Returns the sums of up to two numbers over all processes; see ``failures.agree``."""
        return agree(self.group, self.device, *numbers)

    def fail(self, error: Exception) -> None:
        """Ends the other processes with an error of this one; see ``failures.fail``."""
        fail(self.group, self.device, error)

    def gradients(self, loss: Tensor, uses: Sequence[tuple[Tensor, object]], parameters: Iterable[Tensor]) -> Gradients:
        """Runs the backward pass; returns the mean of the processes' gradients.

        Args:
            loss: of this process.
            uses: the weights whose gradients may stay in factored form, each with the node of the graph that uses it.
            parameters: all parameters, the others' gradients among ``Gradients.stored``.
        """
        rows = _Rows(self)
        sinks = [(weight, _Sink(node, self, rows)) for weight, node in uses]
        backward(loss, sinks)
        gradients = Gradients.collect(sinks, parameters)
        with torch.no_grad():
            self.average(list(gradients.stored.values()))
            for weight, sink in sinks:
                mean = sink.mean()
                if isinstance(mean, FactoredGrad) and weight not in gradients.stored:
                    gradients.factored[weight] = mean
                elif mean is not None:
                    grad = mean.grad_weight() if isinstance(mean, FactoredGrad) else mean
                    weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
                    gradients.stored[weight] = weight.grad
        return gradients

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over all processes, in one message."""
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.sum(flat)()
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor)).div_(self.size)

    def sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins to sum a tensor in place; returns how to wait for the sum."""
        self.sent += 2 * tensor.nbytes // self.size  # of a ring: every part goes around twice
        with connected():
            work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return _waiting(work, lambda: tensor)

    def send(self, tensor: Tensor, rank: int) -> Callable[[], Tensor]:
        """Begins to copy a tensor of one process of the group into those of the others; returns how to wait for it."""
        self.sent += tensor.nbytes * (rank == self.rank)
        with connected():
            work = dist.broadcast(tensor, dist.get_global_rank(self.group, rank), group=self.group, async_op=True)
        return _waiting(work, lambda: tensor)

    def stack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begins to gather a tensor ``[N, …]`` of each process; returns how to wait for all of them ``[size N, …]``."""
        self.sent += tensor.nbytes
        found = tensor.new_empty(self.size, *tensor.shape)
        with connected():
            work = dist.all_gather(list(found.unbind()), tensor, group=self.group, async_op=True)
        return _waiting(work, lambda: found.flatten(0, 1))


def _waiting(work: Any, result: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns how to wait for the end of a communication, and for its result."""

    def wait() -> Tensor:
        with connected():
            work.wait()
        return result()

    return wait


def digest(content: bytes | memoryview) -> bytes:
    """Returns the SHA-256 of some bytes, by which processes compare what they hold."""
    return hashlib.sha256(content).digest()


class _Rows:
    """The largest number of samples of a process, which all of them fill up to with zeros; asked for once in a step."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._known: dict[int, int] = {}

    def most(self, n: int, device: torch.device) -> int:
        if n not in self._known:
            if self._known:
                raise RuntimeError(
                    f"a loss of several batches, of {next(iter(self._known))} and {n} samples, cannot be minimised by "
                    "processes together: call minimize() for each of them"
                )
            most = torch.tensor(n, device=device)
            with connected():
                dist.all_reduce(most, dist.ReduceOp.MAX, group=self._exchange.group)
            self._known[n] = int(most)
        return self._known[n]


class _Sink(GradientSink):
    """Begins the exchange of a weight's gradient as soon as it is known, while the backward pass goes on."""

    def __init__(self, node: object, exchange: Exchange, rows: _Rows) -> None:
        super().__init__(node)
        self._exchange, self._rows = exchange, rows
        self.mean: Callable[[], FactoredGrad | Tensor | None] = lambda: None
        """Waits for the mean of the processes' gradients and returns it; None if the weight had no gradient."""

    def take(self, grad: FactoredGrad, need_inputs: bool) -> tuple[Tensor, ...]:
        product, direct = grad.as_product()
        self._begin(product)
        found = product.grad_inputs(need_inputs)
        return found if direct is None else (*found, direct)

    def _begin(self, product: FactoredGrad) -> None:
        size, (g, x) = self._exchange.size, product.batch[:2]
        n, widths = self._rows.most(len(g), g.device), [g.shape[1], x.shape[1]]
        if size * n * sum(widths) >= 2 * product.args.weight.numel():
            total = self._exchange.sum(product.grad_weight())
            self.mean = lambda: total().div_(size)
            return
        stacked = self._exchange.stack(torch.nn.functional.pad(torch.cat((g, x), 1), (0, 0, 0, n - len(g))))

        def joined() -> FactoredGrad:
            g, x = (part.contiguous() for part in stacked().split(widths, 1))
            return product._replace(batch=LinearBatch(g, x, g)).scaled(1 / size)

        self.mean = joined
