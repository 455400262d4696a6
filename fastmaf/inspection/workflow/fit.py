"""``fastmaf inspect fit``: fit a model and write it, its log and its report to a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace as replace_field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import fastmaf
from fastmaf.images.dataset import ImageSet
from fastmaf.inspection.features.extractor import extractor_of
from fastmaf.inspection.features.fit import fit_with_features
from fastmaf.inspection.fit import FALSE_ALARM, Fitted
from fastmaf.inspection.fit import fit as fit_model
from fastmaf.inspection.fit_stages import Stages
from fastmaf.inspection.fold_models import fold_model_files, replace_fold_models, save_fold_models
from fastmaf.inspection.framed import FramedModel
from fastmaf.inspection.framing import Framing
from fastmaf.inspection.free_threads import free_threads
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.kinds import (
    COMPARED,
    FittedTexture,
    Kind,
    describe_choice,
    fit_texture_model,
    plausible_kind,
    reduction_of,
    texture_size,
)
from fastmaf.inspection.posed import InPose, PosedModel, in_one_pose
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.report.content import REPORT, REPORT_FILE
from fastmaf.inspection.sizes import BUDGET, FittedSizes, fit_sizes
from fastmaf.inspection.workflow.fit_result import LOG_FILE, FitResult
from fastmaf.inspection.workflow.fit_state import has_state, load_state, run_of, save_state
from fastmaf.inspection.workflow.fit_state import remove_state as remove_fit_state
from fastmaf.inspection.workflow.groups import group_labels
from fastmaf.inspection.workflow.inputs import Say
from fastmaf.inspection.workflow.load import (
    NEEDED,
    Loaded,
    load_again,
    load_for_features,
    load_normals,
    load_sizes,
    load_texture,
)
from fastmaf.io.atomic import errors_of_staged, keep_previous, previous, replace, staging
from fastmaf.io.csv_file import write_csv
from fastmaf.io.outputs import Output, check_outputs, table
from fastmaf.io.outputs import model as model_kind
from fastmaf.io.run_folder import check_disk, run_folder
from fastmaf.io.wording import count
from fastmaf.training.callbacks import Callback
from fastmaf.training.checkpoints import MODEL_FILE, STATE_FILE, refuse_unfinished, remove_state
from fastmaf.training.interrupts import interruptible

_LOG_COLUMNS = ("step", "nll", "held_out_nll")


@fastmaf.torch_defaults()
@free_threads()
def fit(
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    sizes: Literal["auto"] | None = None,
    budget: float = BUDGET,
    features: str | None = None,
    kind: Kind = "object",
    group_by: str | None = None,
    keep_folds: bool = False,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
    say: Say = print,
) -> FitResult:
    """Fits an inspection model to the good images of ``data`` and writes model, log and report to ``out``.

    Files of an earlier run in ``out`` stay until all new files are written, and are kept as ``*.previous.*``, except
    its fold models, which are deleted. ``out`` is locked meanwhile: a second run is refused.

    Args:
        data: folder with ``train/good``, or a folder of good images.
        out: folder to write to.
        recipe: the settings.
        sizes: ``"auto"`` fits models of the sizes that the images hold, one after the other, and chooses among them and
            their combinations on drawn defects, whatever ``recipe.size``; see ``fit_sizes``. None: the recipe's size.
        budget: seconds that the models of ``sizes`` may take; from 300 on, 256 pixels are considered.
        features: name of a pretrained network, ``"efficientnet-lite0"``, whose features are used, too; see
            ``fastmaf.inspection.features.fit``. None: a model of pixels alone.
        kind: ``"object"``, whose parts have a fixed place or shape; ``"texture"``, which looks the same everywhere; or
            ``"auto"``: what the good images, and synthetic defects on them, call for. With features, a texture is used
            beside them where it helps on synthetic defects. See ``fastmaf.inspection.kinds``.
        group_by: which images were taken together; see ``group_labels``. None: random folds.
        keep_folds: write the fold models, too, so that ``fastmaf inspect eval`` can evaluate their ensemble.
        callbacks: see ``fastmaf.inspection.fit.fit``.
        resume: continue a fit that Ctrl-C interrupted, with the same images and settings: its result is that of an
            uninterrupted one. Its finished stages are in ``out``, until the fit is finished.

    Raises:
        DataError: the folder or a file in it is unsuitable, or there are too few images.
        DoesNotFitError: the disk has too little free space.
        InUseError: another process or thread is writing a run to ``out``.
        MissingExtraError: the weights of the features' network are not installed.
        OSError: ``out`` cannot be written to; if a disk is full, the previous files stay.
        OutputError: ``out`` holds a file of another origin under the name of an output.
        ValueError: a setting is invalid, or ``out`` holds an unfinished run of the other recipe.
    """
    recipe, out = recipe or Recipe(), Path(out)
    asked_kind, extractor = kind, None if features is None else extractor_of(features)
    with run_folder(out, "fitting", LOG_FILE, REPORT_FILE):
        check_outputs(outputs_of(out, recipe.folds if keep_folds else 0))
        refuse_unfinished(out)
        reading: Any = {"skip_bad": skip_bad, "progress": progress, "say": say}
        given = recipe
        if extractor is not None:
            several = sizes is not None
            loaded = load_for_features(data, recipe, kind, extractor.size, several, budget, **reading)
        elif kind == "texture":
            loaded = Loaded((), recipe, load_texture(data, recipe, **reading), None)
        elif sizes is None:
            loaded = load_normals(data, recipe, kind, **reading)
        else:
            loaded = load_sizes(data, recipe, kind, budget, **reading)
        wanted, recipe, images, framing = loaded
        reason: str | None = None
        if framing is not None:
            kind, reason = "object", f"object ({framing.reason})"
        posed = None if kind == "texture" else in_one_pose(images.pixels, images.double, recipe)
        if posed is not None:
            kind, reason = "object", f"object ({posed.reason})"
            images = replace_field(images, pixels=posed.pixels, double=posed.double)
        elif kind == "auto":
            kind, reason = plausible_kind(images.pixels)
        check_disk(out, sum(_disk_needed(replace_field(recipe, size=size), keep_folds) for size in wanted))
        groups = None if group_by is None else group_labels(group_by, images.names)
        if groups is not None and len(set(groups)) < NEEDED:
            say(
                f"{count(len(set(groups)), 'group')}: a false-alarm rate of {FALSE_ALARM:.0%} cannot be guaranteed for "
                f"new groups with fewer than {NEEDED}"
            )
        options: Any = {"double": images.double, "groups": groups, "every_fold": keep_folds, "progress": progress}
        pixels = [tensor for tensor in (images.pixels, images.double) if tensor is not None]
        run = partial(run_of, recipe, wanted, groups, keep_folds, pixels, kind=kind, features=features)
        stages = load_state(out, run()) if resume else Stages()
        if stages.done:
            say(f"continuing after {', '.join(stages.done)}")
        elif has_state(out):
            say(f"{out} holds an interrupted fit, which --resume would continue; this one begins anew")
        options |= {"callbacks": callbacks, "stages": stages}
        as_texture = partial(fit_texture_model, recipe=recipe, groups=groups, progress=progress)
        fitted: Fitted | FittedSizes | FittedTexture
        try:
            if extractor is not None:
                del options["double"]
                if kind != "object":
                    images = load_again(
                        data, images, max(texture_size(images.shapes, COMPARED), images.size), **reading
                    )
                    options["texture"] = as_texture(images.pixels, shapes=images.shapes).candidate
                fitted = fit_with_features(images.pixels, wanted, recipe, extractor, budget=budget, **options)
                if kind == "auto":
                    reason = f"{fitted.model.about['chosen']} ({reason})"
            elif kind != "object":
                if kind == "auto":
                    if reduction_of(images.shapes, COMPARED) is not None:
                        say(f"as a texture, images are compared at {COMPARED} pixels; --kind texture keeps larger ones")
                    side = max(texture_size(images.shapes, COMPARED), images.size)
                    options["double"] = images.double if images.size == side else None
                    images = load_again(data, images, side, **reading)
                fitted = as_texture(images.pixels, shapes=images.shapes)
                if kind == "auto":
                    others = [fitted.candidate]
                    fitted = fit_sizes(images.pixels, wanted, recipe, budget=budget, others=others, **options)
                    reason = describe_choice(fitted.model, reason or "")
            elif len(wanted) == 1:
                fitted = fit_model(images.pixels, replace_field(recipe, size=wanted[0]), **options)
            else:
                fitted = fit_sizes(images.pixels, wanted, recipe, budget=budget, **options)
            fitted.model.about.update(
                version=fastmaf.__version__,
                created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                kind=reason,
                seconds=fitted.seconds,
                log=fitted.log,
                configuration={
                    **{name: value for name, value in asdict(given).items() if value is not None},
                    **({} if sizes is None else {"size": sizes, "budget": budget}),
                    **({} if features is None else {"features": features}),
                    "kind": asked_kind,
                    **{"group_by": group_by, "keep_folds": keep_folds, "skip_bad": skip_bad},
                },
                notes=list(images.notes),
                skipped=[[path.name, reason] for path, reason in images.skipped],
            )
            outer = _outer(fitted.model, posed, framing)
            interrupted = _write(out, fitted, outer, images, keep_folds)
        except KeyboardInterrupt:
            if stages.done:
                save_state(out, run(), stages)
                say(
                    f"interrupted; kept for --resume: {', '.join(stages.done)}. Model and report in {out} are unchanged"
                )
            else:
                say(f"interrupted before anything was finished: {out} is as it was")
            raise
        if interrupted:
            say(f"interrupted when everything was written to {out}")
            raise KeyboardInterrupt
    return FitResult(fitted, images=len(images), out=out, outer=outer)


def _outer(part: AnomalyModel, posed: InPose | None, framing: Framing | None) -> FramedModel | PosedModel | None:
    """Returns the model of images as they come, for one of framed and turned images; None if they are neither."""
    turned = None if posed is None else posed.model(part)
    return turned if framing is None else framing.model(turned or part)


def outputs_of(out: Path, folds: int = 0) -> list[Output]:
    """Returns the files that ``fit`` writes, and those of an earlier run that it moves or removes."""
    kinds = {MODEL_FILE: model_kind("a model"), LOG_FILE: table("a training log", _LOG_COLUMNS), REPORT_FILE: REPORT}
    outputs = [Output(out / place, kind) for name, kind in kinds.items() for place in (name, previous(Path(name)).name)]
    outputs.append(Output(out / STATE_FILE, model_kind("the state of a training run", "state")))
    fold_model = model_kind("the model of a fold", "statistics")
    return outputs + [Output(file, fold_model) for file in fold_model_files(out, folds)]


def _disk_needed(recipe: Recipe, keep_folds: bool) -> int:
    """Returns the bytes of the whitening's factors, which are nearly all of a model, times the number of models."""
    widest = replace_field(recipe, augmentation="rotations") if recipe.augmentation == "auto" else recipe
    factors = 4 * recipe.features * widest.factors
    return factors * (1 + recipe.folds * keep_folds)


