"""The state of an interrupted fit, replaced in slow writes and killed meanwhile; started by ``test_fit_state.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastmaf
from fastmaf.inspection.fit_stages import Stage, Stages
from fastmaf.inspection.workflow.fit_state import STATE_FOLDER, load_state, save_state
from tests.faults import hidden
from tests.slow_writes import ENDED, ended, forked, kill_at_random, slow_down

RUN = {"images": "some", "size": [16]}


def stages_of(seed: int, flows: int) -> Stages:
    """Two stages of flows, which a seed tells apart."""
    made = tuple(fastmaf.MAF(48, 1, (16,), order="natural", seed=seed + k).eval() for k in range(flows))
    return Stages({"whitenings": Stage(made, {"seed": seed}), "blocks": Stage(made[:1], {"log": []})})


OLD, NEW = stages_of(10, 3), stages_of(20, 2)


def equal(found: Stages, expected: Stages) -> bool:
    """Whether names, records and flows are the same."""

    def weights(stages: Stages) -> list[torch.Tensor]:
        return [p for stage in stages.done.values() for flow in stage.flows for p in flow.parameters()]

    records = [[(name, stage.record) for name, stage in stages.done.items()] for stages in (found, expected)]
    ours, theirs = weights(found), weights(expected)
    return records[0] == records[1] and len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def main(folder: Path, moments: int, seed: int) -> None:
    torch.set_num_threads(1)

    def work(out: Path) -> None:
        slow_down()
        save_state(out, RUN, NEW)

    def check(out: Path) -> None:
        found = load_state(out, RUN)
        old = equal(found, OLD)
        assert old or equal(found, NEW)
        print("old" if old else "new", flush=True)
        save_state(out, RUN, NEW)
        assert equal(load_state(out, RUN), NEW)
        assert len(list((out / STATE_FOLDER).iterdir())) == 4 and hidden(out / STATE_FOLDER) == []

    for i in range(moments):  # by another process: each sweeps a folder once, here in what follows a kill
        assert ended(forked(lambda i=i: save_state(folder / f"killed {i}", RUN, OLD))) == ENDED  # type: ignore[misc]
    print("killed", kill_at_random(moments, seed, folder, work, check))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
