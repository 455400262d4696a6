"""Commands about fastmaf itself: ``fastmaf bench`` and ``fastmaf doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmaf.cli import options
from fastmaf.cli.options import device_named, refuse
from fastmaf.cli.output import say, say_json


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: two minutes, not up to an hour.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for CSV, JSON and figures.")] = Path(
        "bench-results"
    ),
    library: Annotated[
        list[str] | None,
        typer.Option(
            "--library",
            "--side",
            metavar="NAME",
            help="Compare only with this library, such as nflows; may be repeated.",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.csv B.csv", help="Print how B differs from A, as ratios, without measuring."),
    ] = None,
    device: options.Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Time fastmaf beside other libraries.

    The naive dense model, nflows, zuko, normflows and flowjax; each is checked against fastmaf first. With --compare,
    the exit code is 1 if B is slower than A.
    """
    if as_json and not compare:
        refuse("--json is the format of --compare; found no --compare (a run writes JSON to --out)")
    try:
        if compare:
            from fastmaf.bench.compare import compare as run_compare

            comparison = run_compare(*compare)
            if as_json:
                say_json(comparison.to_json())
            else:
                say(comparison.text)
            raise typer.Exit(1 if comparison.has_regression else 0)
        from fastmaf.bench import command
    except ModuleNotFoundError as error:
        raise ValueError(f"the benchmarks need more packages ({error}): pip install 'fastmaf[bench]'") from error

    name = device_named(device)
    if not command.bench(out, quick=quick, device=name, libraries=library or (), progress=not quiet, say=say):
        raise typer.Exit(1)


def doctor(as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Show versions, devices, and the backends in use."""
    from fastmaf.doctor import facts, report

    if as_json:
        say_json(facts())
    else:
        say(report())
