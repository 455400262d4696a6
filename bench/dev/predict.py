"""Predicts what the library takes on a card that need not be here, from machine code: a model, no measurement.

    python -m fastmaf.bench.dev.predict --card h100

Every kernel that the library would launch is compiled, disassembled and priced (``kernel_cost``), with the trip counts
of its loops from the launch's own work lists. A launch takes the gap between kernels, the time of its bytes in memory,
and the longer of two: the chains of its programs, in waves over the multiprocessors; the busiest unit, with what stands
before and after loops. Where programs prefetch their weights, memory and chains go side by side. ``timeline`` has what
overlaps with the launch before. torch's own kernels are left out.
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import triton

import fastmaf
from fastmaf.bench.dev import kernel_cost, resources
from fastmaf.bench.dev.cards import CARDS, Card
from fastmaf.bench.dev.timeline import Stages, Timeline
from fastmaf.kernels.triton_common import launch_table
from fastmaf.kernels.triton_common.device import Launched

# Measured times over predictions, of the 15 cases in bench/results/gpu-h100-predicted.csv: least for log_prob at 1,024,
# most for training steps of 8. Half of them lie within 7 %. No other card has been compared.
MEASURED = (0.84, 1.43)


class Cost(NamedTuple):
    """A launch's predicted time.

    Attributes:
        kernel: its name.
        seconds: by which it makes the whole longer, with the gap before it.
        bounds: seconds that each bound alone would take.
    """

    kernel: str
    seconds: float
    bounds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)


def costs(launches: Sequence[Launched], card: Card, reached: int = 0, late: bool = False) -> list[Cost]:
    """Returns the predicted times of launches that a graph replays again and again.

    Args:
        launches: in their order.
        card: on which they run.
        reached: bytes of weights, which kernels that load their addresses read once all together.
        late: whether what kernels prefetch as they go comes no earlier than their loads would bring it.
    """
    cache = _Cache(card.cache_size)
    total = sum({t.data_ptr(): t.nbytes for one in launches for t in _tensors(one)}.values())
    for launched in launches:  # what the last replay has left
        cache.misses(_tensors(launched))
    reaching = sum(kernel_cost.kernel_of(one, card).reaches for one in launches if one.grid)
    each = reached / max(1, reaching) if reached > card.cache_size else 0.0
    timeline = Timeline(card)
    return [_cost(one, card, cache, total > card.cache_size, each, timeline, late) for one in launches]


def _tensors(launched: Launched) -> list[torch.Tensor]:
    return [value for value in launched.args if isinstance(value, torch.Tensor)]


class _Cache:
    """Which tensors the second-level cache holds: those used last."""

    def __init__(self, size: int) -> None:
        self.size, self.held = size, OrderedDict[int, int]()

    def misses(self, tensors: Sequence[torch.Tensor]) -> int:
        """Returns the bytes of tensors that it does not hold, and holds them from now on."""
        missed = 0
        for tensor in tensors:
            if self.held.pop(tensor.data_ptr(), None) is None:
                missed += tensor.nbytes
            self.held[tensor.data_ptr()] = tensor.nbytes
        while sum(self.held.values()) > self.size:
            self.held.popitem(last=False)
        return missed


def _cost(
    launched: Launched, card: Card, cache: _Cache, beyond: bool, reached: float, timeline: Timeline, late: bool
) -> Cost:
    name = launched.kernel.fn.__name__
    if not launched.grid:
        return Cost(name, 0.0, {"nothing": 0.0})
    kernel = kernel_cost.kernel_of(launched, card)
    counts = kernel_cost.program_counts(kernel, launched)
    share = launched.grid / len(counts)  # programs that each one evaluated stands for
    units = np.array([block.units for block in kernel.blocks]) * kernel.warps  # [blocks, units]
    missed = cache.misses(_tensors(launched))
    per_warp = counts @ np.array([[block.loaded, block.stored] for block in kernel.blocks])
    loaded, stored = (per_warp.sum(0) * share * kernel.warps).tolist()
    whole = sum(tensor.nbytes for tensor in _tensors(launched))
    if loaded < whole / 2 and beyond:  # some part of its tensors, another one each time
        missed = loaded
    far = missed > 0.2 * min(loaded, whole)
    streams = kernel.prefetches and launched.options.get("LANES", False) and not late
    chain = np.array([block.far if far and not streams else block.near for block in kernel.blocks])
    slower = np.maximum(chain, units.max(1))
    alone = counts[:, kernel.waits :] @ slower[kernel.waits :]  # cycles of each program without others
    before = float((counts[:, : kernel.waits] @ slower[: kernel.waits]).max()) / card.hertz
    resident = kernel.resident(card)
    programs = np.repeat(alone, int(share + 0.999))[: launched.grid]
    busy = (counts @ units).sum(0) * share / min(card.sms, launched.grid)
    if launched.grid <= card.sms * resident:  # one wave: some multiprocessors have a program more
        busy *= -(-launched.grid // card.sms) * min(card.sms, launched.grid) / launched.grid
    bounds = {"chain": _makespan(programs, card.sms * resident) / card.hertz}
    bounds |= {unit: cycles / card.hertz for unit, cycles in zip(kernel_cost.UNITS, busy.tolist(), strict=True)}
    from_memory = min(missed, loaded) + far * stored + kernel.reaches * reached
    bounds |= {"memory": from_memory / card.dram, "cache": max(0.0, loaded + stored - from_memory) / card.cache}
    units_longest = max(value for bound, value in bounds.items() if bound not in ("chain", "memory"))
    once = (np.array(kernel.regions) == -1) & (np.arange(len(chain)) >= kernel.waits)
    ends = float(chain[once].sum()) / card.hertz  # before and after loops, where little else runs
    # Latencies are those of idle memory: while it is busy, loads wait for each other besides.
    working = max(bounds["chain"], ends + units_longest)
    of_programs = counts @ np.array([block.loaded for block in kernel.blocks]) * kernel.warps
    asked = np.minimum(of_programs, launch_table.PREFETCHED / resident).sum() / of_programs.sum()
    memory = bounds["memory"]
    stages = Stages(
        kernel.waits > 0, before, working, ends, memory, streams, asked * memory * kernel.prefetches, launched.grid,
        kernel.warps, kernel.registers, kernel.shared,
    )  # fmt: skip
    return Cost(name, timeline.add(stages), bounds | {"launch": card.launch_s, "before": before})


def _makespan(programs: np.ndarray, slots: int) -> float:
    """Returns when the last of the programs ends, each of which starts where one has ended."""
    if len(programs) <= slots:
        return float(programs.max())
    if len(programs) > 50_000:
        return float(programs.sum() / slots + programs.mean())
    ends = programs[:slots].tolist()
    heapq.heapify(ends)
    for cycles in programs[slots:].tolist():
        heapq.heapreplace(ends, ends[0] + cycles)
    return max(ends)


def train_step(flow: fastmaf.MAF, batch: int) -> None:
    """Takes a training step whose kernels are recorded: the tensors have no values."""
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    optimizer.minimize(flow.log_prob(torch.zeros(batch, flow.features)).sum(), check_finite=False)


def cases(flow: fastmaf.MAF) -> dict[str, Callable[[], object]]:
    """Returns what is predicted, by name."""
    log_prob, found = torch.no_grad()(flow.log_prob), dict[str, Callable[[], object]]()
    for n in (1, 8, 64, 1024):
        found[f"log_prob {n}"] = partial(log_prob, torch.zeros(n, flow.features))
    for n in (8, 64):
        found[f"train step {n}"] = partial(train_step, flow, n)
    for n in (1, 5, 64, 1024):
        found[f"sample {n}"] = partial(flow.sample, n)
    return found


def chain_by_line(launches: Sequence[Launched], card: Card) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns where the chains of programs go: by kernel and line, how often it runs and its milliseconds.

    Of all launches together; a program is the mean of its launch.
    """
    found = defaultdict[tuple[str, str], tuple[float, float]](lambda: (0.0, 0.0))
    for launched in launches:
        kernel = kernel_cost.kernel_of(launched, card)
        counts = kernel_cost.program_counts(kernel, launched).mean(0)
        seen = set[tuple[str, int]]()
        for block, region, count in zip(kernel.blocks, kernel.regions, counts.tolist(), strict=True):
            slower = max(1.0, block.units.max() * kernel.warps / max(1.0, block.near))
            for line, cycles in block.lines.items():
                key = launched.kernel.fn.__name__, line
                runs, time = found[key]
                runs += 0 if (line, region) in seen else count
                found[key] = runs, time + count * cycles * slower / card.hertz * 1e3
                seen.add((line, region))
    return dict(found)


