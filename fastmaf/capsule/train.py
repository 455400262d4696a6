"""Training on normal images: ``fastmaf train``.

What it writes into the output folder, as it goes:

    model.safetensors             the flow, with its settings and the names of the held-out images in its metadata
    training_state.safetensors    what ``--resume`` needs beside it: the optimiser's moments, counters, the log
    train_log.csv, nll_curve.png  a row and a point per epoch
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.memory_check import check_fits, disk_needed
from fastmaf.capsule.resuming import TrainedOn, check_images, check_settings, contents_of
from fastmaf.images.dataset import DataError, ImageSet, load_train, to_unit
from fastmaf.images.names import visible
from fastmaf.io.atomic import previous, written_atomically
from fastmaf.io.marks import CURVE
from fastmaf.io.outputs import Output, check_outputs, picture, table
from fastmaf.io.outputs import model as model_kind
from fastmaf.io.run_folder import check_disk, run_folder
from fastmaf.metrics.plots import nll_curve
from fastmaf.metrics.results import bits_per_dim
from fastmaf.training.checkpoints import (
    MODEL_FILE,
    STATE_FILE,
    load_state,
    moments_by_parameter,
    refuse_unfinished,
    save_state,
)
from fastmaf.training.interrupts import interruptible

LOG_FILE, CURVE_FILE = "train_log.csv", "nll_curve.png"
LOG_COLUMNS = ("epoch", "nll", "val_nll", "bits_per_dim", "seconds", "skipped_steps")
_SECONDS_BETWEEN_CHECKPOINTS = 30.0
_SECONDS_BETWEEN_CURVES = 15.0
_SCORING_BATCH = 64

Row: TypeAlias = dict[str, float | None]


class TrainingStoppedError(RuntimeError):
    """Training met a loss that is not finite; the message says where the last good model is."""


@dataclass(frozen=True)
class TrainResult:
    """A finished or interrupted run: the flow, its log (a row per epoch), the model's file, and whether Ctrl-C ended
    it.
    """

    flow: fastmaf.MAF
    log: list[Row]
    model: Path
    interrupted: bool


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Moments of units that have died decay until they are denormal, which makes a step several times slower.

    The setting is the caller's thread's, and given back to it; threads that torch starts meanwhile inherit it.
    """
    before = float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@fastmaf.torch_defaults()
def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    device: str = "cpu",
    graphs: bool = True,
    published: Mapping[int, float] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains a flow on the normal images of ``data/train/good``.

    Ctrl-C ends the run after the current step, with a model that can be used; a resumed run equals an unbroken one to
    the bit. The model and log of a finished run in ``out`` stay until the first checkpoint of the new one is complete,
    and are kept as ``*.previous.*``. ``out`` is locked meanwhile: a second run is refused.

    Args:
        data: folder with ``train/good``.
        out: folder for the model, the log and the curve.
        config: the run's settings.
        resume: go on from the checkpoint in ``out``; the settings must be the same, but for ``epochs``, and so must
            the images.
        skip_bad: leave out files that cannot be read instead of refusing to start.
        device: where to train.
        graphs: on a GPU, replay steps as CUDA graphs where they can be; see ``fastmaf.TrainingStep``.
        published: published NLL by epoch, drawn beside the curve.
        progress: show a progress bar.

    Raises:
        DataError: the folder or a file in it is not what is needed.
        DoesNotFitError: the run needs more memory or disk than there is; nothing was written.
        InUseError: another process or thread is writing a run to ``out``.
        OSError: ``out`` cannot be written to; nothing was read or trained.
        TrainingStoppedError: the loss became non-finite.
        OutputError: ``out`` holds a file of the name of one that is written, which is none.
        ValueError: a setting does not fit, or settings or images differ from those of the run to resume.
    """
    out = Path(out)
    with run_folder(out, "training", LOG_FILE, CURVE_FILE):
        check_outputs(outputs_of(out, resume=resume))
        return train_in(
            out,
            data,
            config or TrainConfig(),
            resume=resume,
            skip_bad=skip_bad,
            device=device,
            graphs=graphs,
            published=published,
            progress=progress,
        )


@fastmaf.torch_defaults()
@_denormals_flushed()
def train_in(
    out: Path,
    data: str | Path,
    config: TrainConfig,
    *,
    resume: bool,
    skip_bad: bool,
    device: str,
    graphs: bool,
    published: Mapping[int, float] | None,
    progress: bool,
) -> TrainResult:
    """Does what ``train`` does, in a folder that its caller has locked."""
    if not resume:
        refuse_unfinished(out)
    images = load_train(data, size=config.size, skip_bad=skip_bad, progress=progress)
    for note in images.notes:
        tqdm.write(visible(note))
    split = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = images.subset(sorted(split[: round(config.holdout * len(images))]))
    normals = images.subset(sorted(split[len(held_out) :]))
    if not len(normals):
        raise DataError(f"holding out {config.holdout} of {len(images)} images leaves none to train on")
    check_fits(config, torch.device(device), images=len(normals), resume=resume)
    check_disk(out, disk_needed(config))
    trained_on = TrainedOn(list(normals.names), contents_of(images.names, images.paths))
    run = _Run(config, out, normals, held_out, trained_on, torch.device(device), graphs, published)
    if resume:
        run.restore()
    return run.go(progress)


def outputs_of(out: Path, *, resume: bool) -> list[Output]:
    """What ``train`` writes, and what it makes of an earlier run's files; a run that is resumed owns what is there."""
    if resume:
        return []
    log = table("a training log", LOG_COLUMNS)
    return [
        Output(out / MODEL_FILE, model_kind("a model")),
        Output(previous(out / MODEL_FILE), model_kind("the model of an earlier run")),
        Output(out / STATE_FILE, model_kind("the state of a training run", "state")),
        Output(out / LOG_FILE, log),
        Output(previous(out / LOG_FILE), log),
        Output(out / CURVE_FILE, picture(CURVE, "a training curve")),
    ]


