"""Pieces of work on several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fastmaf.threads import beside, map_on_threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_from_as_many_threads_at_a_time_as_torch_has() -> None:
    together = threading.Barrier(3, timeout=60)

    def piece(item: int) -> tuple[int, int, bool]:
        together.wait()  # fails unless three pieces are computed at a time
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert map_on_threads(piece, range(6)) == [(item, 1, False) for item in range(6)]
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()


@pytest.mark.parametrize("items", [0, 1])
def test_few_items_need_no_other_thread(items: int) -> None:
    found = map_on_threads(lambda _: (threading.get_ident(), torch.get_num_threads()), range(items))
    assert found == [(threading.get_ident(), 1)] * items
    assert torch.get_num_threads() == 3


def test_the_first_error_is_raised_and_leaves_torch_as_it_was() -> None:
    def piece(item: int) -> None:
        raise ValueError(f"piece {item}")

    with pytest.raises(ValueError, match="piece 0"):
        map_on_threads(piece, range(10))
    assert torch.get_num_threads() == 3


def test_a_function_beside_a_block_computes_on_the_other_threads() -> None:
    together = threading.Barrier(2, timeout=60)

    def function() -> tuple[int, int, bool]:
        together.wait()  # fails unless the block runs meanwhile
        return threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()

    with beside(function) as result:
        together.wait()
        assert torch.get_num_threads() == 1 and torch.is_grad_enabled()
        thread, threads, gradients = result()
    assert thread != threading.get_ident() and (threads, gradients) == (2, False)
    assert result() == (thread, threads, gradients)
    assert torch.get_num_threads() == 3


def test_with_one_thread_a_function_is_called_once_when_its_result_is_asked_for() -> None:
    torch.set_num_threads(1)
    calls: list[int] = []
    with beside(lambda: calls.append(threading.get_ident())) as result:
        assert not calls
        result()
        result()
    assert calls == [threading.get_ident()] and torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_errors_beside_and_in_a_block_are_raised(threads: int) -> None:
    torch.set_num_threads(threads)

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), beside(fails) as result:
        result()
    finished = threading.Event()
    with pytest.raises(KeyboardInterrupt), beside(finished.set):
        raise KeyboardInterrupt
    assert finished.is_set() == (threads > 1) and torch.get_num_threads() == threads
