"""Training runs that will not fit are refused before anything is written, with what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from fastmaf.capsule import memory_check
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.memory_check import check_fits, needed_memory
from fastmaf.cli.capsule import app
from fastmaf.io.run_folder import DoesNotFitError
from fastmaf.kernels import dispatch
from tests.capsule.runs import IMAGES, run, with_

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]

CPU = torch.device("cpu")
TRAINED = IMAGES - 2  # images, two being held out


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets the bytes that count as available."""
    return lambda size: monkeypatch.setattr(memory_check, "available_memory", lambda device: size)


def option(message: str, name: str) -> int:
    (found,) = re.findall(rf"--{name} (\d+)", message)
    return int(found)


def refused(data: Path, out: Path, config: TrainConfig, **options: bool) -> str:
    with pytest.raises(DoesNotFitError) as error:
        run(data, out, config, **options)
    return str(error.value)


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(
    data: Path, tmp_path: Path, only: Callable[[int | None], None]
) -> None:
    config = with_(batch_size=TRAINED, epochs=1)
    available = needed_memory(with_(batch_size=5), CPU)
    only(available)
    message = refused(data, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    pattern = (
        r"training 2 blocks of 192 dimensions and hidden units 16,16 at batch size 8 needs about 0\.\d MB on cpu, "
    )
    assert re.search(pattern + r"where 0\.\d MB are available", message)
    best = option(message, "batch-size")
    assert best == 5
    assert needed_memory(with_(batch_size=best), CPU) <= available < needed_memory(with_(batch_size=best + 1), CPU)
    refused(data, tmp_path / "out", with_(batch_size=best + 1, epochs=1))
    assert len(run(data, tmp_path / "out", with_(batch_size=best, epochs=1)).log) == 1


@pytest.mark.parametrize("batch", [8, 1])
def test_where_one_image_does_not_fit_the_most_blocks_are_named(
    data: Path, tmp_path: Path, only: Callable[[int | None], None], batch: int
) -> None:
    """At the batch size that was asked for, or, where not even one block fits then, at batch size 1."""
    config = with_(blocks=9, batch_size=8, epochs=1)
    available = needed_memory(with_(blocks=3 if batch == 8 else 1, batch_size=batch), CPU)
    only(available)
    message = refused(data, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    best = option(message, "blocks")
    assert option(message, "batch-size") == batch
    assert best == (3 if batch == 8 else 1)
    fits, too_many = (needed_memory(with_(blocks=n, batch_size=batch), CPU) for n in (best, best + 1))
    assert fits <= available < too_many
    assert len(run(data, tmp_path / "out", with_(blocks=best, batch_size=batch, epochs=1)).log) == 1


def test_where_nothing_fits_the_other_settings_are_named(
    data: Path, tmp_path: Path, only: Callable[[int | None], None]
) -> None:
    only(1000)
    assert "choose fewer --hidden units or a smaller --size" in refused(data, tmp_path, with_())
    assert not list(tmp_path.iterdir())


def test_a_batch_is_no_larger_than_the_images_are_many(
    data: Path, tmp_path: Path, only: Callable[[int | None], None]
) -> None:
    only(needed_memory(with_(batch_size=TRAINED), CPU))
    assert len(run(data, tmp_path, with_(batch_size=1_000_000, epochs=1)).log) == 1


def test_where_nothing_is_known_nothing_is_refused(
    data: Path, tmp_path: Path, only: Callable[[int | None], None]
) -> None:
    only(None)
    assert len(run(data, tmp_path, with_(epochs=1)).log) == 1


def test_a_resumed_run_is_checked_too(data: Path, tmp_path: Path, only: Callable[[int | None], None]) -> None:
    run(data, tmp_path, with_(epochs=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    only(needed_memory(with_(batch_size=2), CPU))
    message = refused(data, tmp_path, with_(epochs=2), resume=True)
    assert "free memory, or start a new run in another --out, as --resume keeps the settings" in message
    assert option(message, "batch-size") == 2
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    only(needed_memory(with_(), CPU))
    assert len(run(data, tmp_path, with_(epochs=2), resume=True).log) == 2


def test_messages_name_only_options_that_exist(data: Path, tmp_path: Path, only: Callable[[int | None], None]) -> None:
    named = set()
    run(data, tmp_path / "begun", with_(epochs=1))
    for available in (1, needed_memory(with_(batch_size=1, blocks=1), CPU), needed_memory(with_(batch_size=1), CPU)):
        only(available)
        message = refused(data, tmp_path / "begun", with_(blocks=2, epochs=2), resume=True)
        named |= set(re.findall(r"--[a-z-]+", message))
    known = {option for command in get_command(app).commands.values() for p in command.params for option in p.opts}  # type: ignore[attr-defined]
    assert {"--batch-size", "--blocks", "--hidden", "--size", "--out", "--resume"} == named
    assert named <= known


def test_clipping_and_guards_are_counted() -> None:
    assert needed_memory(with_(max_grad_norm=1.0), CPU) > needed_memory(with_(), CPU)


@pytest.mark.parametrize(("backend", "fits"), [("torch", False), ("native", True)])
def test_work_buffers_of_the_blas_library_come_off_what_is_available(
    monkeypatch: pytest.MonkeyPatch, backend: str, fits: bool
) -> None:
    """No library tells their size: they are allocated by products of the run's shapes, then it is looked again."""
    if (reason := dispatch.missing("flow", backend)) is not None:
        pytest.skip(reason)
    config, products = with_(batch_size=3), []
    multiply = torch.addmm

    def counted(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        products.append((tuple(x.shape), tuple(weight.shape)))
        return multiply(bias, x, weight, out=out)

    monkeypatch.setattr(torch, "addmm", counted)
    with dispatch.use_backend(backend):
        needed = needed_memory(config, CPU)
        monkeypatch.setattr(memory_check, "available_memory", lambda device: needed - len(products))
        if fits:
            check_fits(config, CPU, images=TRAINED)
            assert not products
            return
        with pytest.raises(DoesNotFitError):
            check_fits(config, CPU, images=TRAINED)
    layers = [layer for made in config.build()._mades() for layer in made.layers]
    runs = [run for layer in layers for run in layer.layout.runs if run.end - run.start == 1]
    assert runs and {((3, run.width), (run.width, 16)) for run in runs} <= set(products)


def test_moments_that_are_split_count_as_one_share_on_a_gpu_and_whole_on_a_cpu() -> None:
    config = TrainConfig(size=8, blocks=2, hidden_features=(16, 16))
    moments = 8 * sum(parameter.numel() for parameter in config.build(device="meta").parameters())
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert needed_memory(config, cpu, 4) == needed_memory(config, cpu)
    saved = needed_memory(config, gpu) - needed_memory(config, gpu, 4)
    assert saved == pytest.approx(1.05 * 0.75 * moments, abs=4)
