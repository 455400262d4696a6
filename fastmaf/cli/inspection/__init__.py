"""``fastmaf inspect``: finding defects: fitting to good images, calibration, scores and anomaly maps."""

from __future__ import annotations

import typer

from fastmaf.cli.former import ModelArgument
from fastmaf.cli.inspection.evaluate import choose, evaluate, export
from fastmaf.cli.inspection.fit import fit
from fastmaf.cli.inspection.score import score, serve
from fastmaf.cli.inspection.threshold import calibrate, recalibrate

app = typer.Typer(no_args_is_help=True, help="Find defects in images of any object, from good images alone.")
# In the order in which help lists them.
app.command()(fit)
app.command(cls=ModelArgument)(calibrate)
app.command()(recalibrate)
app.command()(score)
app.command()(serve)
app.command("eval", cls=ModelArgument)(evaluate)
app.command()(export)
app.command()(choose)