def report(name: str, launches: Sequence[Launched], card: Card, reached: int, with_lines: bool) -> Iterator[str]:
    """Yields the lines that are printed for a case."""
    priced, late = (costs(launches, card, reached, late) for late in (False, True))
    total, later = (sum(one.seconds for one in some) * 1e3 for some in (priced, late))
    beside = f", {later:.3f} if prefetching is late" if later != total else ""
    yield f"{name:<16}{total:9.3f} ms {len(priced):6} launches{beside}"
    groups = defaultdict[tuple[str, str], list[Cost]](list)
    for one in priced:
        groups[one.kernel, one.bound].append(one)
    for (kernel, bound), group in sorted(groups.items(), key=lambda item: -sum(one.seconds for one in item[1])):
        sums = {each: sum(one.bounds[each] for one in group) * 1e3 for each in group[0].bounds}
        text = ", ".join(f"{each} {sums[each]:.3f}" for each in sorted(sums, key=lambda each: -sums[each])[:4])
        total = sum(one.seconds for one in group) * 1e3
        yield f"    {kernel:<28}{len(group):5} x {total:9.3f} ms  {bound}: {text}"
    if with_lines:
        found = chain_by_line(launches, card)
        for (kernel, line), (runs, time) in sorted(found.items(), key=lambda item: -item[1][1])[:20]:
            yield f"        {time:9.3f} ms {runs:10.0f} times  {kernel} {line}"


def main() -> None:
    """Prints the predictions for the published run's model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--case", default="", help="part of the names of the cases to predict (default: all)")
    parser.add_argument("--lines", action="store_true", help="print where the chains of programs go")
    args = parser.parse_args()
    card = CARDS[args.card]
    flow = resources.published_flow(blocks=7)
    print(f"A MODEL of the {card.name} with Triton {triton.__version__}, not a measurement. On an H100, an earlier")
    print(f"version took {MEASURED[0]} to {MEASURED[1]} times what the model says.\n")
    for name, use in cases(flow).items():
        if args.case in name:
            for line in report(name, resources.recorded(card.arch, use), card, 4 * flow.stored_weights, args.lines):
                print(line, flush=True)


if __name__ == "__main__":
    main()
