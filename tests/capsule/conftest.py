"""Fixtures of the tests of training runs; other modules here have a ``data`` of their own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmaf.capsule import training_run
from fastmaf.capsule.models import Model, load_model
from fastmaf.capsule.synthetic import draw_dataset
from tests.capsule.runs import CLASSES, IMAGES, run, with_


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("capsules")
    return draw_dataset(root, train=IMAGES, good=0, defects={}, size=32, progress=False)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a data set with test images; not to be changed."""
    root = tmp_path_factory.mktemp("labelled")
    return draw_dataset(root, train=12, good=4, defects=CLASSES, size=32, progress=False)


@pytest.fixture(scope="session")
def model(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model trained on the labelled set, with three images held out."""
    out = tmp_path_factory.mktemp("model")
    return load_model(run(labelled, out, with_(epochs=3, holdout=0.25)).model)


@pytest.fixture
def undrawn() -> Iterator[None]:
    """Leaves the curve undrawn: that takes most of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "nll_curve", lambda path, *_: path.touch())
        yield


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after every epoch, not twice a minute."""
    monkeypatch.setattr(training_run, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal, also where the test runner was started with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "training left its handler behind"
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    run(data, out)
    return out
