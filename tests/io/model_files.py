"""Model files of every kind, tiny, and what is done to them: for tests of reading files from strangers."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastmaf
from fastmaf.capsule.models import load_model, nll_of
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.detector import Detector
from fastmaf.inspection.fold_models import load_fold_models, save_fold_models
from fastmaf.inspection.model import InspectionModel, load_inspection
from fastmaf.inspection.scoring.score import TermStatistics
from fastmaf.inspection.scoring.settings import AnomalyMapConfig, ScoreSettings
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state, moments_by_parameter, save_state
from tests.core.helpers import build, generator, normal
from tests.io.version_1 import write_version_1

SIZE = 4  # of images
D = 3 * SIZE**2


@dataclass
class Parts:
    """A safetensors file taken apart: the header as it is parsed, and the bytes of all tensors."""

    header: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> Parts:
        (length,) = struct.unpack("<Q", content[:8])
        return cls(json.loads(content[8 : 8 + length]), content[8 + length :])

    def joined(self, length: int | None = None) -> bytes:
        """Returns the file, with a header that states another length if one is given."""
        header = json.dumps(self.header).encode()
        return struct.pack("<Q", len(header) if length is None else length) + header + self.data

    def tensor(self, name: str) -> np.ndarray:
        """Returns a float32 tensor, flat; see ``replace``."""
        begin, end = self.header[name]["data_offsets"]
        return np.frombuffer(self.data[begin:end], np.float32).copy()

    def replace(self, name: str, values: np.ndarray) -> None:
        """Writes a tensor of the same size."""
        begin, end = self.header[name]["data_offsets"]
        assert values.nbytes == end - begin
        self.data = self.data[:begin] + values.tobytes() + self.data[end:]


def flows() -> dict[str, fastmaf.Flow]:
    """Returns a flow of each kind by name."""
    whitening = fastmaf.GaussianWhitening(D, 3).fit_(normal(20, D, dtype=torch.float32))
    local = fastmaf.LocalAutoregressive((3, SIZE, SIZE), hidden=1, generator=generator())
    options: dict[str, Any] = {"dtype": torch.float32, "widths": "own"}
    maf = build(D, hidden_features=(9, 7), **options)
    return {
        "maf": maf,
        "one layer": build(D, blocks=1, hidden_features=(5,), order="natural", **options),
        "random orders": build(D, hidden_features=(6, 5), order="random", degrees="random", soft_bound=True, **options),
        "whitened": build(D, blocks=1, hidden_features=(6,), whitening=3, **options),
        "inference copy": maf.to_inference(),
        "float8 copy": maf.to_inference(torch.float8_e4m3fn),
        "inverse": fastmaf.IAF(D, 2, 7, seed=0, base=fastmaf.GaussianMixture(D, 2, generator=generator())),
        "normalised": fastmaf.MAF(D, 1, 7, seed=0, normalization="batch", base=fastmaf.StudentT(D, 4.0)),
        "started": fastmaf.MAF(
            *(D, 1, 7), seed=0, normalization="act", base=fastmaf.LowRankGaussian(D, 2, generator=generator())
        ),
        "images": fastmaf.Flow(D, [fastmaf.Logit(D, 0.1), whitening, local]),
    }


def inspection_model() -> InspectionModel:
    flow = flows()["images"].eval().requires_grad_(False)
    flow = fastmaf.Flow(D, [*flow.transforms][1:])  # type: ignore[arg-type]
    statistics = TermStatistics.of(normal(9, D, dtype=torch.float32).square(), normal(9))
    about = {
        "recipe": {"rank": 3, "blocks": 1, "steps": 5, "folds": 3, "seed": 0, "score": {"kind": "map top"}},
        "held_out_nll": 1.5,
        "held_out_nll_of_whitening": 2.5,
        "images_of_folds": [3, 3],
        "held_out_nll_of_folds": [1.0, 2.0],
        "map_levels": [0.5, 2.0],
    }
    calibration = Calibration(np.arange(20.0), 0.1, None, "k-fold", 3, "2025-03-01", "line 3")
    settings = ScoreSettings(source="whitened")
    return InspectionModel(flow, settings, AnomalyMapConfig(factors=2), statistics, calibration, about)


def write_all(folder: Path) -> dict[str, bytes]:
    """Writes a file of each kind into a folder and returns the contents by kind."""
    for name, flow in flows().items():
        flow.save(folder / f"{name}.safetensors", {"training": json.dumps({"steps": 3, "held_out": ["a.png"]})})
    write_version_1(flows()["maf"], folder / "version 1.safetensors")
    model = inspection_model()
    (folder / "folds").mkdir()
    model.save(folder / "inspection.safetensors")
    save_fold_models(folder, model, [model.flow])
    flow = flows()["maf"]
    moments = {
        f"{name}/{key}": torch.zeros_like(p) for name, p in flow.named_parameters() for key in ("exp_avg", "exp_avg_sq")
    }
    moments |= {f"{name}/step": torch.tensor(3.0) for name, _ in flow.named_parameters()}
    row = {"epoch": 1, "nll": 4.5, "val_nll": None, "bits_per_dim": 0.5, "seconds": 1.0, "skipped_steps": 0}
    state = {
        "config": {"epochs": 2, "hidden_features": [9, 7]},
        "epochs_done": 1,
        "steps": 3,
        "files": ["b.png"],
        "guards": {"steps": 3, "usual_nll": None, "warming": False},
        "log": [row],
    }
    save_state(folder, flow, moments, state, {"epochs_done": 1, "steps": 3, "held_out": ["a.png"]})
    files = [*folder.glob("*.safetensors"), *folder.glob("folds/*.safetensors")]
    return {file.stem: file.read_bytes() for file in files}


def use(kind: str, folder: Path, content: bytes) -> None:
    """Writes ``content`` as the file of its kind beside the others, loads that, and uses what was loaded."""
    path = folder / ("folds" if kind.startswith("fold") else "") / f"{kind}.safetensors"
    path.write_bytes(content)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator(), dtype=torch.uint8)
    if kind == "inspection":
        detector = Detector.load(path)
        model = detector.model_
        assert isinstance(model, InspectionModel) and len(model.map_levels) == 2
        scores = model.predict(pixels).scores
        if np.isfinite(scores).all():
            model.calibration.p_values(scores)
        model.calibration.describe()
    elif kind.startswith("fold"):
        for flow in load_fold_models(folder, load_inspection(folder / "inspection.safetensors")):
            flow.log_prob(torch.zeros(2, D))
    elif kind == Path(STATE_FILE).stem:
        tensors, state = load_state(folder)
        flow = fastmaf.load(folder / MODEL_FILE)
        optimizer = fastmaf.optim.FusedAdam(flow.parameters())
        moments = moments_by_parameter(folder, tensors, state, flow)
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        assert [row["epoch"] + row["skipped_steps"] for row in state["log"]] and state["guards"]["steps"] >= 0
        optimizer.minimize(-flow.log_prob(torch.zeros(2, D)).mean())
    else:
        loaded = load_model(path)
        nll_of(loaded.flow, _images(pixels), progress=False)
        loaded.flow.sample(1, generator=generator())
        loaded.flow.save(folder / "again" / path.name)


def _images(pixels: torch.Tensor) -> Any:
    from fastmaf.images.dataset import ImageSet

    return ImageSet(pixels, (Path("a"), Path("b")), ("", ""))


ODD: tuple[Any, ...] = (
    12.0, "12", True, False, None, [], {}, 1e308, 1e-308, -1, 0, 1, 2, 3, 2**31, 2**70, 10**6, 10**9, -0.5, 0.5, "",
    "Evil", "x" * 100_000, "\x00\x1b[2J\u202e", "\ud800", "nope", [1], [[1]], {"a": 1}, [0] * 1000,
)  # fmt: skip
_NESTED, _REPEATED, _NOT_FINITE = "@nested", "@repeated", "@nan"
# What json.dumps would not write.
RAW = {f'"{_NESTED}"': "[" * 10_000 + "]" * 10_000, f'"{_REPEATED}"': '{"a": 1, "a": 2}', f'"{_NOT_FINITE}"': "NaN"}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value in a document."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in items:
        yield from places(found, (*at, key))


def set_at(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Returns the document with another value at a place."""
    if not place:
        return value
    document = copy.deepcopy(document)
    target = document
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return document


