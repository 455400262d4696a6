"""One training run: the loop over epochs, its checkpoints, its log and its curve."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.resuming import check_images, check_settings, contents_of
from fastmaf.capsule.train_result import Row, TrainResult
from fastmaf.images.dataset import ImageSet, to_unit
from fastmaf.images.progress import Progress, note
from fastmaf.io.atomic import written_atomically
from fastmaf.io.wording import count
from fastmaf.metrics.plots import nll_curve
from fastmaf.metrics.results import bits_per_dim
from fastmaf.training.callbacks import Callback
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, load_state, moments_by_parameter, save_state
from fastmaf.training.interrupts import interruptible
from fastmaf.training.processes import Processes
from fastmaf.training.random_state import RANDOM, order_in, random_states, restore_random_states, seeded

LOG_FILE, CURVE_FILE = "train_log.csv", "nll_curve.png"
LOG_COLUMNS = ("epoch", "nll", "val_nll", "bits_per_dim", "seconds", "skipped_steps")
_SECONDS_BETWEEN_CHECKPOINTS = 30.0
_SECONDS_WITHIN_EPOCHS = 120.0  # between checkpoints in the middle of a long epoch
_SECONDS_BETWEEN_CURVES = 15.0
_SCORING_BATCH = 64


class TrainingStoppedError(RuntimeError):
    """The loss or the parameters became non-finite; the message names the last good model."""


@dataclass
class _EpochProgress:
    """Progress within an epoch, for checkpoints in its middle."""

    batches: int = 0
    total_nll: float = 0.0
    skipped: int = 0
    seconds: float = 0.0


class TrainingRun:
    """The state of a run: model, optimiser, log, and which files in the output folder are its own.

    It trains on ``normals`` and validates on ``held_out``. The output folder is locked by the caller; the other
    arguments are those of ``fastmaf.capsule.train.train``.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        normals: ImageSet,
        held_out: ImageSet,
        device: torch.device,
        graphs: bool,
        published: Mapping[int, float] | None,
        together: Processes,
        callbacks: Sequence[Callback] = (),
        shard_optimizer: bool = False,
    ) -> None:
        self.config, self.out, self.device, self.published = config, out, device, published
        self._together, self._callbacks = together, callbacks if together.is_first else ()
        self.normals, self.held_out = normals, held_out
        self.files, self.contents = list(normals.names), contents_of(normals) | contents_of(held_out)
        self.flow = config.build().to(device)
        self.flow.validate_args = False  # the training step checks the loss
        parameters = self.flow.parameters()
        self.optimizer = fastmaf.optim.FusedAdam(parameters, lr=config.lr, process_group=together.group)
        guards = fastmaf.Guards(config.warmup_steps, config.max_grad_norm, config.max_loss_jump)
        self.step = fastmaf.TrainingStep(
            self.flow, self.optimizer, guards, graphs=graphs, shard_optimizer=shard_optimizer
        )
        self._log_prob = fastmaf.ReplayedLogProb(self.flow) if graphs else self.flow.log_prob
        self.log: list[Row] = []
        self.so_far = _EpochProgress()  # of the epoch after those in the log
        self._order: Tensor | None = None  # of the data in that epoch, once it has begun
        self._random: dict[str, Tensor] = {}  # generators' states to begin with, of a resumed run
        self.good_epoch: int | None = None  # number of epochs in the model file
        self._good_steps = 0  # of the next epoch, in it as well
        self._owns_files = False  # until the first checkpoint, files in the folder belong to an earlier run
        self._saved = self._drawn = time.monotonic()

    def restore(self) -> None:
        """Continues from the checkpoint in the output folder."""
        _, state = load_state(self.out, tensors=False)
        check_settings(self.out, state, self.config)
        if text := check_images(self.out, state, self.files, self.contents):
            note(text)
        model = self.out / MODEL_FILE
        try:
            self.flow.load_state_dict(fastmaf.load(model).state_dict())
        except RuntimeError:
            raise fastmaf.CheckpointError(
                f"{model}: expected a flow with the settings in {self.out / STATE_FILE}; found another one"
            ) from None
        tensors, state = load_state(self.out)  # loaded only now: never in memory together with a second model
        moments = moments_by_parameter(self.out, tensors, state, self.flow)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step.load_state_dict(state["guards"])
        self._order = order_in(tensors, len(self.normals), self.out / STATE_FILE)
        self._random = {name: tensor for name, tensor in tensors.items() if name.startswith(RANDOM)}
        self.log = state["log"]
        self.so_far = _EpochProgress(**state.get("epoch_so_far", {}))
        self.good_epoch, self._good_steps = state["epochs_done"], self.so_far.batches
        self._owns_files = True

    def train(self, progress: bool) -> TrainResult:
        """Trains to the last epoch, or until interrupted."""
        steps = -(-len(self.normals) // self.config.batch_size)
        first = len(self.log)
        with (
            seeded(self.config.seed + self._together.rank, self.device),
            interruptible() as stop,
            Progress(
                "training",
                "step",
                total=self.config.epochs * steps,
                initial=first * steps + self.so_far.batches,
                leave=True,
                show=progress,
            ) as bar,
        ):
            restore_random_states(
                self._random, self.device, self._together, self.config.seed, self.step.steps, self.out / STATE_FILE
            )
            for epoch in range(first + 1, self.config.epochs + 1):
                self._epoch(epoch, bar, stop)
                if len(self.log) < epoch:  # stopped
                    break
                if self._together.any(self._is_due(_SECONDS_BETWEEN_CHECKPOINTS)) or self.good_epoch is None:
                    self._save()
                self._write_log(curve=time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES)
                self._call_back(epoch)
            if stop.is_set() and self._together.is_first:
                note(
                    "stopping after this step and writing a checkpoint; Ctrl-C again stops at once and loses the "
                    "steps since the last checkpoint"
                )
            self._save()
            self._write_log(curve=True)
        return TrainResult(self.flow, self.log, self.out / MODEL_FILE, stop.is_set())

    def _epoch(self, epoch: int, bar: Progress, stop: threading.Event) -> None:
        if self._order is None:
            # Each epoch shuffles with a generator of its own. Its order is saved, too: other versions of torch may
            # shuffle otherwise.
            shuffler = torch.Generator().manual_seed((self.config.seed << 32) + epoch)
            self._order = torch.randperm(len(self.normals), generator=shuffler)
        batches = self._order.split(self.config.batch_size)
        so_far = self.so_far
        began = time.perf_counter() - so_far.seconds
        for index in batches[so_far.batches :]:
            stopped, due = self._together.any_of(stop.is_set(), self._is_due(_SECONDS_WITHIN_EPOCHS))
            if stopped:
                stop.set()  # by Ctrl-C to one of the processes
                return
            if due and so_far.batches and self.good_epoch is not None:
                self._save()
            try:
                report = self.step(self._batch(self.normals, self._together.share(index)))
            except fastmaf.NonFiniteLossError as error:
                raise self._stopped(str(error)) from error
            so_far.batches += 1
            so_far.total_nll += report.nll * len(index)
            so_far.skipped += report.skipped
            so_far.seconds = time.perf_counter() - began
            bits = bits_per_dim(report.nll, self.config.features)
            bar.set_status(f"epoch {epoch}, NLL {report.nll:,.0f} nats, {bits:.3f} bits/dim")
            bar.update()
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
        self.so_far, self._order = _EpochProgress(), None

    def _call_back(self, epoch: int) -> None:
        values = {name: value for name, value in self.log[-1].items() if name != "epoch" and value is not None}
        raised: BaseException | None = None
        try:
            for callback in self._callbacks:
                callback(epoch, values)
        except BaseException as error:
            raised = error
        if self._together.any(raised is not None):
            self._save()
        if raised is not None:
            raise raised

    def _is_due(self, seconds: float) -> bool:
        """Returns whether the last checkpoint is older; the first process decides."""
        return self._together.is_first and time.monotonic() - self._saved > seconds

    def _stopped(self, reason: str) -> TrainingStoppedError:
        if self.good_epoch is None:
            kept = "no model was written before that"
            if (self.out / MODEL_FILE).exists():
                kept += f"; the model of an earlier run in {self.out} is untouched"
        else:
            self._write_log(curve=True)
            steps = f" and {count(self._good_steps, 'step')} of the next" * (self._good_steps > 0)
            kept = f"the last good model, after epoch {self.good_epoch}{steps}, is kept in {self.out / MODEL_FILE}"
        return TrainingStoppedError(f"{reason}; {kept}. Try a smaller --lr, --order natural, or --guards")

    def _batch(self, images: ImageSet, index: Tensor) -> Tensor:
        return to_unit(images.pixels[index]).to(self.device)

    @torch.no_grad()
    def _validate(self) -> float | None:
        if not len(self.held_out) or not self._together.is_first:
            return None
        parts = torch.arange(len(self.held_out)).split(_SCORING_BATCH)
        return float(-torch.cat([self._log_prob(self._batch(self.held_out, part)) for part in parts]).double().mean())

    def _save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.flow.parameters()):
            raise self._stopped(f"the parameters are no longer finite after epoch {len(self.log)}")
        self._together.check()  # what the processes have is brought together
        random = random_states(self.device, self._together)
        optimizer = self.optimizer.whole_state(keep=self._together.is_first)
        good = len(self.log), self.so_far.batches
        if self._together.is_first:
            self._write(random, optimizer)
        self._owns_files = True
        self.good_epoch, self._good_steps = good
        self._saved = time.monotonic()

    def _write(self, random: Mapping[str, Tensor], optimizer: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.flow.named_parameters()
            for key, value in optimizer.get(parameter, {}).items()
        }
        counters = {"epochs_done": len(self.log), "steps": self.step.steps}
        state = {
            "config": asdict(self.config),
            **counters,
            "files": self.files,
            "contents": self.contents,
            "epoch_so_far": asdict(self.so_far),
            "guards": self.step.state_dict(),
            "log": self.log,
        }
        keep = () if self._owns_files else (MODEL_FILE, LOG_FILE)
        about = {**counters, "held_out": list(self.held_out.names)}
        order = self._order if self.so_far.batches else None
        save_state(self.out, self.flow, moments, state, about, random=random, order=order, keep=keep)

    def _write_log(self, *, curve: bool) -> None:
        if not self._together.is_first:
            return
        lines = [",".join(LOG_COLUMNS)]
        lines += [",".join("" if row[c] is None else f"{row[c]:.10g}" for c in LOG_COLUMNS) for row in self.log]
        with written_atomically(self.out / LOG_FILE) as file:
            file.write(("\n".join(lines) + "\n").encode())
        if curve:
            nll_curve(self.out / CURVE_FILE, self.log, self.published)
            self._drawn = time.monotonic()