@dataclass
class _EpochSoFar:
    """How far an epoch has come, for a checkpoint in its middle."""

    batches: int = 0
    total_nll: float = 0.0
    skipped: int = 0
    seconds: float = 0.0


class _Run:
    """One training run: model, optimiser, log and their files."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        normals: ImageSet,
        held_out: ImageSet,
        trained_on: TrainedOn,
        device: torch.device,
        graphs: bool,
        published: Mapping[int, float] | None,
    ) -> None:
        self.config, self.out, self.device, self.published = config, out, device, published
        self.normals, self.held_out, self.trained_on = normals, held_out, trained_on
        self.flow = config.build().to(device)
        self.flow.validate_args = False  # losses are looked at here
        self.optimizer = fastmaf.optim.FusedAdam(self.flow.parameters(), lr=config.lr)
        guards = fastmaf.Guards(config.warmup_steps, config.max_grad_norm, config.max_leap)
        self.step = fastmaf.TrainingStep(self.flow, self.optimizer, guards, graphs=graphs)
        self._log_prob = fastmaf.ReplayedLogProb(self.flow) if graphs else self.flow.log_prob
        self.log: list[Row] = []
        self.so_far = _EpochSoFar()  # of the epoch after those in the log
        self.good_epoch: int | None = None  # after how many epochs the model file was written
        self._own_files = False  # until the first checkpoint, what lies in the folder is an earlier run's
        self._saved = self._drawn = time.monotonic()

    def restore(self) -> None:
        """Takes up the run whose checkpoint lies in the output folder."""
        _, state = load_state(self.out, tensors=False)
        check_settings(self.out, state, self.config)
        if note := check_images(self.out, state, self.trained_on):
            tqdm.write(visible(note))
        model = self.out / MODEL_FILE
        try:
            self.flow.load_state_dict(fastmaf.load(model).state_dict())
        except RuntimeError:
            raise fastmaf.CheckpointError(
                f"{model}: the flow is not of the settings in {self.out / STATE_FILE}"
            ) from None
        tensors, _ = load_state(self.out)  # only now, so that they and a second model are never held together
        moments = moments_by_parameter(self.out, tensors, dict(self.flow.named_parameters()))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step.load_state_dict(state["guards"])
        self.log = state["log"]
        self.so_far = _EpochSoFar(**state.get("epoch_so_far", {}))
        self.good_epoch = state["epochs_done"]
        self._own_files = True

    def go(self, progress: bool) -> TrainResult:
        """Trains to the last epoch, or until interrupted."""
        steps = -(-len(self.normals) // self.config.batch_size)
        first = len(self.log)
        with (
            interruptible() as stop,
            tqdm(
                total=self.config.epochs * steps,
                initial=first * steps + self.so_far.batches,
                desc="training",
                unit="step",
                disable=not progress,
                dynamic_ncols=True,
            ) as bar,
        ):
            for epoch in range(first + 1, self.config.epochs + 1):
                self._epoch(epoch, bar, stop)
                if stop.is_set():
                    break
                if time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS or self.good_epoch is None:
                    self._save()
                self._write_log(curve=time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES)
            if stop.is_set():
                tqdm.write(
                    "stopping after this step and writing a checkpoint; Ctrl-C again loses what came after the last one"
                )
            self._save()
            self._write_log(curve=True)
        return TrainResult(self.flow, self.log, self.out / MODEL_FILE, stop.is_set())

    def _epoch(self, epoch: int, bar: tqdm[Any], stop: threading.Event) -> None:
        # Each epoch shuffles by a generator of its own: a resumed run sees the batches that an unbroken one would.
        shuffler = torch.Generator().manual_seed((self.config.seed << 32) + epoch)
        batches = torch.randperm(len(self.normals), generator=shuffler).split(self.config.batch_size)
        so_far = self.so_far
        began = time.perf_counter() - so_far.seconds
        for index in batches[so_far.batches :]:
            if stop.is_set():
                return
            try:
                report = self.step(self._batch(self.normals, index))
            except fastmaf.NonFiniteLossError as error:
                raise self._stopped(str(error)) from error
            so_far.batches += 1
            so_far.total_nll += report.nll * len(index)
            so_far.skipped += report.skipped
            so_far.seconds = time.perf_counter() - began
            bar.update()
            bits = bits_per_dim(report.nll, self.config.features)
            bar.set_postfix_str(f"epoch {epoch}, NLL {report.nll:,.0f} nats, {bits:.3f} bits/dim")
        nll = so_far.total_nll / len(self.normals)
        self.log.append(
            {
                "epoch": epoch,
                "nll": nll,
                "val_nll": self._validate(),
                "bits_per_dim": bits_per_dim(nll, self.config.features),
                "seconds": time.perf_counter() - began,
                "skipped_steps": so_far.skipped,
            }
        )
        self.so_far = _EpochSoFar()

    def _stopped(self, reason: str) -> TrainingStoppedError:
        if self.good_epoch is None:
            kept = "no model was written before that"
            if (self.out / MODEL_FILE).exists():
                kept += f"; the model of an earlier run in {self.out} is untouched"
        else:
            self._write_log(curve=True)
            kept = f"the last good model, after epoch {self.good_epoch}, is kept in {self.out / MODEL_FILE}"
        return TrainingStoppedError(f"{reason}; {kept}. A smaller --lr, --order natural, or --guards help")

    def _batch(self, images: ImageSet, index: Tensor) -> Tensor:
        return to_unit(images.pixels[index]).to(self.device)

    @torch.no_grad()
    def _validate(self) -> float | None:
        if not len(self.held_out):
            return None
        parts = torch.arange(len(self.held_out)).split(_SCORING_BATCH)
        return float(-torch.cat([self._log_prob(self._batch(self.held_out, part)) for part in parts]).double().mean())

    def _save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.flow.parameters()):
            raise self._stopped(f"the parameters are no longer finite after epoch {len(self.log)}")
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.flow.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        state = {
            "config": asdict(self.config),
            "epochs_done": len(self.log),
            "steps": self.step.steps,
            **asdict(self.trained_on),
            "epoch_so_far": asdict(self.so_far),
            "guards": self.step.state_dict(),
            "log": self.log,
        }
        about = {
            "epochs_done": len(self.log),
            "steps": self.step.steps,
            "held_out": list(self.held_out.names),
        }
        keep = () if self._own_files else (MODEL_FILE, LOG_FILE)
        save_state(self.out, self.flow, moments, state, about, keep=keep)
        self._own_files = True
        self.good_epoch = len(self.log)
        self._saved = time.monotonic()

    def _write_log(self, *, curve: bool) -> None:
        with written_atomically(self.out / LOG_FILE) as file:
            lines = [",".join(LOG_COLUMNS)]
            lines += [",".join("" if row[c] is None else f"{row[c]:.10g}" for c in LOG_COLUMNS) for row in self.log]
            file.write(("\n".join(lines) + "\n").encode())
        if curve:
            nll_curve(self.out / CURVE_FILE, self.log, self.published)
            self._drawn = time.monotonic()
