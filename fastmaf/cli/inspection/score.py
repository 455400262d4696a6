"""``fastmaf inspect score`` and ``serve``: scores of new images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastmaf.cli import options
from fastmaf.cli.options import device_named, refuse
from fastmaf.cli.output import say_aside


def score(
    model: options.Model,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGES", callback=options.existing_images, help=f"Images: {options.IMAGES}"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Output file, .csv or .jsonl. Default: CSV on standard output."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same arguments and model.")
    ] = False,
    json_lines: Annotated[bool, typer.Option("--jsonl", help="Print JSON lines instead of CSV.")] = False,
    overlays: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for anomaly maps over the images, PNG.")
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the maps as numbers, 16-bit PNG.")
    ] = None,
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps as 32-bit TIFF instead.")] = False,
    nll: Annotated[
        bool, typer.Option("--nll", help="Fill in the column nll, too; takes longer if the model has blocks.")
    ] = False,
    watch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            callback=options.existing,
            help="Instead of IMAGES: score the images in a folder, and new ones once they are complete, until Ctrl-C.",
        ),
    ] = None,
    fail_on_anomaly: Annotated[
        bool, typer.Option("--fail-on-anomaly", help="End with exit code 3 if an image is anomalous.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Processes that read images. Default: one per processor; none for few images."
        ),
    ] = None,
    follow_links: options.FollowLinks = False,
    deterministic: options.Deterministic = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score images and classify them as good or anomalous.

    One row an image: anomaly score, p-value, verdict and latency. The exit code is 2 if files could not be read, and 3
    with --fail-on-anomaly if images are anomalous. Several processes, also on several machines, share the images with
    torchrun --nproc-per-node N -m fastmaf inspect score.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        refuse(f"expected a .csv or .jsonl file for --out; found {out}")
    if tiff and maps is None:
        refuse("--tiff is the format of --maps; found no --maps")
    if resume and out is None:
        refuse("--resume continues a run with --out; found no --out")
    if watch is None and not images:
        refuse("Missing argument 'IMAGES', or --watch DIR")
    if watch is not None and images:
        refuse("--watch scores the images of a folder; found IMAGES, too")
    settings: Any = {
        "out": out,
        "resume": resume,
        "json_lines": json_lines,
        "overlays": overlays,
        "maps": maps,
        "map_suffix": ".tiff" if tiff else ".png",
        "nll": nll,
        "device": device_named(device),
        "workers": workers,
        "stdout": sys.stdout,
        "say": say_aside,
    }
    if watch is not None:
        from fastmaf.inspection.workflow.watch import watch as run_until_stopped

        result = run_until_stopped(model, watch, **settings)
    else:
        from fastmaf.inspection.workflow.score import score_images as run

        result = run(model, images or [], **settings, progress=not quiet)
    if result.interrupted:
        say_aside("stopped")
        raise typer.Exit(130)
    if fail_on_anomaly and result.anomalous:
        raise typer.Exit(3)
    if result.unread:
        raise typer.Exit(2)


def serve(
    model: options.Model,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 for any free one.")] = 8000,
    max_bytes: Annotated[int, typer.Option(min=1, metavar="N", help="Largest image file that is accepted.")] = 32
    * 2**20,
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest width x height that is accepted.")
    ] = 25_000_000,
    device: options.Device = "auto",
    verbose: options.Verbose = False,
) -> None:
    """Score images over HTTP, until Ctrl-C.

    POST an image file to /score for its score, p-value and verdict as JSON, with the anomaly map for ?overlay=true. The
    address itself shows a page to drop an image on. Only this machine can reach it unless --host is given.
    """
    from fastmaf.inspection.serve.run import serve as run

    limits: Any = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    run(model, host=host, port=port, **limits, device=device_named(device), say=say_aside)
