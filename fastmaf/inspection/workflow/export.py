"""``fastmaf inspect export``: write a model as an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fastmaf
from fastmaf.inspection.export.export_onnx import ONNX, export_onnx
from fastmaf.inspection.model import load_inspection, model_file
from fastmaf.inspection.workflow.inputs import Say, expand
from fastmaf.io.outputs import Output, check_outputs


@fastmaf.torch_defaults()
def export(model: str | Path, onnx: str | Path, arguments: Sequence[str], *, say: Say = print) -> str:
    """Writes the model as an ONNX graph, verified on the images that ``arguments`` name; returns the report as text.

    Raises:
        OutputError: ``onnx`` is the model, one of the images, or another file that is not an export.
    """
    files, path = expand(arguments, say=say), model_file(model)
    check_outputs([Output(Path(onnx), ONNX)], [path, *files])
    return export_onnx(load_inspection(path), onnx, files).describe()
