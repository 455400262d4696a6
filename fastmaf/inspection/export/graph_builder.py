"""Building an ONNX graph with arithmetic expressions: ``(x - mean) / scale`` appends a Sub and a Div node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, Union

import numpy as np
from torch import Tensor

OPSET = 18  # the first in which every reduction takes its axes as an input; ONNX Runtime reads it since 1.14
_LARGEST = 2**31 - 2**20
"""Bytes of constants in one file: protobuf's limit of 2 GiB minus space for the nodes."""


class ExportError(ValueError):
    """A model cannot be exported, or its graph gives other results than fastmaf."""


Operand: TypeAlias = Union["Value", Tensor, np.ndarray, float]


class Value:
    """A value in a graph. Operators accept another value, or numbers, which become constants of this value's dtype."""

    def __init__(self, graph: Graph, name: str, dtype: str) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype

    def op(self, kind: str, *others: Operand | None, dtype: str | None = None, **attributes: Any) -> Value:
        """Appends a node whose first input is this value; None omits an optional input."""
        inputs = [self, *(None if other is None else self.graph.value(other, self.dtype) for other in others)]
        return self.graph.node(kind, inputs, dtype or self.dtype, **attributes)

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
        return self.op("Cast", dtype=dtype, to=_type_of(dtype))

    def reshape(self, *shape: int) -> Value:
        """Reshapes; -1 infers one size."""
        return self.op("Reshape", self.graph.value(np.array(shape), "int64"))

    def transpose(self, *axes: int) -> Value:
        """Permutes the axes."""
        return self.op("Transpose", perm=list(axes))

    def take(self, index: Tensor | np.ndarray | int, axis: int) -> Value:
        """Gathers entries along an axis."""
        return self.op("Gather", self.graph.value(np.asarray(index), "int64"), axis=axis)

    def sum(self, axis: int | None = None, *, keep: bool = False) -> Value:
        """Sums over one axis, or over all."""
        axes = None if axis is None else self.graph.value(np.array([axis]), "int64")
        return self.op("ReduceSum", axes, keepdims=int(keep))


class Graph:
    """Nodes and constants of a graph under construction; equal small constants are stored once.

    Raises:
        ExportError: onnx is not installed.
    """

    def __init__(self) -> None:
        self._helper = require("onnx").helper
        self._nodes: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def value(self, of: Operand, dtype: str) -> Value:
        """Returns a value unchanged, and numbers as a constant."""
        if isinstance(of, Value):
            return of
        array = np.asarray(of.detach().cpu() if isinstance(of, Tensor) else of, order="C").astype(dtype)
        # Only small constants are compared by content: hashing the factors would copy them.
        key = dtype, array.shape, array.tobytes() if array.nbytes < 1024 else self._name("unique").encode()
        if key not in self._constants:
            self._constants[key] = require("onnx").numpy_helper.from_array(array, self._name("constant"))
            if sum(constant.ByteSize() for constant in self._constants.values()) > _LARGEST:
                raise ExportError("an ONNX file holds at most 2 GiB; the dense weights of this model take more")
        return Value(self, self._constants[key].name, dtype)

    def node(
        self, kind: str, inputs: Sequence[Value | None], dtype: str, *, unused: int = 0, **attributes: Any
    ) -> Value:
        """Appends a node and returns its first output; it has ``unused`` further outputs."""
        name = self._name(kind)
        names = ["" if value is None else value.name for value in inputs]
        outputs = [name, *(f"{name}_unused_{i}" for i in range(unused))]
        self._nodes.append(self._helper.make_node(kind, names, outputs, name, **attributes))
        return Value(self, name, dtype)

    def either(self, condition: Value, then: Callable[[], Value], other: Callable[[], Value]) -> Value:
        """Returns one of two values; only that one is computed."""
        branches = []
        for build in (then, other):
            with self._branch() as nodes:
                result = build()
            end = self._helper.make_tensor_value_info(result.name, _type_of(result.dtype), None)
            branches.append(self._helper.make_graph(nodes, self._name("branch"), [], [end]))
        return self.node("If", [condition], result.dtype, then_branch=branches[0], else_branch=branches[1])

    @contextmanager
    def _branch(self) -> Iterator[list[Any]]:
        own, self._nodes = self._nodes, []
        try:
            yield self._nodes
        finally:
            self._nodes = own

    def input(self, name: str, dtype: str, shape: Sequence[int | str], meaning: str) -> Value:
        """Declares an input; names in the shape are symbolic sizes."""
        self._inputs.append(self._helper.make_tensor_value_info(name, _type_of(dtype), shape, meaning))
        return Value(self, name, dtype)

    def output(self, name: str, value: Value, shape: Sequence[int], meaning: str) -> None:
        """Declares an output."""
        self._nodes.append(self._helper.make_node("Identity", [value.name], [name], name))
        self._outputs.append(self._helper.make_tensor_value_info(name, _type_of(value.dtype), shape, meaning))

    def model(self, name: str, meaning: str, properties: dict[str, str], version: str) -> Any:
        """Returns the ``onnx.ModelProto``."""
        constants = list(self._constants.values())
        graph = self._helper.make_graph(self._nodes, name, self._inputs, self._outputs, constants, meaning)
        opsets = [self._helper.make_opsetid("", OPSET)]
        model = self._helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=self._helper.find_min_ir_version_for(opsets),  # for older runtimes
            producer_name="fastmaf",
            producer_version=version,
            doc_string=meaning,
        )
        self._helper.set_model_props(model, properties)
        return model


def require(name: str) -> Any:
    """Imports onnx or onnxruntime.

    Raises:
        ExportError: it is not installed; the message gives the command that installs it.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"exporting needs {name} ({error}): pip install 'fastmaf[export]'") from error


def _type_of(dtype: str) -> int:
    return int(require("onnx").helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