def _mutated_json(rng: random.Random, text: str) -> str:
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        place = rng.choice([*places(document)])
        action = rng.random()
        if action < 0.8 or not place:
            document = set_at(document, place, rng.choice((*ODD, _NESTED, _REPEATED, _NOT_FINITE)))
        else:
            parent = document = copy.deepcopy(document)
            for key in place[:-1]:
                parent = parent[key]
            if isinstance(parent, dict) and action < 0.9:
                parent[rng.choice(("extra", "type", "__class__"))] = parent.pop(place[-1])
            elif isinstance(parent, list) and action < 0.9:
                parent.extend(copy.deepcopy(parent[place[-1]]) for _ in range(rng.choice((1, 50))))
            else:
                del parent[place[-1]]
    text = json.dumps(document)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text


def metadata_changed(rng: random.Random, content: bytes) -> bytes:
    parts = Parts.of(content)
    metadata = parts.header["__metadata__"]
    key = rng.choice([key for key in metadata if metadata[key].startswith("{")] or [*metadata])
    metadata[key] = _mutated_json(rng, metadata[key]) if metadata[key].startswith("{") else rng.choice(("", "x" * 10))
    return parts.joined()


def header_changed(rng: random.Random, content: bytes) -> bytes:
    parts = Parts.of(content)
    text = _mutated_json(rng, json.dumps(parts.header)).encode()
    return struct.pack("<Q", len(text)) + text + parts.data


