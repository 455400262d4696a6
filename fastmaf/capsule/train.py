"""Training on good images: ``fastmaf capsule train``.

Files written to the output folder during training:

    model.safetensors             the flow; its metadata hold the settings and the names of the held-out images
    training_state.safetensors    what ``--resume`` needs: the optimiser's moments, counters, the log
    train_log.csv, nll_curve.png  a row and a point per epoch
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.memory_check import check_fits, disk_needed
from fastmaf.capsule.train_result import TrainResult
from fastmaf.capsule.training_run import CURVE_FILE, LOG_COLUMNS, LOG_FILE, TrainingRun
from fastmaf.images.dataset import load_train
from fastmaf.images.decode import DataError
from fastmaf.images.progress import note
from fastmaf.io.atomic import previous
from fastmaf.io.marks import CURVE
from fastmaf.io.outputs import Output, check_outputs, picture, table
from fastmaf.io.outputs import model as model_kind
from fastmaf.io.run_folder import check_disk, run_folder
from fastmaf.training.callbacks import Callback
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, refuse_unfinished
from fastmaf.training.processes import device_of, started_together, was_restarted


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Flushes denormal numbers to zero: the moments of dead units decay into them, which slows steps down several fold.

    The setting is that of the calling thread and is restored; threads that torch starts meanwhile inherit it.
    """
    before = float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@fastmaf.torch_defaults()
@_denormals_flushed()
def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    device: str = "cpu",
    graphs: bool = True,
    shard_optimizer: bool = False,
    published: Mapping[int, float] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    locked: bool = False,
) -> TrainResult:
    """Trains a flow on the good images of ``data/train/good``.

    Ctrl-C ends the run after the current step, with a usable model; a resumed run equals an uninterrupted one to the
    bit. Model and log of a finished run in ``out`` stay until the first checkpoint of the new run is complete, and are
    kept as ``*.previous.*``. ``out`` is locked during training: a second run is refused.

    Where ``torchrun`` has started several processes, each takes its share of every batch, and the first one writes:
    the run equals that of one process to rounding, and can be resumed by any number of them. Processes that
    ``torchrun`` starts again, after one has failed, continue from the last checkpoint.

    Args:
        data: folder with ``train/good``.
        out: folder for the model, the log and the curve.
        config: the settings.
        resume: continue from the checkpoint in ``out``, with the same images and the same settings except ``epochs``.
        skip_bad: skip files that cannot be read instead of stopping.
        device: where to train.
        graphs: on a GPU, replay steps as CUDA graphs where possible; see ``fastmaf.TrainingStep``.
        shard_optimizer: split the optimiser's moments among the processes; see ``fastmaf.TrainingStep``. A run may be
            resumed with them split or not, by any number of processes.
        published: NLL of the published run by epoch, drawn beside the curve.
        callbacks: called by the first process after each epoch with ``nll``, ``val_nll`` (if images are held out),
            ``bits_per_dim``, ``seconds`` and ``skipped_steps``.
        progress: show a progress bar.
        locked: the caller has locked ``out`` and checked its files.

    Raises:
        DataError: a folder or an image cannot be used.
        DoesNotFitError: the run needs more memory or disk space than is available; nothing was written.
        InUseError: another process or thread is writing a run to ``out``.
        OSError: ``out`` cannot be written to; nothing was read or trained.
        TrainingStoppedError: the loss became non-finite.
        OutputError: a file in ``out`` that this command did not write would be replaced.
        ValueError: a setting is out of range, or settings or images differ from those of the run to resume.
    """
    out, config = Path(out), config or TrainConfig()
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(started_together(place := device_of(device)))
        progress = progress and together.is_first
        resume = resume or (was_restarted() and (out / STATE_FILE).exists())
        if together.is_first and not locked:
            stack.enter_context(run_folder(out, "training", LOG_FILE, CURVE_FILE))
            check_outputs(outputs_of(out, resume=resume))
        if together.is_first and not resume:
            refuse_unfinished(out)
        images = load_train(data, size=config.size, skip_bad=skip_bad, progress=progress)
        for text in images.notes if together.is_first else ():
            note(text)
        split = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed)).tolist()
        held_out = images.subset(sorted(split[: round(config.holdout * len(images))]))
        normals = images.subset(sorted(split[len(held_out) :]))
        if not len(normals):
            raise DataError(f"holding out {config.holdout} of {len(images)} images leaves none to train on")
        shards = together.size if shard_optimizer else 1
        check_fits(config, place, images=len(normals), resume=resume, shards=shards)
        if together.is_first:
            check_disk(out, disk_needed(config))
        sources = normals, held_out
        run = TrainingRun(config, out, *sources, place, graphs, published, together, callbacks, shard_optimizer)
        if resume:
            run.restore()
        return run.train(progress)


def outputs_of(out: Path, *, resume: bool) -> list[Output]:
    """Returns the files that ``train`` writes or renames; a resumed run owns the files that it continues."""
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
