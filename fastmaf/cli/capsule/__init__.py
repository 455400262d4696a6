"""``fastmaf capsule``: the published run on images of capsules, step by step."""

from __future__ import annotations

import typer

from fastmaf.cli.capsule.steps import demo_data, evaluate, sample
from fastmaf.cli.capsule.train import reproduce, train
from fastmaf.cli.former import ModelArgument

app = typer.Typer(no_args_is_help=True, help="The published run on images of capsules, step by step.")
# In the order in which help lists them.
app.command("demo-data")(demo_data)
app.command()(train)
app.command(cls=ModelArgument)(sample)
app.command("eval", cls=ModelArgument)(evaluate)
app.command()(reproduce)
