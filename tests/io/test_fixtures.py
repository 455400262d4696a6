"""Files of released format versions, which must load for ever and compute what they did when they were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import fastmaf
from fastmaf.io.flow_config import FORMAT_VERSION
from fastmaf.training.checkpoints import load_state, moments_by_parameter
from tests.io.write_fixtures import EXPECTED, computed

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "version_2"


def test_files_of_this_version_compute_what_they_did() -> None:
    expected, found = json.loads((FOLDER / EXPECTED).read_text()), computed(FOLDER)
    assert expected.keys() == found.keys() and len(expected) == 9
    for name, values in expected.items():
        for key, value in values.items():
            if key in ("class", "transforms"):
                assert found[name][key] == value, name
            else:  # float32, on any CPU
                assert found[name][key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, key)


def test_a_run_of_this_version_can_be_resumed() -> None:
    flow = fastmaf.load(FOLDER / "model.safetensors")
    tensors, state = load_state(FOLDER)
    moments = moments_by_parameter(FOLDER, tensors, state, flow)
    assert state["epochs_done"] == 1 and moments[0]["step"] == 3
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.minimize(-flow.log_prob(torch.zeros(2, flow.features)).mean())


def test_a_new_format_version_comes_with_its_files() -> None:
    assert (DATA / f"version_{FORMAT_VERSION}").is_dir(), "write them: tests/io/write_fixtures.py"
    config = json.loads(fastmaf.load_with_extras(FOLDER / "flow-maf.safetensors").metadata["fastmaf"])
    assert config["version"] == 2


def test_the_files_are_those_that_were_released() -> None:
    """A file that is written anew would hide that the old one no longer loads."""
    digest = hashlib.sha256()
    for file in sorted(FOLDER.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    assert digest.hexdigest() == "162eb61a9652e421958c049a31b12ec763e9fdb9e0ad0ae8f13ef2394de00aca"
