"""``fastmaf inspect fit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.config_file import from_file, reads, resolved, to_toml
from fastmaf.cli.options import checked_settings
from fastmaf.cli.output import say, say_aside, say_json, say_or_aside


def _fit_and_recipe() -> tuple[Callable[..., None], type]:
    from fastmaf.inspection.recipe import Recipe

    return fit, Recipe


def fit(
    context: typer.Context,
    data: options.TrainData,
    out: options.Out = Path("results"),
    size: Annotated[
        str,
        typer.Option(
            callback=options.size_or_auto,
            metavar="auto|N",
            help="Side of the square images in pixels; auto tries 64, 128 and 256, as far as images and --budget go.",
        ),
    ] = "64",
    budget: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for the models of --size auto; from 300 on, 256 too.")
    ] = 120,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="efficientnet-lite0",
            help="Use the features of this pretrained network, too; needs fastmaf[features]. Default: from scratch.",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            callback=options.inspected_kind,
            metavar="auto|object|texture",
            help="An object, whose parts have a fixed place or shape; a texture, which looks the same everywhere; or "
            "what the good images, and synthetic defects on them, call for.",
        ),
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Spread each 8-bit value evenly over its bin for fitting.")
    ] = False,
    logit: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Apply a logit with this alpha, such as 0.05, to the pixels first."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|REGEX|CSV",
            help="Images taken together: 'folder', an expression for their names such as '^part(\\d+)', or a .csv with "
            "columns file and group. Whole groups are held out.",
        ),
    ] = None,
    keep_folds: Annotated[
        bool, typer.Option("--keep-folds", help="Keep the fold models; eval then reports their mean, too.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a fit that Ctrl-C interrupted, with the same images and settings."),
    ] = False,
    seed: options.Seed = 0,
    deterministic: options.Deterministic = False,
    skip_bad: options.SkipBad = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=reads(_fit_and_recipe),
            help="TOML or JSON file with options, and settings of the recipe such as rank and folds. Options of the "
            "command line take precedence.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as TOML for --config, and do nothing else.")
    ] = False,
    follow_links: options.FollowLinks = False,
    explain: options.Explain = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fit a model to good images, on the CPU, and calibrate it.

    Writes model.safetensors, training_log.csv and report.html.
    """
    from fastmaf.inspection.recipe import Recipe

    with checked_settings():
        if features is not None:
            from fastmaf.inspection.features.extractor import check_name

            check_name(features)
        side = 64 if size == "auto" else int(size)
        recipe = Recipe(**from_file(context), size=side, seed=seed, dequantize=dequantize, logit=logit)
    if print_config:
        paths: Any = {"data": str(data), "out": str(out), "size": size if size == "auto" else side, "budget": budget}
        paths |= {"kind": kind, "features": features}
        say(to_toml(resolved(recipe, **paths, group_by=group_by, keep_folds=keep_folds, skip_bad=skip_bad)))
        return
    from fastmaf.inspection.workflow.fit import fit as run

    settings: Any = {"keep_folds": keep_folds, "resume": resume, "skip_bad": skip_bad, "progress": not quiet}
    sizes: Any = "auto" if size == "auto" else None
    settings |= {"sizes": sizes, "budget": budget, "kind": kind, "features": features, "group_by": group_by}
    result = run(data, out, recipe, **settings, say=say_aside)
    say_or_aside(as_json)(result.describe(explain))
    if as_json:
        say_json(result.summary())
