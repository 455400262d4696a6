"""Settings and images of a resumed run must be those of the original run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.training.checkpoints import STATE_FILE, load_state
from tests.capsule.runs import as_earlier_version, rows, run, same, tensors_of, with_

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, r"lr: was 0\.001, now 0\.002"),
        ({"size": 16}, r"size: was 8, now 16"),
        ({"hidden_features": (16, 8), "seed": 5}, r"hidden_features: was \[16, 16\], now \[16, 8\], seed: was 0"),
        ({"order": "alternate", "epochs": 9}, r"order: was 'natural', now 'alternate'\)"),
        ({"holdout": 0.3}, r"holdout: was 0\.2, now 0\.3"),
    ],
)
def test_resuming_with_other_settings_names_them(
    data: Path, finished: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match=r"cannot resume .* with other settings .*" + message):
        run(data, out, with_(**changes), resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before, "no file changes"


def test_resuming_with_other_files_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "data", Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.copytree(data, other)
    (other / "train" / "good" / load_state(finished)[1]["files"][3]).unlink()
    with pytest.raises(ValueError, match=r"cannot resume .* trained on 8 images, the data now hold 7 others"):
        run(other, out, with_(epochs=3), resume=True)
    assert len(rows(out)) == 2


def copied(data: Path, finished: Path, tmp_path: Path) -> tuple[Path, Path, list[Path]]:
    """Returns copies of the data and of the run, and the training images in the copy."""
    other, out = Path(shutil.copytree(data, tmp_path / "data")), Path(shutil.copytree(finished, tmp_path / "run"))
    return other, out, sorted((other / "train" / "good").iterdir())


@pytest.mark.parametrize("held_out", [False, True])
def test_resuming_with_a_changed_image_names_it(data: Path, finished: Path, tmp_path: Path, held_out: bool) -> None:
    other, out, files = copied(data, finished, tmp_path)
    trained_on = load_state(out)[1]["files"]
    first, second = [file for file in files if (file.name not in trained_on) is held_out][:2]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    longer = first.read_bytes() + b"\0"  # beyond the end of a PNG: the same picture
    first.write_bytes(longer)
    message = rf"cannot resume .*: 1 of 10 images changed .* began: {first.name} \(was {len(longer) - 1:,} bytes, now "
    with pytest.raises(ValueError, match=message):
        run(other, out, with_(epochs=3), resume=True)
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    message = rf"2 of 10 images changed .*{second.name} \(of the same size, but with other contents\)"
    with pytest.raises(ValueError, match=message):
        run(other, out, with_(epochs=3), resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "no file changes"


def test_resuming_with_two_pictures_exchanged_names_both(data: Path, finished: Path, tmp_path: Path) -> None:
    other, out, files = copied(data, finished, tmp_path)
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(ValueError, match=rf"2 of 10 images changed .*{files[0].name} .*{files[1].name} "):
        run(other, out, with_(epochs=3), resume=True)


def test_resuming_with_a_renamed_image_names_the_old_and_the_new(data: Path, finished: Path, tmp_path: Path) -> None:
    other, out, files = copied(data, finished, tmp_path)
    files[4].rename(files[4].with_name("renamed.png"))
    with pytest.raises(ValueError, match=rf"cannot resume .*\(missing: {files[4].name}; new: renamed.png\)"):
        run(other, out, with_(epochs=3), resume=True)


def test_resuming_elsewhere_with_the_same_images_is_the_same_run(data: Path, finished: Path, tmp_path: Path) -> None:
    """Neither the path nor the times of the files matter; a folder of images without train/good is the same data."""
    other, out, files = copied(data, finished, tmp_path)
    for file in files:
        os.utime(file, (0, 0))
    assert len(run(other / "train" / "good", out, with_(epochs=3), resume=True).log) == 3


def test_a_state_of_an_earlier_version_resumes_with_a_note(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = copied(data, finished, tmp_path)
    as_earlier_version(out)
    run(data, out, with_(epochs=3), resume=True)
    assert "without the contents of its images: only their names were compared" in capsys.readouterr().err
    run(data, tmp_path / "whole", with_(epochs=3))
    assert same(tensors_of(out), tensors_of(tmp_path / "whole"))
    assert "contents" in load_state(out)[1], "they are stored from now on"


def test_a_state_of_an_earlier_version_still_compares_names(data: Path, finished: Path, tmp_path: Path) -> None:
    other, out, files = copied(data, finished, tmp_path)
    as_earlier_version(out)
    files[3].unlink()
    with pytest.raises(ValueError, match=r"trained on 8 images, the data now hold 7 others"):
        run(other, out, with_(epochs=3), resume=True)


def test_settings_of_earlier_versions_resume_under_their_new_names(data: Path, tmp_path: Path) -> None:
    config = with_(epochs=1, masks="published", degrees="random", max_loss_jump=50.0)
    assert with_(masks="reference") == with_(masks="published")
    run(data, tmp_path, config)
    tensors, metadata = read_tensors(tmp_path / STATE_FILE)
    state = json.loads(metadata["state"])
    state["config"]["max_leap"] = state["config"].pop("max_loss_jump")
    state["config"]["masks"] = "reference"
    write_tensors(tensors, tmp_path / STATE_FILE, {"state": json.dumps(state)})
    with pytest.raises(ValueError, match=r"max_loss_jump: was 50\.0, now 5\.0\)"):
        run(data, tmp_path, dataclasses.replace(config, epochs=2, max_loss_jump=5.0), resume=True)
    assert len(run(data, tmp_path, dataclasses.replace(config, epochs=2), resume=True).log) == 2