def _write(
    out: Path,
    fitted: Fitted | FittedSizes | FittedTexture,
    outer: AnomalyModel | None,
    images: ImageSet,
    keep_folds: bool,
) -> bool:
    """Writes all files of a run to a temporary folder, then replaces those of an earlier run.

    Args:
        out: the folder.
        fitted: the models of the images.
        outer: the model of images as they come, if it is another one.
        images: that ``fitted`` was fitted to.
        keep_folds: write the fold models, too.

    Returns:
        Whether Ctrl-C was pressed while they were replaced, which goes on.
    """
    from fastmaf.inspection.report.build import training_report

    with staging(out) as new, errors_of_staged(new, out):
        (outer or fitted.model).save(new / MODEL_FILE)
        rows = ((row["step"], f"{row['nll']:.10g}", f"{row['held_out_nll']:.10g}") for row in fitted.log)
        write_csv(new / LOG_FILE, _LOG_COLUMNS, rows)
        if keep_folds and not isinstance(fitted, FittedTexture):
            save_fold_models(new, fitted.density, fitted.out_of_fold.flows)
        training_report(new / REPORT_FILE, fitted.model, images, fitted.held_out, name=out.name, outer=outer)
        with interruptible() as stop:  # Ctrl-C here would leave a mixture of two runs
            files = (MODEL_FILE, LOG_FILE, REPORT_FILE)
            for name in files:
                keep_previous(out / name)
            for name in files:
                replace(new / name, out / name)
            replace_fold_models(new, out)
            remove_state(out)
            remove_fit_state(out)
    return stop.is_set()
