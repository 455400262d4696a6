"""Building an ONNX graph with arithmetic expressions: ``(x - mean) / scale`` appends a Sub and a Div node."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, Union

import numpy as np
from torch import Tensor

OPSET = 18  # the first in which every reduction takes its axes as an input; ONNX Runtime reads it since 1.14
_LARGEST = 2**31 - 2**20
"""Bytes of constants in one file: protobuf's limit of 2 GiB minus space for the nodes."""


class ExportError(ValueError):
    """A model cannot be exported, or its graph gives other results than fastmaf."""


def require(name: str) -> Any:
    """Imports onnx or onnxruntime; an ExportError names the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"exporting needs {name} ({error}): pip install 'fastmaf[export]'") from error


Operand: TypeAlias = Union["Value", Tensor, np.ndarray, float]


class Value:
    """A value in a graph. Operators accept another value, or numbers, which become constants of this value's dtype."""

    def __init__(self, graph: Graph, name: str, dtype: str) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype

    def op(
        self, kind: str, *others: Operand | None, dtype: str | None = None, outputs: int = 1, **attributes: Any
    ) -> Value:
        """Appends a node whose first input is this value, and returns its first output; None omits an input."""
        names = ["" if other is None else self.graph.value(other, self.dtype).name for other in (self, *others)]
        return Value(self.graph, self.graph.add_node(kind, names, outputs, attributes), dtype or self.dtype)

    def __add__(self, other: Operand) -> Value:
        return self.op("Add", other)

    def __sub__(self, other: Operand) -> Value:
        return self.op("Sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self.op("Mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self.op("Div", other)

    def __matmul__(self, other: Operand) -> Value:
        return self.op("MatMul", other)

    def __neg__(self) -> Value:
        return self.op("Neg")

    def __gt__(self, other: Operand) -> Value:
        return self.op("Greater", other, dtype="bool")

    def __ge__(self, other: Operand) -> Value:
        return self.op("GreaterOrEqual", other, dtype="bool")

    def cast(self, dtype: str) -> Value:
        """Casts to float32, float64 or int64."""
        return self.op("Cast", dtype=dtype, to=self.graph.type_of(dtype))

    def reshape(self, *shape: int) -> Value:
        """Reshapes; -1 infers one size, 0 keeps that of the same axis."""
        return self.op("Reshape", self.graph.value(np.array(shape), "int64"))

    def transpose(self, *axes: int) -> Value:
        """Permutes the axes."""
        return self.op("Transpose", perm=list(axes))

    def take(self, index: Tensor | np.ndarray | int, axis: int) -> Value:
        """Gathers entries along an axis."""
        return self.op("Gather", self.graph.value(index, "int64"), axis=axis)

    def sum(self, axis: int | None = None, *, keep: bool = False) -> Value:
        """Sums over one axis, or over all."""
        # An omitted input is left out, not empty: OpenVINO would take an empty one for axes that it does not know.
        axes = [] if axis is None else [self.graph.value(np.array([axis]), "int64")]
        return self.op("ReduceSum", *axes, keepdims=int(keep))


class Graph:
    """Nodes and constants of a graph under construction.

    Raises:
        ExportError: onnx is not installed.
    """

    def __init__(self) -> None:
        self._onnx = require("onnx")
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def type_of(self, dtype: str) -> int:
        """Returns ONNX's number of a dtype."""
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def _info(self, value: Value, shape: Sequence[int | str] | None, meaning: str = "") -> Any:
        return self._onnx.helper.make_tensor_value_info(value.name, self.type_of(value.dtype), shape, meaning)

    def value(self, of: Operand, dtype: str) -> Value:
        """Returns a value unchanged, and numbers as a constant."""
        if isinstance(of, Value):
            return of
        array = np.asarray(of.detach().cpu() if isinstance(of, Tensor) else of, order="C").astype(dtype)
        constant = self._onnx.numpy_helper.from_array(array, self._name("constant"))
        self._constants.append(constant)
        if sum(constant.ByteSize() for constant in self._constants) > _LARGEST:
            raise ExportError("an ONNX file holds at most 2 GiB; the dense weights of this model take more")
        return Value(self, constant.name, dtype)

    def add_node(self, kind: str, inputs: Sequence[str], outputs: int, attributes: dict[str, Any]) -> str:
        """Appends a node and returns the name of its first output."""
        name = self._name(kind)
        names = [name, *(f"{name}_unused_{i}" for i in range(1, outputs))]
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, names, name, **attributes))
        return name

    def either(self, condition: Value, then: Callable[[], Value], other: Callable[[], Value]) -> Value:
        """Returns one of two values; only that one is computed."""
        nodes, branches = self._nodes, []
        for build in (then, other):
            self._nodes = []
            result = build()
            branches.append(self._onnx.helper.make_graph(self._nodes, "branch", [], [self._info(result, None)]))
        self._nodes = nodes
        return condition.op("If", dtype=result.dtype, then_branch=branches[0], else_branch=branches[1])

    def input(self, name: str, dtype: str, shape: Sequence[int | str], meaning: str) -> Value:
        """Declares an input; names in the shape are symbolic sizes."""
        value = Value(self, name, dtype)
        self._inputs.append(self._info(value, shape, meaning))
        return value

    def output(self, name: str, value: Value, shape: Sequence[int | str], meaning: str) -> None:
        """Declares an output; names in the shape are symbolic sizes."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value.name], [name], name))
        self._outputs.append(self._info(Value(self, name, value.dtype), shape, meaning))

    def model(self, name: str, meaning: str, properties: dict[str, str], version: str) -> Any:
        """Returns the ``onnx.ModelProto``."""
        helper = self._onnx.helper
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._constants, meaning),
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),  # for older runtimes
            producer_name="fastmaf",
            producer_version=version,
            doc_string=meaning,
        )
        helper.set_model_props(model, properties)
        return model
