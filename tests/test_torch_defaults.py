"""torch's factory settings within a block, and the caller's again after it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.models import load_model, nll_of
from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.capsule.train import train
from fastmaf.inspection.model import load_inspection
from tests.inspection.tiny import TINY


def _set_and_reset(set_: Callable[[Any], object], value: object, before: object) -> AbstractContextManager[None]:
    @contextmanager
    def manager() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # set_default_tensor_type is deprecated
            set_(value)
            try:
                yield
            finally:
                set_(before)

    return manager()


FOREIGN: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: _set_and_reset(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _set_and_reset(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "tensor type": lambda: _set_and_reset(torch.set_default_tensor_type, torch.DoubleTensor, torch.FloatTensor),
    "default device": lambda: _set_and_reset(torch.set_default_device, "meta", None),
    "a device's context": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "precision": lambda: _set_and_reset(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: _set_and_reset(torch.use_deterministic_algorithms, True, False),
}
every_setting = pytest.mark.parametrize("name", FOREIGN)


def state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
    )


FACTORY = (torch.float32, torch.device("cpu"), True, False, False, "highest")


@every_setting
def test_factory_settings_within_and_the_caller_s_after(name: str) -> None:
    with FOREIGN[name]():
        before = state()
        with fastmaf.torch_defaults():
            assert state() == FACTORY
            with fastmaf.torch_defaults():
                assert state() == FACTORY
            assert state() == FACTORY
        assert state() == before
        with pytest.raises(KeyError), fastmaf.torch_defaults():
            raise KeyError
        assert state() == before
    assert state() == FACTORY


def test_threads_that_overlap_restore_what_was_set() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with fastmaf.torch_defaults():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with FOREIGN["float64"]():
        thread = threading.Thread(target=other)
        with fastmaf.torch_defaults():
            thread.start()
            inside.wait(10)
        leave.set()
        thread.join()
        assert seen == [torch.float32] and torch.get_default_dtype() == torch.float64


def images(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pixels = 100 + rng.normal(0, 10, (n, 1, 1, 1)) + rng.normal(0, 4, (n, 16, 16, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def inspected(folder: Any) -> list[np.ndarray]:
    """What a detector says of images and of rows, fitted, saved and loaded under the settings of the caller."""
    file = folder / "detector.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples, and blocks of five steps
        found = fastmaf.Detector(size=16, rank=8, blocks=2, steps=5).fit(images(12, 0))
        rows = fastmaf.Detector().fit(images(12, 2).reshape(12, -1)[:, :6])
    found.save(file)
    loaded, new = fastmaf.Detector.load(file), images(4, 1)
    tensors = [*found.model_.flow.state_dict().values(), found.model_.statistics.mean]
    tensors += [*loaded.model_.flow.state_dict().values(), *load_inspection(file).flow.state_dict().values()]
    assert all((t.dtype, t.device.type, t.is_inference()) == (torch.float32, "cpu", False) for t in tensors)
    scores = [loaded.anomaly_score(new), found.score_samples(new), found.p_values(new), found.predict(new)]
    pixels = torch.from_numpy(new).permute(0, 3, 1, 2).contiguous()
    predicted = loaded.model_.predict(pixels)
    held_out = [found.calibration_.scores, rows.calibration_.scores, rows.anomaly_score(np.ones((2, 6)))]
    return [
        *scores,
        found.anomaly_map(new),
        predicted.nll,
        predicted.anomaly_maps,
        *held_out,
        *(t.numpy() for t in tensors),
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    return inspected(tmp_path_factory.mktemp("plain"))


@every_setting
def test_a_detector_has_its_own_settings(name: str, expected: list[np.ndarray], tmp_path: Any) -> None:
    with FOREIGN[name]():
        found = inspected(tmp_path)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return draw_dataset(
        tmp_path_factory.mktemp("set") / "d", train=6, good=1, defects={"crack": 1}, size=32, progress=False
    )


def trained(data: Any, out: Any) -> list[np.ndarray]:
    """The weights of a run of the reference recipe, and the NLLs of images by its loaded model."""
    from fastmaf.images.dataset import load_test

    config = TrainConfig(size=8, epochs=2, batch_size=3, blocks=2, hidden_features=(8,), order="alternate")
    flow = train(data, out, config, progress=False).flow
    loaded = load_model(out).flow
    tensors = [*flow.state_dict().values(), *loaded.state_dict().values()]
    assert not any(t.is_inference() for t in tensors)
    nll = nll_of(loaded, load_test(data, size=8, progress=False), progress=False)
    return [nll, *(t.detach().numpy() for t in tensors)]


@pytest.mark.slow
@every_setting
def test_a_run_of_the_published_recipe_has_its_own_settings(name: str, data: Any, tmp_path: Any) -> None:
    plain = trained(data, tmp_path / "plain")
    with FOREIGN[name]():
        found = trained(data, tmp_path / "foreign")
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_choosing_and_fitting_take_inference_tensors() -> None:
    from fastmaf.inspection.fit import fit

    pixels = torch.from_numpy(images(12, 0)).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        given = pixels.clone()
        assert given.is_inference()
        found = fit(given, TINY, progress=False).model
    np.testing.assert_array_equal(found.scores(given), fit(pixels, TINY, progress=False).model.scores(pixels))
