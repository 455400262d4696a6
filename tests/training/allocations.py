"""Measures what malloc is asked for while a flow trains or scores, on Linux.

    python -m tests.training.allocations LIBRARY CASES

Run with the library compiled from ``allocations.c`` in LD_PRELOAD. Prints, for each case of the JSON list CASES, the
peak above what was held before the flow was built, and the estimate that it is to be held against. The work buffers
of the BLAS library, which the estimate leaves out, are allocated before, by products of the same shapes.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from typing import Any


def main() -> None:
    from torch import _dynamo  # noqa: F401  # optimisers import it when first used: 30 MB that are none of a flow's

    counter = ctypes.CDLL(sys.argv[1])
    counter.bytes_held.restype = counter.most_bytes_held.restype = ctypes.c_long
    warnings.simplefilter("ignore")
    for case in json.loads(sys.argv[2]):
        # A process each: buffers that one case leaves behind would serve the next one. No thread has been started here.
        if (child := os.fork()) == 0:
            measure(
                {**case, "features": 48, "hidden": [8], "blocks": 1, "batch": 2}, counter
            )  # loads what is loaded late
            print(json.dumps(measure(case, counter)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{case} failed")


def measure(case: dict[str, Any], counter: Any) -> dict[str, int]:
    """Returns the peak of a case's third step, and the estimate of it, in bytes."""
    import torch

    import fastmaf
    from fastmaf.training.workspace import allocate_work_buffers

    fastmaf.use_backend(case["backend"])
    dtype = getattr(torch, case.get("dtype", "float32"))

    def build(device: str) -> fastmaf.Flow:
        shape = case["features"], case["blocks"], case["hidden"]
        return fastmaf.MAF(*shape, order=case["order"], seed=0, dtype=dtype, device=device)

    allocate_work_buffers(build("meta"), case["batch"], training=case["optimiser"] is not None)
    before = counter.bytes_held()
    flow = build("cpu")
    if case.get("inference"):
        flow = flow.to_inference(getattr(torch, case["inference"]))
    x = torch.rand(case["batch"], case["features"], dtype=dtype)
    kind, update = case["optimiser"], case.get("update", "minimize")
    optimiser = None
    if kind == "FusedAdam":
        optimiser = fastmaf.optim.FusedAdam(flow.parameters(), lr=1e-6)
    elif kind is not None:
        optimiser = getattr(torch.optim, kind)(flow.parameters(), lr=1e-6, **case.get("settings", {}))
    guards = fastmaf.Guards(max_grad_norm=1e6 if update == "clip" else None)
    for _ in range(3):  # the state comes with the first one, and buffers are held from the second one on
        counter.forget_most()
        if optimiser is None:
            with torch.no_grad():
                flow.log_prob(x)
        elif update == "step":
            optimiser.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimiser.step()
        else:
            fastmaf.TrainingStep(flow, optimiser, guards)(x)
    peak = counter.most_bytes_held() - before
    return {"peak": peak, "estimate": fastmaf.memory_estimate(flow, case["batch"], optimiser, update=update)}


if __name__ == "__main__":
    main()