def tensors_changed(rng: random.Random, content: bytes) -> bytes:
    parts = Parts.of(content)
    names = [name for name in parts.header if name != "__metadata__"]
    name = rng.choice(names)
    entry = parts.header[name]
    kind = rng.randrange(8)
    if kind == 0:
        del parts.header[name]
    elif kind == 1:
        parts.header[f"{name}.again"] = entry
    elif kind == 2:
        entry["dtype"] = rng.choice(("F64", "I32", "I64", "BF16", "F16", "BOOL", "U8", "C64", "F8_E4M3", "F4", "?"))
    elif kind == 3:
        entry["shape"] = rng.choice(([0, 2**62], [2**62, 0, 2**62], [2**31, 2**31], [-1], [10**12], [1] * 65, [1] * 20))
        entry["data_offsets"] = rng.choice((entry["data_offsets"], [entry["data_offsets"][0]] * 2))
    elif kind == 4:
        entry["data_offsets"] = [rng.choice((0, 1, -1, 2**40, 2**64, 7)), entry["data_offsets"][1]]
    elif kind == 5:
        other = rng.choice(names)
        parts.header[name], parts.header[other] = parts.header[other], entry
    elif kind == 6:
        entry["data_offsets"] = parts.header[rng.choice(names)]["data_offsets"]
    else:  # a hundred tensors that nobody asked for
        parts.header |= {f"extra.{i}": {"dtype": "F32", "shape": [0, i], "data_offsets": [0, 0]} for i in range(100)}
    return parts.joined()


def values_changed(rng: random.Random, content: bytes) -> bytes:
    parts = Parts.of(content)
    name = rng.choice([name for name in parts.header if name != "__metadata__" and parts.header[name]["shape"] != [0]])
    begin, end = parts.header[name]["data_offsets"]
    if end - begin < 4:
        return content
    place = begin + 4 * rng.randrange((end - begin) // 4)
    value = rng.choice((np.float32(3e38), np.float32(-3e38), np.float32(1e-45), np.float32(0), np.float32(np.nan),
                        np.float32(np.inf), np.int32(-1), np.int32(2**31 - 1), np.int32(0), np.int32(5)))  # fmt: skip
    return parts.joined()[: len(parts.joined()) - len(parts.data)] + (
        parts.data[:place] + value.tobytes() + parts.data[place + 4 :]
    )


def bytes_flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(8 + header if rng.random() < 0.7 else len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))] if rng.random() < 0.7 else content + bytes(rng.randrange(1, 99))


def length_lies(rng: random.Random, content: bytes) -> bytes:
    return Parts.of(content).joined(rng.choice((0, 1, 2, 2**32, 2**63, 2**64 - 1, len(content), len(content) - 8)))


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    metadata_changed, metadata_changed, metadata_changed, header_changed, tensors_changed, values_changed,
    bytes_flipped, cut, length_lies,
)  # fmt: skip


def mutants(contents: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Yields kind of file, name of the mutation, and what it made of the file."""
    rng = random.Random(seed)
    kinds = sorted(contents)
    for i in range(count):
        kind, mutation = kinds[i % len(kinds)], rng.choice(MUTATIONS)
        yield kind, mutation.__name__, mutation(rng, contents[kind])
