"""The commands of the published run on a small data set, and one clear line for every mistake in the data."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastmaf
import fastmaf.reproduction
from fastmaf.capsule import train
from fastmaf.capsule.config import GUARDED, TrainConfig
from fastmaf.capsule.synthetic import DEFECTS, draw_dataset
from tests.cli.command import Fastmaf, assert_one_error, fastmaf_process

SMALL = ("--size", "8", "--blocks", "2", "--hidden", "16,16", "--batch-size", "4", "--epochs", "1", "--quiet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return draw_dataset(root, train=8, good=3, defects={"crack": 2, "poke": 2}, size=32, progress=False)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained model; not to be changed."""
    out = tmp_path_factory.mktemp("trained")
    train.train(
        data, out, TrainConfig(size=8, blocks=2, hidden_features=(16, 16), epochs=1, batch_size=4), progress=False
    )
    return out


@pytest.mark.slow
def test_from_drawing_to_evaluation(run: Fastmaf, tmp_path: Path) -> None:
    """Every command in turn on the files of the one before; the long ones as processes of their own."""
    data, out = tmp_path / "capsules", tmp_path / "run"
    done = run("capsule", "demo-data", data, "--train", 10, "--size", 32, "--quiet")
    assert done == (0, f"drew the synthetic capsules into {data}\n", "")
    assert len(list((data / "train" / "good").iterdir())) == 10
    assert {p.name for p in (data / "test").iterdir()} == {"good", *DEFECTS}

    done = fastmaf_process("capsule", "train", "--data", data, "--out", out, *SMALL)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert re.search(
        r"^epoch 1: NLL [\d,-]+ nats, held-out NLL [\d,-]+ nats, -?\d\.\d{3} bits/dim", done.out, re.MULTILINE
    )
    assert f"model: {out / 'model.safetensors'}" in done.out

    done = run("capsule", "sample", out, "--out", out, "-n", 3, "--quiet")
    assert done.code == 0, done.err
    assert done.out.startswith("3 samples in ")
    assert len(list((out / "samples").iterdir())) == 3

    done = fastmaf_process("capsule", "eval", "--data", data, out / "model.safetensors", "--out", out, "--quiet")
    assert done.code == 0, done.err
    assert "132 test images: 23 normal, 109 defective" in done.out
    assert "threshold Youden" in done.out
    assert "threshold held-out" in done.out
    assert json.loads((out / "metrics.json").read_text())["n_anomalous"] == 109
    for name in ("nll_curve.png", "samples.png", "nll_hist_good_defect.png", "roc_curve.png"):
        with Image.open(out / name) as picture:
            picture.load()


