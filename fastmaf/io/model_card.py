"""Model cards: a page of Markdown beside a model file that says what the model is, and what it may be used for."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmaf.io.atomic import written_atomically
from fastmaf.io.flow_config import parts
from fastmaf.io.outputs import Kind, Output, check_outputs

TO_FILL_IN = "**To be filled in:**"
"""Begins each part of a card that only the user knows."""

SECTIONS = {
    "Intended use": "what the model is for, who uses it, and what it must not be used for.",
    "Training data": "where the data come from, how many rows they have, how they were prepared, and their license.",
    "Evaluation": "on which data the model was evaluated, by which figures, and the results.",
    "Limitations": "where the model fails, and which changes of the data it does not tolerate.",
}
"""The sections that are left to the user, with what each should say."""

_MARK = "<!-- Written by fastmaf. It is replaced only while it is unedited. sha256:"
_DENSITY_CODE = """\
import fastmaf
import numpy as np

flow = fastmaf.load({file!r})
x = np.full((4, {features}), 0.5)  # rows of data
print(flow.log_prob(x))  # nats
"""


@dataclass(frozen=True)
class ModelCard:
    """Where ``Flow.save`` writes a model card, and what it says beyond what the flow itself states.

    The card is Markdown with the front matter of Hugging Face's model cards. Architecture, size, versions and date are
    filled in; what only the user knows is left as text that begins with "To be filled in". A card that was edited is
    never replaced, nor is any other file.

    Args:
        path: the file, usually ``MODEL_CARD.md`` or ``README.md`` beside the model.
        title: the heading; by default the name of the model file.
        sections: Markdown by heading, for some of ``SECTIONS``.
        details: further rows of the table of details.
        tags: further tags of the front matter.
        code: example of loading the model, with ``{file!r}`` and ``{features}`` as placeholders.

    Raises:
        ValueError: there is no section of such a heading.

    Example:
        >>> import pathlib, tempfile
        >>> from fastmaf.io.model_card import ModelCard
        >>> flow = fastmaf.MAF(features=3, blocks=1, hidden_features=16)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     card = ModelCard(folder / "README.md", sections={"Training data": "10,000 simulated orbits."})
        ...     flow.save(folder / "orbits.safetensors", card=card)
        ...     lines = (folder / "README.md").read_text("utf-8").splitlines()
        >>> lines[1], "# orbits" in lines, "10,000 simulated orbits." in lines
        ('library_name: fastmaf', True, True)
    """

    path: str | os.PathLike[str]
    title: str | None = None
    sections: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    code: str = _DENSITY_CODE

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.sections) - set(SECTIONS)):
            raise ValueError(f"sections: expected some of {', '.join(SECTIONS)}; found {', '.join(unknown)}")

    def check(self, model: str | os.PathLike[str]) -> None:
        """Checks that the card would replace neither the model nor a file that fastmaf did not write.

        Raises:
            OutputError: it would.
            OSError: its folder cannot be written to.
        """
        check_outputs([Output(Path(self.path), Kind("an unedited model card", _is_unedited))], [model])

    def write(self, flow: nn.Module | None, config: Mapping[str, Any], model: str | os.PathLike[str]) -> None:
        """Writes the card of a flow with its ``config()`` that was saved to the file ``model``.

        Without a flow, for a model that holds several or none, ``details`` say what the model is.
        """
        text = self._text(flow, config, Path(model))
        with written_atomically(self.path) as file:
            file.write(f"{text}\n{_MARK}{_digest(text)} -->\n".encode())

    def _text(self, flow: nn.Module | None, config: Mapping[str, Any], model: Path) -> str:
        tags = ("normalizing-flow", "masked-autoregressive-flow", "density-estimation", *self.tags)
        rows = {**({} if flow is None else dict(_details(flow, config))), **dict(_file(model)), **self.details}
        lines = [
            "---",
            "library_name: fastmaf",
            "license: # to be filled in, such as apache-2.0",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
            "",
            f"# {self.title or _on_one_line(model.stem)}",
            "",
            "A normalizing flow, trained with [fastmaf](https://github.com/fastmaf/fastmaf).",
            "",
            "## Model details",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {key} | {_on_one_line(value)} |" for key, value in rows.items()),
            f"| Developed by | {TO_FILL_IN} who trained the model, and whom to ask. |",
        ]
        for heading, purpose in SECTIONS.items():
            lines += ["", f"## {heading}", "", self.sections.get(heading, f"{TO_FILL_IN} {purpose}")]
        code = self.code.format(file=_relative(model, Path(self.path)), features=config.get("features"))
        lines += ["", "## How to load the model", "", "```python", code.rstrip("\n"), "```", ""]
        return "\n".join(lines)


def _details(flow: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    transforms = [part for part in parts(config) if part.place != "base."]
    kinds = ["inverted " * part.inverted + part.entry["type"].replace("_", " ") for part in transforms]
    hidden = [part.entry["hidden_features"] for part in transforms if "hidden_features" in part.entry]
    tensors = [tensor for tensor in (*flow.parameters(), *flow.buffers()) if tensor.is_floating_point()]
    fixed = sum(tensor.numel() for tensor in tensors if not isinstance(tensor, nn.Parameter))
    yield "Class", f"`fastmaf.{config['class']}`"
    yield "Features", f"{config['features']:,}"
    yield "Transforms", ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)) or "none"
    if (base := config.get("base")) is not None:
        yield "Base", base["type"].replace("_", " ")
    if hidden:
        widths = dict.fromkeys(f"({', '.join(map(str, sizes))})" for sizes in hidden)
        yield "Blocks", str(len(hidden))
        yield "Hidden units of a block", " or ".join(widths)
    yield "Parameters", f"{sum(parameter.numel() for parameter in flow.parameters()):,}"
    if fixed:
        yield "Fixed numbers (buffers)", f"{fixed:,}"
    dtypes = [str(tensor.dtype) for tensor in tensors]
    dtypes += [part.entry["weight_dtype"] for part in transforms if "weight_dtype" in part.entry]
    yield "Data type", ", ".join(dict.fromkeys(name.removeprefix("torch.") for name in dtypes)) or "none"


def _file(model: Path) -> Iterator[tuple[str, str]]:
    yield "File", f"{model.name}, {os.path.getsize(model):,} bytes"
    fastmaf_version = sys.modules["fastmaf"].__version__  # importing fastmaf here would be circular
    yield "Versions", f"fastmaf {fastmaf_version}, torch {torch.__version__}"
    yield "Date", datetime.now(timezone.utc).date().isoformat()


def _relative(model: Path, card: Path) -> str:
    """Returns the path of the model as seen from the folder of the card."""
    try:
        return Path(os.path.relpath(os.path.realpath(model), os.path.dirname(os.path.realpath(card)))).as_posix()
    except ValueError:  # on another drive
        return model.as_posix()


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("|", "\\|")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_unedited(path: Path) -> bool:
    text, _, digest = path.read_bytes().decode("utf-8", "replace").rpartition(f"\n{_MARK}")
    return bool(text) and digest == f"{_digest(text)} -->\n"
