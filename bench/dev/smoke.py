"""Compares a flow's results on a GPU with float64, in a minute and a half: values, gradients, steps of Adam.

    python -m fastmaf.bench.dev.smoke [--features 12288] [--device cuda]

One line per batch and precision: the norm-wise relative error of the Triton kernels, and that of plain PyTorch in
float32 on the same inputs, of which ``ieee`` may have at most twice as much. The weights are trained for a few steps
first, so that none has its initial value; new memory is filled with NaN. The exit code is 1 if a line is wrong.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import Tensor

import fastmaf
from fastmaf.bench.dev.one import has_precision
from fastmaf.kernels import masked_linear

# Largest multiple of the error of plain PyTorch in float32 (TF32 off) for densities and gradients.
ALLOWED = {"ieee": 2.0, "tf32x3": 2.0, "tf32": 2e5, "bf16": 1e6}
ROUNDING = 2e-7  # the smallest error of plain PyTorch that is taken seriously
# Adam divides a gradient by its own size, so that the step has the relative rounding error of a small gradient.
ADAM = {"ieee": 1e-3, "tf32x3": 1e-3, "tf32": 0.2, "bf16": 0.5}


def trained(features: int, blocks: int, hidden: int, device: str) -> fastmaf.MAF:
    """Returns a flow whose every weight differs from its initial value."""
    flow = fastmaf.MAF(features, blocks, (hidden, hidden), degrees="random", log_scale_bound=1.0, seed=0).to(device)
    step = fastmaf.TrainingStep(flow, torch.optim.Adam(flow.parameters(), lr=1e-3))
    generator = torch.Generator().manual_seed(1)
    with fastmaf.use_backend("torch"):
        for _ in range(5):
            step(torch.randn(16, features, generator=generator).to(device))
    return flow


def away_from_kinks(flow: fastmaf.MAF, x: Tensor, count: int, margin: float = 1e-5) -> Tensor:
    """Returns the first rows of x with no hidden unit's sum within ``margin`` of zero, in units of its layer's mean.

    There a rounding error decides whether a ReLU passes the gradients of its row.
    """
    good, h = torch.ones(len(x), dtype=torch.bool, device=x.device), x.double()
    for transform in flow.transforms:
        unit = h
        for layer in transform.made.layers[:-1] if isinstance(transform, fastmaf.AffineAutoregressive) else ():
            sums = masked_linear(unit, layer.args()._replace(activation="identity"))
            good &= sums.abs().amin(1) > margin * sums.square().mean().sqrt()
            unit = sums.relu()
        h = transform(h)[0]
    if int(good.sum()) < count:
        raise RuntimeError(f"{int(good.sum())} of {len(x)} samples keep away from kinks; {count} are needed")
    return x[good][:count]


def results(flow: fastmaf.MAF, x: Tensor, z: Tensor, fused: bool) -> dict[str, Tensor]:
    """Returns densities, the inverse, gradients of all parameters and x, and the change by three steps of Adam."""
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        values["log_prob, no grad"] = flow.log_prob(x)
        values["z"] = flow(x)[0]
        values["inverse"], values["inverse ladj"] = flow.inverse(z)
    leaf = x.clone().requires_grad_()
    log_prob = flow.log_prob(leaf)
    grads = torch.autograd.grad(log_prob.mean(), [leaf, *flow.parameters()])
    values |= {"log_prob": log_prob.detach(), "gradient of x": grads[0]}
    values["gradients of weights"] = torch.cat([grad.flatten() for grad in grads[1:]])
    values["adam"] = adam_steps(flow, x, fused=fused)
    values["adam, graphs"] = adam_steps(flow, x, fused=True, graphs=True) if fused else values["adam"]
    return values


def adam_steps(flow: fastmaf.MAF, x: Tensor, *, fused: bool, graphs: bool = False) -> Tensor:
    """Returns how three steps of Adam change a copy of the flow."""
    trained = copy.deepcopy(flow)
    kind = fastmaf.optim.FusedAdam if fused else torch.optim.Adam
    optimizer = kind(trained.parameters(), lr=1e-3, eps=1e-4)  # eps: above the rounding errors of zero gradients
    step = fastmaf.TrainingStep(trained, optimizer, graphs=graphs)
    for _ in range(3):  # with graphs: the first runs, the second is recorded, the third replayed
        step(x)
    pairs = zip(trained.parameters(), flow.parameters(), strict=True)
    return torch.cat([(a.detach().double() - b.detach().double()).flatten() for a, b in pairs])


def main() -> int:
    """Prints the comparisons; returns 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=12_288)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--precisions", nargs="+", default=["ieee", "tf32x3", "tf32", "bf16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    like = torch.empty(0, device=options.device)
    precisions = [name for name in options.precisions if options.backend != "triton" or has_precision(name, like)]
    if not precisions:
        return 0
    flow = trained(options.features, options.blocks, options.hidden, options.device)
    exact, wrong = copy.deepcopy(flow).double(), 0
    print(f"{'what':22} {'batch':>5} {'precision':9} {'error':>9} {'torch':>9}")
    for batch in options.batches:
        generator = torch.Generator().manual_seed(batch)
        draws = batch + batch // 4 + 8
        x, z = (torch.randn(rows, flow.features, generator=generator).to(options.device) for rows in (draws, batch))
        with fastmaf.use_backend("torch"), torch.no_grad():
            x = away_from_kinks(exact, x, batch)
        with fastmaf.use_backend("torch"):
            truths, plain = results(exact, x.double(), z.double(), False), results(flow, x, z, False)
        for precision in precisions:
            with fastmaf.use_backend(options.backend), fastmaf.use_precision(precision):
                values = results(flow, x, z, True)
            for what, truth in truths.items():
                error, of_torch = (float((v[what].double() - truth).norm() / truth.norm()) for v in (values, plain))
                adam = what.startswith("adam")
                allowed = ADAM[precision] if adam else ALLOWED[precision] * max(of_torch, ROUNDING)
                correct = error <= allowed  # NaN is not
                wrong += not correct
                verdict = "" if correct else "  WRONG"
                print(f"{what:22} {batch:5} {precision:9} {error:9.2e} {of_torch:9.2e}{verdict}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
