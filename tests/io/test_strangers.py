"""Model files from strangers: what each wrong value and size is refused with, and that files of today still load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaf
from fastmaf.capsule.models import load_model
from fastmaf.inspection.fold_models import load_fold_models
from fastmaf.inspection.model import load_inspection
from fastmaf.io.tensor_file import read_tensors
from fastmaf.training.checkpoints import load_state, moments_by_parameter, save_state
from tests.io.damage import changed, refused
from tests.io.model_files import Parts, flows
from tests.io.version_1 import version_1_state

WEIGHT = "transforms.0.made.hidden.0.weight/exp_avg"
BLOCK, WHITENING, LOCAL = ("transforms", 0), ("transforms", 1), ("transforms", 2)


CONFIGURATION: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("maf", ("class",), "Evil", "configuration.class: expected one of 'MAF', 'Flow', 'IAF'; found 'Evil'"),
    ("maf", ("class",), ["MAF"], "configuration.class: expected one of 'MAF', 'Flow', 'IAF'; found ['MAF']"),
    ("maf", ("version",), 1.0, "configuration.version: expected a whole number"),
    ("maf", ("version",), 3, "format version 3; this fastmaf reads versions 1 and 2: update fastmaf"),
    ("maf", ("version",), 1, "configuration: the entry 'tiles' is missing"),
    ("version 1", ("version",), 2, "configuration: unknown entry 'tiles'"),
    ("maf", ("features",), 48.0, "configuration.features: expected a whole number from 1 to 268435456; found 48.0"),
    ("maf", ("features",), True, "configuration.features: expected a whole number from 1 to 268435456; found True"),
    ("maf", ("features",), 10**9, "configuration.features: expected a whole number"),
    ("maf", ("features",), "@nan", "configuration.features: expected a finite number; found NaN"),
    ("maf", ("features",), "@nested", "configuration: nested more than 32 deep"),
    ("maf", ("features",), "@repeated", "the key 'a' appears twice in one object"),
    ("maf", ("transforms",), {}, "configuration.transforms: expected a list"),
    ("maf", ("transforms",), [{}] * 100_000, "configuration.transforms: expected a list of 0 to 4096 entries"),
    ("maf", (*BLOCK, "type"), "__class__", "configuration.transforms[0].type: expected one of"),
    ("maf", (*BLOCK, "type"), [], "configuration.transforms[0].type: expected one of"),
    ("maf", (*BLOCK, "activation"), "nope", "transforms[0].activation: expected one of 'identity', 'relu'"),
    ("maf", (*BLOCK, "soft_bound"), "x", "transforms[0].soft_bound: expected true or false; found 'x'"),
    ("maf", (*BLOCK, "strict"), 1, "transforms[0].strict: expected true or false; found 1"),
    ("maf", (*BLOCK, "features"), 12.0, "transforms[0].features: expected a whole number"),
    ("maf", (*BLOCK, "features"), 47, "transforms[0].features: expected 48, the flow's; found 47"),
    ("maf", (*BLOCK, "log_scale_bound"), 1e308, "transforms[0].log_scale_bound: expected a finite number at least"),
    ("maf", (*BLOCK, "log_scale_bound"), 0, "transforms[0].log_scale_bound: expected a finite number at least"),
    ("maf", (*BLOCK, "log_scale_bound"), 10**400, "transforms[0].log_scale_bound: expected a finite number"),
    ("random orders", (*BLOCK[:1], 1, "log_scale_bound"), None, "transforms[1].log_scale_bound: expected a number, as"),
    ("maf", (*BLOCK, "hidden_features"), [], "transforms[0].hidden_features: expected a list of 1 to 1024"),
    ("maf", (*BLOCK, "hidden_features", 1), 7.0, "transforms[0].hidden_features[1]: expected a whole number"),
    ("maf", (*BLOCK, "hidden_features", 1), 10**8, "transforms.0.made.degrees_1: expected (100000000,) torch.int32"),
    ("maf", (*BLOCK, "\x1b[2J"), 1, r"transforms[0]: unknown entry '\x1b[2J'"),
    (
        "maf",
        (*BLOCK, "activation"),
        "x" * 10**6,
        "'silu', or a list of these; found 'xxx",
    ),
    ("inference copy", (*BLOCK, "weight_dtype"), "float", "transforms[0].weight_dtype: expected one of"),
    ("images", (*BLOCK, "alpha"), 0.5, "transforms[0].alpha: expected a finite number at least 0 and less than 0.5"),
    ("images", (*WHITENING, "rank"), 10**9, "transforms[1].rank: expected at most 48, the features"),
    ("images", (*WHITENING, "rank"), 48, "transforms.1.factors: expected (48, 48) torch.float32, found (48, 3)"),
    ("images", (*LOCAL, "shape"), [3, 4], "transforms[2].shape: expected a list of 3 entries; found [3, 4]"),
    ("images", (*LOCAL, "shape"), [48, 10**6, 10**6], "transforms[2].shape: expected 48 numbers"),
    ("images", (*LOCAL, "patch"), 3, "transforms[2].patch: expected a power of two that divides 4 and 4; found 3"),
    ("images", (*LOCAL, "kernel"), 65_535, "linear.weight: expected (12, 12, 65535, 65535)"),
    ("images", (*LOCAL, "hidden"), 10**9, "first.weight: expected (12000000000, 12, 3, 3)"),
    ("images", (*LOCAL, "reverse"), 0, "transforms[2].reverse: expected true or false; found 0"),
]


@pytest.mark.parametrize(("kind", "place", "value", "words"), CONFIGURATION, ids=range(len(CONFIGURATION)))
def test_each_value_of_a_configuration_is_checked(
    folder: Path, written: dict[str, bytes], kind: str, place: tuple[Any, ...], value: Any, words: str
) -> None:
    assert words in refused(kind, folder, changed(written[kind], "fastmaf", place, value))


RECORDS: list[tuple[str, str, tuple[Any, ...], Any, str]] = [
    ("inspection", "inspection", ("settings", "kind"), "nope", "inspection.settings.kind: expected one of"),
    ("inspection", "inspection", ("settings", "sigma"), 1e308, "inspection.settings.sigma: expected a finite number"),
    ("inspection", "inspection", ("settings", "sigma"), 1e-300, "inspection.settings.sigma: expected a finite number"),
    ("inspection", "inspection", ("settings", "presmooth_sigma"), 1e-300, "presmooth_sigma: expected 0 or at least"),
    ("inspection", "inspection", ("settings", "top"), True, "inspection.settings.top: expected a finite number"),
    ("inspection", "inspection", ("settings", "clip"), 1e308, "inspection.settings.clip: expected a finite number"),
    ("inspection", "inspection", ("settings",), [], "inspection.settings: expected an object; found []"),
    ("inspection", "inspection", ("map_config", "factors"), 2.0, "inspection.map_config.factors: expected a whole"),
    ("inspection", "inspection", ("map_config", "rms"), 0, "inspection.map_config.rms: expected a finite number"),
    ("inspection", "inspection", ("nll",), None, "inspection.nll: expected a finite number; found None"),
    ("inspection", "inspection", ("nll",), "@nan", "inspection.nll: expected a finite number; found NaN"),
    ("inspection", "inspection", ("calibration", "how"), "x", "inspection.calibration.how: expected one of"),
    ("inspection", "inspection", ("calibration", "folds"), 3.0, "inspection.calibration.folds: expected a whole"),
    ("inspection", "inspection", ("calibration", "false_alarm"), 5e-324, "calibration.false_alarm: expected a finite"),
    ("inspection", "inspection", ("calibration", "created"), "yesterday", "created must be an ISO date or None"),
    ("inspection", "inspection", ("about",), [], "inspection.about: expected an object; found []"),
    ("inspection", "inspection", ("about", "recipe"), [], "inspection.about.recipe: expected an object; found []"),
    ("inspection", "inspection", ("about", "recipe", "rank"), "3", "inspection.about.recipe.rank: expected a whole"),
    ("inspection", "inspection", ("about", "map_levels"), [1], "inspection.about.map_levels: expected a list of 2"),
    ("inspection", "inspection", ("about", "map_levels", 0), "@nan", "map_levels[0]: expected a finite number"),
    ("inspection", "inspection", ("about", "images_of_folds"), [3], "held_out_nll_of_folds: expected 1 numbers"),
    ("inspection", "inspection", ("about", "held_out_nll"), "x", "inspection.about.held_out_nll: expected a finite"),
    ("inspection", "inspection", (), [], "inspection: expected an object; found []"),
    ("maf", "training", ("held_out",), "a.png", "training.held_out: expected a list"),
    ("maf", "training", ("held_out", 0), 3, "training.held_out[0]: expected text"),
    ("maf", "training", (), "@nested", "training: nested more than 32 deep"),
    ("training_state", "state", ("epochs_done",), 2, "state.log: expected 2 rows, one an epoch; found 1"),
    ("training_state", "state", ("guards", "warming"), 1, "state.guards.warming: expected true or false; found 1"),
    ("training_state", "state", ("guards", "usual_nll"), "@nan", "state.guards.usual_nll: expected a finite number"),
    ("training_state", "state", ("log", 0, "nll"), "4", "state.log[0].nll: expected a number; found '4'"),
    ("training_state", "state", ("config",), None, "state.config: expected an object; found None"),
    ("training_state", "state", ("steps",), 2.5, "state.steps: expected a whole number"),
    ("training_state", "state", (), {}, "state: the entry 'config' is missing; found []"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "place", "value", "words"), RECORDS, ids=range(len(RECORDS)))
def test_each_value_beside_a_flow_is_checked(
    folder: Path, written: dict[str, bytes], kind: str, key: str, place: tuple[Any, ...], value: Any, words: str
) -> None:
    assert words in refused(kind, folder, changed(written[kind], key, place, value))


@pytest.mark.parametrize(("name", "value", "words"), [
    ("scale", 3e38, "scale must be at most"),
    ("scale", 1e-45, "scale must be at least"),
    ("mean", -3e38, "mean must be at most"),
    ("variance", 3e38, "variance must be at most"),
    ("factors", 3e38, "factors must have columns of norm 1, or 0"),
    ("factors", 0.5, "factors must have columns of norm 1, or 0"),
])  # fmt: skip
def test_a_whitening_that_cannot_compute_is_refused(
    folder: Path, written: dict[str, bytes], name: str, value: float, words: str
) -> None:
    for kind, place in (("images", 1), ("inspection", 0)):
        parts = Parts.of(written[kind])
        tensor = parts.tensor(f"transforms.{place}.{name}")
        tensor[:2] = value
        parts.replace(f"transforms.{place}.{name}", tensor)
        assert f"tensor transforms.{place}.{words}" in refused(kind, folder, parts.joined())


@pytest.mark.parametrize(("name", "value"), [("term_mean", 3e38), ("term_deviation", 1e-45), ("term_deviation", -1.0)])
def test_statistics_that_cannot_compute_are_refused(
    folder: Path, written: dict[str, bytes], name: str, value: float
) -> None:
    parts = Parts.of(written["inspection"])
    tensor = parts.tensor(f"extra.{name}")
    tensor[3] = value
    parts.replace(f"extra.{name}", tensor)
    assert f"tensor {name}: expected finite numbers" in refused("inspection", folder, parts.joined())


@pytest.mark.parametrize(("change", "words"), [
    ({"F32": "F64"}, "bytes for shape"),
    ({"F32": "I32"}, "output.bias: expected (96,) torch.float32, found (96,) torch.int32|floating-point dtype"),
    ({"I32": "F32"}, "degrees_0: expected (9,) torch.int32, found (9,) torch.float32"),
])  # fmt: skip
def test_dtypes_are_checked(folder: Path, written: dict[str, bytes], change: dict[str, str], words: str) -> None:
    parts = Parts.of(written["maf"])
    for name, entry in parts.header.items():
        if name != "__metadata__":
            entry["dtype"] = change.get(entry["dtype"], entry["dtype"])
    assert any(word in refused("maf", folder, parts.joined()) for word in words.split("|"))


def test_fold_models_of_another_size_are_refused(folder: Path) -> None:
    model = load_inspection(folder / "inspection.safetensors")
    mark = read_tensors(folder / "folds" / "fold-1.safetensors", tensors=False)[1]
    fastmaf.MAF(12, 1, (4,), seed=0).save(folder / "folds" / "fold-1.safetensors", {"statistics": mark["statistics"]})
    with pytest.raises(fastmaf.CheckpointError, match=r"fold-1.safetensors: expected a flow of 48 features"):
        load_fold_models(folder, model)


def test_a_model_of_float64_is_no_model_of_images(folder: Path) -> None:
    flows()["maf"].double().save(folder / "double.safetensors")
    with pytest.raises(fastmaf.CheckpointError, match=r"double.safetensors: expected a float32 model of images"):
        load_model(folder / "double.safetensors")


@pytest.mark.parametrize(("change", "words"), [
    (lambda moments: moments.pop(min(moments)), "is missing or unexpected"),
    (lambda moments: moments.update(more=torch.zeros(1)), "'more' is missing or unexpected"),
    (lambda moments: moments.update({min(moments): torch.zeros(1)}), r"expected \(\d+,\) torch.float32; found \(1,\)"),
    (lambda moments: moments[min(moments)].fill_(torch.nan), "expected finite numbers"),
    (lambda moments: moments.update({WEIGHT: moments[WEIGHT][1:]}), r"expected \d+ weights; found shape \(\d+,\)"),
    (lambda moments: moments.update({WEIGHT: moments[WEIGHT].long()}), "must be of one of .*; found torch.int64"),
    (lambda moments: moments[max(k for k in moments if k.endswith("step"))].fill_(-1), "that are not negative"),
])  # fmt: skip
def test_moments_of_other_parameters_are_refused(folder: Path, change: Any, words: str) -> None:
    (moments, state), flow = load_state(folder), flows()["maf"]
    assert moments_by_parameter(folder, moments, state, flow)[0]["step"] == 3
    change(moments)
    with pytest.raises(fastmaf.CheckpointError, match=words):
        moments_by_parameter(folder, moments, state, flow)


@pytest.mark.parametrize("former", [False, True])
def test_moments_of_packed_weights_lie_where_the_weights_do(tmp_path: Path, former: bool) -> None:
    """Those of earlier versions lie in tiles, which the state does not mention."""
    flow, keys = flows()["maf"], ("exp_avg", "exp_avg_sq")
    moments = {f"{name}/{key}": p.detach() ** 2 for name, p in flow.named_parameters() for key in keys}
    steps = {f"{name}/step": torch.tensor(3.0) for name, _ in flow.named_parameters()}
    state = {"config": {"epochs": 1}, "epochs_done": 0, "steps": 3, "files": [], "log": [],
             "guards": {"steps": 3, "usual_nll": None, "warming": False}}  # fmt: skip
    save_state(tmp_path, flow, {**moments, **steps}, state, {"steps": 3})
    stored, found = load_state(tmp_path)
    if former:
        del found["packed"]
        tiles = {key: tensor**2 for key, tensor in version_1_state(flow).items() if key.endswith("weight")}
        stored |= {f"{name}/{key}": tensor for name, tensor in tiles.items() for key in keys}
    restored = moments_by_parameter(tmp_path, stored, found, flow)
    for i, name in enumerate(dict(flow.named_parameters())):
        for key in keys:
            assert torch.equal(restored[i][key], moments[f"{name}/{key}"])


def test_a_validation_loss_that_overflowed_does_not_stand_in_the_way(folder: Path, written: dict[str, bytes]) -> None:
    path = folder / "training_state.safetensors"
    path.write_bytes(changed(written["training_state"], "state", ("log", 0, "val_nll"), float("inf")))
    assert load_state(folder)[1]["log"][0]["val_nll"] == float("inf")
