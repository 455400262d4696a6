"""The states of generators and the order of the data: restored exactly, or refused by a message that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.training.random_state import ORDER, order_in, random_state, restore_random_state, seeded

CPU, FILE = torch.device("cpu"), Path("folder") / "state.safetensors"


def test_a_state_continues_the_sequence_and_nothing_of_it_is_left_behind() -> None:
    before = torch.get_rng_state()
    with seeded(3, CPU):
        torch.rand(5)
        state = random_state(CPU)
        expected = torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3, CPU):
        restore_random_state(state, CPU, FILE)
        assert torch.equal(torch.rand(7), expected)
        restore_random_state({}, CPU, FILE)
    with pytest.raises(KeyError), seeded(0, CPU):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s.int(), lambda s: torch.full_like(s, 255)])
def test_what_is_no_state_is_refused_and_changes_nothing(change: Any) -> None:
    with seeded(0, CPU):
        before = torch.get_rng_state()
        with pytest.raises(fastmaf.CheckpointError, match=r"state.safetensors: tensor rng/cpu: "):
            restore_random_state({"rng/cpu": change(before.clone())}, CPU, FILE)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("order", [
    torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]),
    torch.tensor([[0, 1, 2]]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([-1, 0, 1]),
])  # fmt: skip
def test_what_is_no_order_is_refused(order: Tensor) -> None:
    with pytest.raises(fastmaf.CheckpointError, match=r"state.safetensors: tensor data_order: expected each of 0..2"):
        order_in({ORDER: order}, 3, FILE)
    assert order_in({}, 3, FILE) is None
    assert order_in({ORDER: torch.tensor([2, 0, 1])}, 3, FILE) is not None
