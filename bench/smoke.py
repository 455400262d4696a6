"""Checks a flow's ops on the GPU at hand against float64, in a minute and a half: values, gradients, a step of Adam.

    python -m fastmaf.bench.smoke [--features 12288] [--device cuda]

One line per batch and precision: the norm-wise relative error of the Triton kernels, and that of plain PyTorch in
float32 on the same inputs. The contract is at most twice the latter for ``ieee``. The weights are trained for a few
steps first, so that none is at its start; memory is filled with NaN before each call. Exit code 1 if a line fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels.triton_common.launch_table import Precision

# By how much the error of densities and gradients may exceed that of plain PyTorch in float32, with TF32 off.
ALLOWED = {"ieee": 2.0, "tf32x3": 2.0, "tf32": 2e5, "bf16": 1e6}
# Adam divides a gradient by its own size, so that a small one's rounding becomes the step's; and a ReLU whose input is
# within rounding of zero may pass a sample's gradient in one arithmetic and not in the other.
ADAM = {"ieee": 1e-3, "tf32x3": 1e-3, "tf32": 0.2, "bf16": 0.5}


class Line(NamedTuple):
    """One comparison: relative errors of the kernels and of plain PyTorch in float32, against float64."""

    what: str
    batch: int
    precision: str
    error: float
    of_torch: float

    @property
    def right(self) -> bool:
        """Whether the error is within what the precision allows."""
        if self.what.startswith("adam"):
            return self.error <= ADAM[self.precision]
        return self.error <= ALLOWED[self.precision] * max(self.of_torch, 2e-7)  # below: one rounding


def trained(features: int, blocks: int, hidden: int, device: str) -> fastmaf.MAF:
    """Returns a flow whose every weight has moved from its start."""
    flow = fastmaf.MAF(
        features, blocks, (hidden, hidden), degrees="random", log_scale_bound=1.0, soft_bound=True, seed=0
    ).to(device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    with fastmaf.use_backend("torch"):
        for _ in range(5):
            optimizer.zero_grad()
            x = torch.randn(16, features, generator=generator).to(device)
            (-flow.log_prob(x).mean() / features).backward()
            optimizer.step()
    return flow


def results(flow: fastmaf.MAF, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Returns what is compared: densities, the inverse and its log-determinant, gradients of all parameters and x."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        found["log_prob, no grad"] = flow.log_prob(x)
        found["z"] = flow(x)[0]
        found["inverse"], found["inverse ladj"] = flow.inverse(z)
    leaf = x.clone().requires_grad_()
    log_prob = flow.log_prob(leaf)
    grads = torch.autograd.grad(log_prob.mean(), [leaf, *flow.parameters()])
    found["log_prob"] = log_prob.detach()
    found["gradient of x"] = grads[0]
    found["gradients of weights"] = torch.cat([g.flatten() for g in grads[1:]])
    return found


def adam_step(flow: fastmaf.MAF, x: Tensor, *, fused: bool, graphs: bool = False) -> Tensor:
    """Returns by how much two steps of Adam change a copy of the flow."""
    own = copy.deepcopy(flow)
    kind = fastmaf.optim.FusedAdam if fused else torch.optim.Adam
    optimizer = kind(own.parameters(), lr=1e-3, eps=1e-4)  # above what rounding makes of gradients that are zero
    step = fastmaf.TrainingStep(own, optimizer, graphs=graphs)
    for _ in range(3):  # with graphs: the first runs, the second is recorded, the third replayed
        step(x)
    pairs = zip(own.parameters(), flow.parameters(), strict=True)
    return torch.cat([(a.detach().double() - b.detach().double()).flatten() for a, b in pairs])


def error(found: Tensor, truth: Tensor) -> float:
    """Returns the norm-wise relative error; infinity where something is not finite."""
    value = float((found.double() - truth).norm() / truth.norm())
    return value if value == value else float("inf")


def lines(flow: fastmaf.MAF, batches: list[int], precisions: list[Precision], backend: str) -> Iterator[Line]:
    """Yields every comparison."""
    device = next(flow.parameters()).device
    truth_flow = copy.deepcopy(flow).double()
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, flow.features, generator=generator).to(device)
        z = torch.randn(batch, flow.features, generator=generator).to(device)
        with fastmaf.use_backend("torch"):
            truth = results(truth_flow, x.double(), z.double())
            plain = results(flow, x, z)
            truth["adam"] = adam_step(truth_flow, x.double(), fused=False)
            plain["adam"] = adam_step(flow, x, fused=False)
        truth["adam, graphs"], plain["adam, graphs"] = truth["adam"], plain["adam"]
        for precision in precisions:
            with fastmaf.use_backend(backend), fastmaf.use_precision(precision):
                found = results(flow, x, z)
                found["adam"] = adam_step(flow, x, fused=True)
                found["adam, graphs"] = adam_step(flow, x, fused=True, graphs=True)
            for what, value in found.items():
                yield Line(what, batch, precision, error(value, truth[what]), error(plain[what], truth[what]))


def main() -> int:
    """Prints the lines; returns 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=12_288)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--precisions", nargs="+", default=["ieee", "tf32x3", "tf32", "bf16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    asked = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    flow = trained(asked.features, asked.blocks, asked.hidden, asked.device)
    wrong = 0
    print(f"{'what':22} {'batch':>5} {'precision':9} {'error':>9} {'torch':>9}")
    for line in lines(flow, asked.batches, asked.precisions, asked.backend):
        wrong += not line.right
        verdict = "" if line.right else "  WRONG"
        print(
            f"{line.what:22} {line.batch:5} {line.precision:9} {line.error:9.2e} {line.of_torch:9.2e}{verdict}",
            flush=True,
        )
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