def test_an_error_as_the_user_sees_it(tmp_path: Path) -> None:
    """In a process of its own; the other errors are tested in this process."""
    (tmp_path / "empty").mkdir()
    done = fastmaf_process("capsule", "train", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert_one_error(done, f"no folder train/good in {tmp_path / 'empty'}", "expected:", "found:", "0 images")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "nothing is written before the data are read"


def test_skip_bad_continues_and_names_the_file(
    run: Fastmaf, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    cut(broken / "train" / "good" / "003.png")
    done = run("capsule", "train", "--data", broken, "--out", tmp_path / "out", *SMALL, "--skip-bad")
    assert done.code == 0, done.err
    assert any(re.match(r"skipped: .*003\.png", message) for message in caplog.messages)
    assert "1 file skipped" in done.err
    assert fastmaf.load(tmp_path / "out" / "model.safetensors").features == 192


def cut(path: Path) -> None:
    """Cuts a file in the middle."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_an_empty_folder(run: Fastmaf, tmp_path: Path) -> None:
    (tmp_path / "train" / "good").mkdir(parents=True)
    done = run("capsule", "train", "--data", tmp_path, "--out", tmp_path / "out", *SMALL)
    assert_one_error(
        done, f"no image in {tmp_path / 'train' / 'good'}", "it is empty", "expected:", "train/good/  0 images"
    )


def test_a_folder_one_level_off(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "capsule")
    done = run("capsule", "train", "--data", tmp_path, "--out", tmp_path / "out", *SMALL)
    assert_one_error(done, f"did you mean {tmp_path / 'capsule'} (it holds train/good)?")


@pytest.mark.parametrize("command", ["train", "eval", "reproduce"])
def test_a_text_file_named_png(run: Fastmaf, data: Path, trained: Path, tmp_path: Path, command: str) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "data"))
    text_file = bad / ("test/crack/001.png" if command == "eval" else "train/good/001.png")
    text_file.write_text("Hello, I am not an image.")
    settings = (trained, "--quiet") if command == "eval" else SMALL
    done = run("capsule", command, "--data", bad, "--out", tmp_path / "out", *settings)
    assert_one_error(done, str(text_file), "not a readable image")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_truncated_png(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(data, tmp_path / "data"))
    cut(bad / "train" / "good" / "003.png")
    done = run("capsule", "train", "--data", bad, "--out", tmp_path / "out", *SMALL)
    assert_one_error(done, str(bad / "train" / "good" / "003.png"))


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_file_that_is_no_model(run: Fastmaf, data: Path, tmp_path: Path, command: str) -> None:
    wrong = tmp_path / "model.safetensors"
    wrong.write_text("not a model")
    options = ("--data", data) if command == "eval" else ()
    assert_one_error(
        run("capsule", command, *options, wrong, "--out", tmp_path), str(wrong), "not a safetensors file, or is damaged"
    )
    wrong.unlink()
    assert_one_error(run("capsule", command, *options, tmp_path, "--out", tmp_path), f"no model file at {wrong}")


def test_a_model_of_another_shape(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    fastmaf.MAF(7, 1, (8,), seed=0).save(other)
    done = run("capsule", "eval", "--data", data, other, "--out", tmp_path)
    assert_one_error(done, f"{other}: expected a model of square RGB images", "found 7 features")


def test_resuming_a_model_of_another_size(run: Fastmaf, data: Path, trained: Path) -> None:
    settings = [{"8": "16"}.get(word, word) for word in SMALL]
    done = run("capsule", "train", "--data", data, "--out", trained, *settings, "--resume", "--lr", "1e-4")
    assert_one_error(done, f"cannot resume {trained} with other settings (size: was 8, now 16)")


def test_nothing_to_resume(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    assert_one_error(
        run("capsule", "train", "--data", data, "--out", tmp_path, *SMALL, "--resume"),
        f"nothing to resume in {tmp_path}",
    )


def test_a_device_that_is_not_there(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    assert_one_error(
        run("capsule", "train", "--data", data, "--out", tmp_path / "out", *SMALL, "--device", "cuda:99"), "CUDA"
    )
    assert not (tmp_path / "out").exists()


def test_demo_data_does_not_touch_a_foreign_folder(run: Fastmaf, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    done = run("capsule", "demo-data", tmp_path, "--train", 1, "--size", 32)
    assert_one_error(done, f"{tmp_path} is not empty", "holiday.jpg", "nothing was written")
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_leaky_masks_say_what_they_are_and_do_not_sample(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    done = run("capsule", "train", "--data", data, "--out", tmp_path, *SMALL, "--masks", "reference")
    assert done.code == 0
    assert ">= instead of >" in done.err
    assert "no density" in done.err
    done = run("capsule", "sample", tmp_path, "--out", tmp_path, "--quiet")
    assert done.code == 1
    assert_one_error(done, "leaky output mask", "train with strict masks to sample")
    assert run("capsule", "eval", "--data", data, tmp_path, "--out", tmp_path, "--quiet").code == 0


def test_a_loss_that_is_not_finite(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    done = run("capsule", "train", "--data", data, "--out", tmp_path, *SMALL, "--lr", "1e30")
    assert_one_error(done, "NLL of a batch became", "no model was written", "--lr")


def test_ctrl_c_before_training(run: Fastmaf, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    done = run("capsule", "train", "--data", data)
    assert done.code == 130
    assert "Traceback" not in done.err


ConfigOf = Callable[..., TrainConfig]


@pytest.fixture
def config_of(run: Fastmaf, monkeypatch: pytest.MonkeyPatch) -> ConfigOf:
    """The settings that a command line passes on to the training or the reproduction."""
    configs: list[TrainConfig] = []

    def record(*positional: Any, **_: Any) -> None:
        configs.append(next(value for value in positional if isinstance(value, TrainConfig)))
        raise ValueError("recorded")

    def call(*arguments: object) -> TrainConfig:
        monkeypatch.setattr(train, "train", record)
        monkeypatch.setattr(fastmaf.reproduction, "reproduce", record)
        assert_one_error(run(*arguments), "recorded")
        return configs[-1]

    return call


def test_the_defaults_of_training(config_of: ConfigOf) -> None:
    config = config_of("capsule", "train", "--data", ".")
    assert config == TrainConfig()
    assert (config.size, config.blocks, config.hidden_features, config.epochs) == (64, 7, (512, 512), 100)
    assert (config.lr, config.batch_size, config.holdout) == (1e-4, 8, 0.1)
    assert (config.order, config.masks) == ("natural", "strict")


@pytest.mark.parametrize(
    ("options", "guarded"),
    [
        (("--order", "alternate"), True),
        (("--order", "random"), True),
        (("--order", "alternate", "--no-guards"), False),
        (("--guards",), True),
        ((), False),
    ],
)
def test_orders_that_are_not_natural_are_guarded(config_of: ConfigOf, options: tuple[str, ...], guarded: bool) -> None:
    config = config_of("capsule", "train", "--data", ".", *options)
    assert all((getattr(config, name) == value) is guarded for name, value in GUARDED.items())


@pytest.mark.parametrize("order", ["natural", "alternate"])
def test_a_given_learning_rate_is_used(config_of: ConfigOf, order: str) -> None:
    assert config_of("capsule", "train", "--data", ".", "--order", order, "--lr", "7e-4").lr == 7e-4


@pytest.mark.parametrize(
    ("options", "epochs", "holdout"),
    [((), 20, 0.1), (("--data", "."), 100, 0.0), (("--data", ".", "--epochs", "5", "--holdout", "0.2"), 5, 0.2)],
)
def test_reproduce_uses_the_settings_of_the_published_run(
    config_of: ConfigOf, options: tuple[str, ...], epochs: int, holdout: float
) -> None:
    assert config_of("capsule", "reproduce", *options) == TrainConfig(degrees="random", epochs=epochs, holdout=holdout)


def test_reproduce_has_the_options_of_train(config_of: ConfigOf) -> None:
    config = config_of("capsule", "reproduce", "--levels", "9", "--guards", "--hidden", "24, 16")
    guarded = {name: getattr(config, name) for name in GUARDED}
    assert (config.levels, guarded, config.hidden_features) == (9, GUARDED, (24, 16))


def test_reproduce_prints_both_runs(run: Fastmaf, data: Path, tmp_path: Path) -> None:
    done = run("capsule", "reproduce", "--data", data, "--out", tmp_path, *SMALL)
    assert done.code == 0, done.err
    assert "published run" in done.out
    assert "8,003" in done.out
    assert (tmp_path / "comparison.txt").read_text(encoding="utf-8").strip() in done.out
    assert "note: " in done.err, "gaps between random degrees at this size are reported in one line"
    assert "UserWarning" not in done.err


def test_doctor_on_a_console_without_arrows() -> None:
    """A Windows console, or a pipe there, may be able to write Latin letters only."""
    done = fastmaf_process("doctor", PYTHONIOENCODING="ascii")
    assert done.code == 0, done.err
    assert "affine_output" in done.out
