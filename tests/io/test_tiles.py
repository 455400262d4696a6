"""The tiles that model files of format version 1 state, and the weights in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.io.tensor_file import write_tensors
from tests.io.damage import changed, refused
from tests.io.model_files import Parts


def tiles_of(content: bytes) -> dict[str, list[list[int]]]:
    tiles: dict[str, list[list[int]]] = json.loads(Parts.of(content).header["__metadata__"]["fastmaf"])["tiles"]
    return tiles


HIDDEN = "transforms.0.made.hidden.0"  # 9 rows, the last of which sees 47 of 48 inputs


@pytest.mark.parametrize(("tiles", "words"), [
    ([], "expected 1 to 9 tiles; found 0"),
    ([[0, 9, 48, 0]] * 100_000, "expected 1 to 9 tiles; found 100000"),
    ([[0, 8, 48, 0]], "expected tiles that cover 9 rows; found 8"),
    ([[1, 9, 48, 0]], "[0]: expected rows from 0 at offset 0; found [1, 9, 48, 0]"),
    ([[0, 10, 48, 0]], "[0]: expected rows from 0"),
    ([[0, 0, 48, 0]], "[0]: expected rows from 0"),
    ([[0, 9, 46, 0]], "[0]: expected a width of 47 to 48; found 46"),
    ([[0, 9, 49, 0]], "[0]: expected a width of 47 to 48; found 49"),
    ([[0, 9, 47, 0]], "hidden.0.weight: expected 423 numbers, as many as its tiles hold; found 432"),
    ([[0, 4, 48, 0], [4, 9, 48, 0]], "[1]: expected rows from 4 at offset 192"),
    ([[0, 4, 48, 0], [0, 9, 48, 192]], "[1]: expected rows from 4 at offset 192"),
    ([[0, 9, 48.0, 0]], "[0][2]: expected a whole number"),
    ([[0, 9, 48]], "[0]: expected a list of 4 entries"),
    (None, "expected a list"),
])  # fmt: skip
def test_tiles_that_are_no_packing_of_the_layer_are_refused(
    folder: Path, written: dict[str, bytes], tiles: Any, words: str
) -> None:
    assert tiles_of(written["version 1"])[HIDDEN] == [[0, 9, 48, 0]], "the table above is of another layer"
    assert words in refused("version 1", folder, changed(written["version 1"], "fastmaf", ("tiles", HIDDEN), tiles))


def test_tiles_of_layers_that_are_not_there_are_refused(folder: Path, written: dict[str, bytes]) -> None:
    content = changed(written["version 1"], "fastmaf", ("tiles", "made.hidden.9"), [[0, 1, 1, 0]])
    assert "configuration.tiles: expected the layers of the flow; 'made.hidden.9'" in refused(
        "version 1", folder, content
    )


def test_tiles_cut_otherwise_give_the_same_density_to_the_bit(folder: Path, written: dict[str, bytes]) -> None:
    """Each tile cut in two at the same width: the same numbers in the same places."""
    halves = [[0, 4, 48, 0], [4, 9, 48, 192]]
    (folder / "halves.safetensors").write_bytes(changed(written["version 1"], "fastmaf", ("tiles", HIDDEN), halves))
    one, *others = (
        fastmaf.load(folder / f"{name}.safetensors").state_dict() for name in ("maf", "version 1", "halves")
    )
    for other in others:
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_numbers_where_the_mask_hides_the_weight_are_refused(folder: Path, written: dict[str, bytes]) -> None:
    parts = Parts.of(written["version 1"])
    weight = parts.tensor(f"{HIDDEN}.weight")
    weight[1] = 1e-20  # the first unit sees one input
    parts.replace(f"{HIDDEN}.weight", weight)
    assert f"tensor {HIDDEN}.weight holds numbers where the mask hides" in refused("version 1", folder, parts.joined())


def test_a_file_of_an_earlier_version_gives_the_log_prob_that_it_gave() -> None:
    """Trained in float32 and saved by the last version with tiles, with values that its float64 copy gave."""
    saved = fastmaf.load_with_extras(Path(__file__).parent / "data" / "version_1.safetensors")
    log_prob = saved.flow.double().log_prob(saved.extras["x"])
    torch.testing.assert_close(log_prob, saved.extras["log_prob"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_few_numbers_do_not_unfold_into_many(tmp_path: Path, version: int) -> None:
    """65,535 rows that see one input and one that sees all: 1.5 MB, in panels that share widths 1.2 GB."""
    features, units = 300_000, 2**16
    block = {
        "type": "affine_autoregressive", "features": features, "hidden_features": [units, 1], "activation": "relu",
        "strict": True, "log_scale_bound": 5.0, "soft_bound": False,
    }  # fmt: skip
    name = "transforms.0.made"
    tiles = {
        f"{name}.hidden.0": [[0, units - 1, 1, 0], [units - 1, units, features, units - 1]],
        f"{name}.hidden.1": [[0, 1, units, 0]],
        f"{name}.output": [[0, 2 * features, 0, 0]],
    }
    tensors = {
        f"{name}.degrees_0": torch.tensor([1] * (units - 1) + [features], dtype=torch.int32),
        f"{name}.degrees_1": torch.tensor([features], dtype=torch.int32),
        f"{name}.hidden.0.weight": torch.zeros(units - 1 + features),
        f"{name}.hidden.0.bias": torch.zeros(units),
        f"{name}.hidden.1.weight": torch.zeros(units),
        f"{name}.hidden.1.bias": torch.zeros(1),
        f"{name}.output.weight": torch.zeros(0),
        f"{name}.output.bias": torch.zeros(2 * features),
    }
    config = {"version": version, "class": "MAF", "features": features, "transforms": [block]}
    path = tmp_path / "long.safetensors"
    write_tensors(tensors, path, {"fastmaf": json.dumps(config | ({"tiles": tiles} if version == 1 else {}))})
    with pytest.raises(fastmaf.CheckpointError, match=r"numbers would take \d{9} in memory"):
        fastmaf.load(path)
