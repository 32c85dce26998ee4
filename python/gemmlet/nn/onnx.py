"""Networks as ONNX files: written in standard operators, and read where a graph is spelled as exporters do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._files import replacing
from .._version import __version__
from ..formulas.activations import ACTIVATIONS
from . import files
from .dense import Dense

Array = NDArray[Any]

# The first opset with Gelu, and its version of the file format: what readers of the end of 2023 know.
_OPSET, _IR_VERSION = 20, 9

# Of one file; it is the limit of protobuf.
_MOST_BYTES = 2**31 - 1


def _package() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(f"ONNX files need the package onnx: pip install 'gemmlet[onnx]' ({error})") from error
    return onnx


# Writing.


class _Graph:
    """Nodes and constants of a graph that grows."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.onnx, self.dtype = _package(), dtype
        self.nodes: list[Any] = []
        self.tensors: dict[str, Array] = {}

    def add(self, operator: str, *inputs: str | float, to: str | None = None, **attributes: Any) -> str:
        """Add a node, with numbers as constants of the graph's dtype, and return the name of its output."""
        output = to or f"{operator.lower()}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        node = self.onnx.helper.make_node(operator, names, [output], name=f"node_{output}", **attributes)
        self.nodes.append(node)
        return output

    def _constant(self, number: float) -> str:
        name = f"constant_{number!r}"
        self.tensors[name] = np.array(number, self.dtype)
        return name


def _silu(g: _Graph, x: str, parameter: float) -> str:
    return g.add("Mul", x, g.add("Sigmoid", x))


# Each activation in operators: a function of graph, input and parameter. Tests hold them to the registry.
_OPERATORS: dict[str, Callable[[_Graph, str, float], str]] = {
    "identity": lambda g, x, parameter: g.add("Identity", x),
    "relu": lambda g, x, parameter: g.add("Relu", x),
    "leaky_relu": lambda g, x, parameter: g.add("LeakyRelu", x, alpha=parameter),
    "elu": lambda g, x, parameter: g.add("Elu", x, alpha=parameter),
    "gelu": lambda g, x, parameter: g.add("Gelu", x),
    "gelu_tanh": lambda g, x, parameter: g.add("Gelu", x, approximate="tanh"),
    "silu": _silu,
    "softplus": lambda g, x, parameter: g.add("Softplus", x),
    "tanh": lambda g, x, parameter: g.add("Tanh", x),
    "sigmoid": lambda g, x, parameter: g.add("Sigmoid", x),
    "exp": lambda g, x, parameter: g.add("Exp", x),
}


def _where_positive(g: _Graph, x: str, otherwise: str | float) -> str:
    return g.add("Where", g.add("Greater", x, 0.0), x, otherwise)


# Those whose operator does not do in float64: attributes are float32, and onnxruntime has no such kernels.
_FLOAT64_OPERATORS: dict[str, Callable[[_Graph, str, float], str]] = {
    "leaky_relu": lambda g, x, parameter: _where_positive(g, x, g.add("Mul", x, parameter)),
    "elu": lambda g, x, parameter: _where_positive(
        g, x, g.add("Mul", g.add("Sub", g.add("Exp", g.add("Min", x, 0.0)), 1.0), parameter)
    ),
    "softplus": lambda g, x, parameter: g.add(
        "Add", g.add("Max", x, 0.0), g.add("Log", g.add("Add", g.add("Exp", g.add("Neg", g.add("Abs", x))), 1.0))
    ),
}


def rounded(activation: str, parameter: float | None, dtype: np.dtype[Any]) -> float:
    """The number that a graph of this dtype has for an activation."""
    with np.errstate(over="ignore"):
        return float(dtype.type(ACTIVATIONS[activation].default if parameter is None else parameter))


def _activation(g: _Graph, x: str, name: str, parameter: float | None) -> str:
    operators = _OPERATORS | (_FLOAT64_OPERATORS if g.dtype == np.float64 else {})
    if name not in operators:
        raise ValueError(f"the activation {name!r} has no ONNX operators here; those that have: {', '.join(operators)}")
    return operators[name](g, x, ACTIVATIONS[name].default if parameter is None else parameter)


def write(
    path: str | os.PathLike[str],
    kind: str,
    config: dict[str, Any],
    dense: Dense,
    *,
    input_name: str,
    output_name: str,
    ending: str | None = None,
    halved: bool = False,
) -> None:
    """Write layers as an ONNX file; errors are those of `MLP.to_onnx`.

    Parameters
    ----------
    path : path
    kind, config
        Of the network, for the metadata, as in `files.write`.
    dense : Dense
    input_name, output_name : str
        Of the graph.
    ending : str, optional
        An operator after the last layer: Softmax or Sigmoid.
    halved : bool
        Whether results go from [-1, 1] to [0, 1].
    """
    g = _Graph(dense.layers[0].weight.dtype)
    parameters = files.named_tensors(dense)
    widths = [len(dense.layers[0].weight), *(layer.weight.shape[1] for layer in dense.layers)]
    files.check_tensors(parameters, files.expected_shapes(widths), g.dtype)  # somebody may have set them
    if (size := sum(array.nbytes for array in parameters.values())) > _MOST_BYTES - 2**20:
        raise ValueError(f"the parameters have {size:,} bytes, more than the {_MOST_BYTES:,} of an ONNX file")
    x, last = input_name, len(dense.layers) - 1
    for i, layer in enumerate(dense.layers):
        ends = i == last and layer.activation is None and ending is None and not halved
        x = g.add("Gemm", x, f"{i}.weight", f"{i}.bias", to=output_name if ends else f"{i}.linear")
        if layer.activation is not None:
            x = _activation(g, x, layer.activation, layer.activation_parameter)
    if ending is not None:
        x = g.add(ending, x, to=output_name, **({"axis": 1} if ending == "Softmax" else {}))
    elif halved:
        x = g.add("Add", g.add("Mul", x, 0.5), 0.5, to=output_name)
    elif x != output_name:
        g.add("Identity", x, to=output_name)
    helper = g.onnx.helper
    element = helper.np_dtype_to_tensor_dtype(g.dtype)
    graph = helper.make_graph(
        g.nodes,
        kind,
        [helper.make_tensor_value_info(input_name, element, ["n", widths[0]])],
        [helper.make_tensor_value_info(output_name, element, ["n", widths[-1]])],
        [g.onnx.numpy_helper.from_array(array, name) for name, array in (parameters | g.tensors).items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="gemmlet",
        producer_version=__version__,
    )
    helper.set_model_props(model, files.header(kind, config))
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


# Reading.


class Perceptron(NamedTuple):
    """What a graph computes: ``output(... activation(x @ weight + bias) ...)``."""

    layers: list[tuple[Array, Array]]  # weights (in_features, out_features) and biases (out_features,)
    activation: str | None  # of the hidden layers; None if there are none
    activation_parameter: float | None  # None is its default
    output: str  # "softmax", "sigmoid" or "identity"
    classes: list[Any] | None  # the labels, where the graph has them
    multi_label: bool  # whether the graph says that several labels of a sample can be true
    config: dict[str, Any]  # what a network of gemmlet has written besides


# Elementwise operators: between two layers they are to spell an activation. Of those in no spelling, this chooses the
# text of the error alone.
_ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu",
    "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    "ThresholdedRelu", "Where",
}  # fmt: skip

# Operators of which constants are computed as soon as the file is read.
_FOLDED = {
    "Add", "Cast", "Concat", "Constant", "Div", "Flatten", "Gather", "Identity", "Mul", "Neg", "Reshape", "Squeeze",
    "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip

# Those of them that leave each number what it is.
_MOVING = {"Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

# Numbers that they may make: some for a file of any size, and some for each number in it.
_MADE, _MADE_OF_EACH = 2**20, 16


def _gelu_tanh(g: _Graph, x: str, inner: str) -> str:
    bracket = g.add("Add", g.add("Tanh", g.add("Mul", inner, math.sqrt(2 / math.pi))), 1.0)
    return g.add("Mul", g.add("Mul", x, 0.5), bracket)


# Each activation as exporters spell it, as in `_OPERATORS`. PyTorch's exporters compose GELU before opset 20 and guard
# Softplus; the second form of the tanh is that of transformers' "gelu_fast".
_SPELLINGS: list[tuple[str, Callable[[_Graph, str, float], str]]] = [
    *_OPERATORS.items(),
    *_FLOAT64_OPERATORS.items(),
    ("relu", lambda g, x, parameter: g.add("Max", x, 0.0)),
    ("relu", lambda g, x, parameter: _where_positive(g, x, 0.0)),
    ("leaky_relu", lambda g, x, parameter: g.add("PRelu", x, parameter)),
    (
        "gelu",
        lambda g, x, parameter: g.add(
            "Mul", g.add("Mul", x, 0.5), g.add("Add", g.add("Erf", g.add("Div", x, math.sqrt(2))), 1.0)
        ),
    ),
    (
        "gelu_tanh",
        lambda g, x, parameter: _gelu_tanh(g, x, g.add("Add", x, g.add("Mul", g.add("Pow", x, 3.0), 0.044715))),
    ),
    (
        "gelu_tanh",
        lambda g, x, parameter: _gelu_tanh(
            g, x, g.add("Mul", x, g.add("Add", g.add("Mul", g.add("Mul", x, x), 0.044715), 1.0))
        ),
    ),
    ("silu", lambda g, x, parameter: g.add("Div", x, g.add("Add", g.add("Exp", g.add("Neg", x)), 1.0))),
    ("sigmoid", lambda g, x, parameter: g.add("Div", 1.0, g.add("Add", g.add("Exp", g.add("Neg", x)), 1.0))),
    ("softplus", lambda g, x, parameter: g.add("Where", g.add("Greater", x, 20.0), x, g.add("Softplus", x))),
]

# What exporters leave of constants' digits, and what bounds nothing.
_TOLERANCE, _LARGEST = 1e-6, float(np.finfo(np.float32).max)

# No spelling has as many nodes, nor more operands; trees of more could be of any size, as a node may be used twice.
_MOST_NODES, _MOST_OPERANDS = 12, 3

# What a graph computes of x: "x", a number, or an operator with its operands and attributes. Sums, products, maxima and
# minima are in a normal form, with one number at most: what comes first, and what is subtracted, makes no difference.
_Tree = Any

_FOLDS: dict[str, Callable[[list[float]], float]] = {"Add": sum, "Mul": math.prod, "Max": max, "Min": min}


def _joined(operator: str, *operands: _Tree) -> _Tree:
    """An operator of `_FOLDS` in its normal form."""
    parts = [
        part for tree in operands for part in (tree[1:] if isinstance(tree, tuple) and tree[0] == operator else [tree])
    ]
    numbers = [part for part in parts if isinstance(part, float)]
    others = sorted((part for part in parts if not isinstance(part, float)), key=repr)
    parts = ([_FOLDS[operator](numbers)] if numbers else []) + others
    return parts[0] if len(parts) == 1 else (operator, *parts)


def _normal(operator: str, operands: list[_Tree], attributes: dict[str, Any]) -> _Tree:
    """The tree of a node; an operand that is left out is None."""
    a, b, c = (*operands, None, None, None)[:3]
    if operator in _FOLDS:
        return _joined(operator, *operands)
    if operator == "Neg":
        return _joined("Mul", -1.0, a)
    if operator == "Sub":
        return _joined("Add", a, _joined("Mul", -1.0, b))
    if operator == "Div" and b != 0:
        return _joined("Mul", a, 1 / b if isinstance(b, float) else ("Reciprocal", b))
    if operator == "Pow" and b in (2.0, 3.0):
        return _joined("Mul", *[a] * int(b))
    if operator == "Clip":  # whose bounds were attributes once, by default those of float32
        low, high = attributes.get("min", b), attributes.get("max", c)
        a = a if low in (None, -_LARGEST, -math.inf) else _joined("Max", a, low)
        return a if high in (None, _LARGEST, math.inf) else _joined("Min", a, high)
    if operator == "Swish" and attributes["alpha"] == 1:  # of opset 24
        return _joined("Mul", a, ("Sigmoid", a))
    return (operator, *operands, *sorted(attributes.items()))


def _tree(nodes: Sequence[Any], leaves: dict[str, _Tree], opset: int, gives: str) -> _Tree:
    """What nodes compute of leaves."""
    onnx, trees = _package(), leaves | {"": None}
    for node in nodes:
        schema = onnx.defs.get_schema(node.op_type, opset)
        defaults = [a.default_value for a in schema.attributes.values() if a.default_value.type]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in (*defaults, *node.attribute)}
        trees[node.output[0]] = _normal(node.op_type, [trees[name] for name in node.input], attributes)
    return trees[gives]


def _matches(tree: _Tree, pattern: _Tree, parameters: list[float]) -> bool:
    """Whether a tree is a pattern, up to `_TOLERANCE`; NaN in a pattern stands for any number, which is appended."""
    if isinstance(pattern, tuple):
        return (
            isinstance(tree, tuple)
            and len(tree) == len(pattern)
            and all(_matches(*pair, parameters) for pair in zip(tree, pattern, strict=True))
        )
    if not isinstance(pattern, float) or not isinstance(tree, float):
        return bool(tree == pattern)
    if math.isnan(pattern):
        parameters.append(tree)
    return math.isnan(pattern) or math.isclose(tree, pattern, rel_tol=_TOLERANCE)


def read(path: str | os.PathLike[str], kind: str) -> Perceptron:
    """Return the perceptron that the graph in an ONNX file computes; errors are those of `MLP.from_onnx`."""
    onnx, name = _package(), os.fspath(path)
    with open(path, "rb") as file:  # whose errors name the file
        begin = file.read(9)
    try:
        model = onnx.load(name, format="protobuf")  # as it is written, whatever its name ends in
        onnx.checker.check_model(model)
    except Exception as error:  # of protobuf, of the checker, of files with external data
        if begin[8:] == b"{":
            raise ValueError(f"{name} is a safetensors file, no ONNX file; {kind}.load reads those") from error
        raise ValueError(f"{name} is corrupt, or no ONNX file: {error}") from error
    return _Reader(onnx, model, name, kind).perceptron()


class _Gap(NamedTuple):
    """What stands between two layers, or behind the last."""

    nodes: list[Any]  # elementwise ones
    before: Any  # the layer's node
    takes: str  # the layer's result
    gives: str


class _Reader:
    """One graph, from its input to its output."""

    def __init__(self, onnx: Any, model: Any, path: str, kind: str) -> None:
        self.onnx, self.model, self.path, self.kind = onnx, model, path, kind
        self.floats = (int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.DOUBLE))
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=_OPSET)
        self.known = {t.name: self._array(t) for t in model.graph.initializer}
        self.may_make = _MADE + _MADE_OF_EACH * sum(array.size for array in self.known.values())
        # Constants with the number of samples in them, which is not known: it is 0 there, as Reshape has it.
        self.counts = set[str]()
        self.shape: list[int] | None = None  # of the input, if the graph has it, with 0 where one is not known
        self.shapes: dict[str, list[int]] = {}  # of the input, and of what nodes that change nothing make of it
        self.same: dict[str, str] = {}  # what nodes that change nothing give: the name of what they take
        self.layers: list[tuple[Array, Array]] = []
        self.gaps: list[_Gap] = []
        self.both: Any = None  # the node that makes two columns, of both classes, of one output

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path} holds no perceptron: {message}")

    def _refusal(self, node: Any, why: str) -> ValueError:
        name = node.name or f"that gives {node.output[0]}"
        return self._error(f"node {name} ({node.op_type}) {why}")

    def _array(self, tensor: Any) -> Array:
        try:
            return np.asarray(self.onnx.numpy_helper.to_array(tensor))
        except Exception as error:
            made = f"type {tensor.data_type} and shape {[*tensor.dims]}"
            raise ValueError(
                f"{self.path} is corrupt: tensor {tensor.name!r} cannot be read as of {made} ({error!r})"
            ) from error

    def _described(self, values: Any) -> str:
        """Inputs or outputs of the graph, with their types."""
        types = {number: name.lower() for name, number in self.onnx.TensorProto.DataType.items()}
        given = [(value.name, value.type.tensor_type.elem_type) for value in values]
        return ", ".join(f"{name} of {types.get(number, number)}" for name, number in given) or "none"

    def _take_input(self, value: Any) -> None:
        tensor = value.type.tensor_type
        if tensor.elem_type == self.onnx.TensorProto.UINT8:
            raise self._error(f"its input {value.name} is of uint8, which {self.kind} takes as value/255")
        if tensor.HasField("shape"):
            self.shape = self.shapes[value.name] = [max(d.dim_value, 0) for d in tensor.shape.dim]

    def perceptron(self) -> Perceptron:
        graph = self.model.graph
        if self.opset < 7:
            raise self._error(f"its operators are of opset {self.opset}; expected 7 or newer")
        inputs = [i for i in graph.input if i.name not in self.known]
        maps = [node for node in graph.node if node.op_type == "ZipMap"]  # scikit-learn's converter ends in one
        outputs = [o.name for o in graph.output if o.type.tensor_type.elem_type in self.floats]
        outputs = outputs or [node.input[0] for node in maps]
        if len(inputs) != 1:
            raise self._error(f"its inputs are {self._described(inputs)}; expected one")
        if len(outputs) != 1:
            given = self._described(graph.output)
            raise self._error(f"its outputs are {given}; expected one of float (float32) or double (float64)")
        self._take_input(inputs[0])
        ending = self._walk(inputs[0].name, outputs[0])
        if not self.layers:
            raise self._error("it has no layer")
        if (features := self._features()) not in (None, len(self.layers[0][0])):
            raise self._error(f"its input has {features} features, its first layer {len(self.layers[0][0])}")
        activations = [self._recognised(gap) for gap in self.gaps]
        for gap, found in zip(self.gaps[:-1], activations[:-1], strict=True):
            if found != activations[0]:
                shown = [name if p is None else f"{name} of {p:g}" for name, p in (found, activations[0])]
                at = gap.nodes[0] if gap.nodes else gap.before
                raise self._refusal(
                    at, f"makes the activation {shown[0]}, the first one is {shown[1]}; all must be one"
                )
        last, output = self.gaps[-1], activations[-1][0]
        if output not in ("identity", "sigmoid") or (ending is not None and output != "identity"):
            raise self._refusal(last.nodes[0], f"makes {output} of the outputs; expected softmax, sigmoid or nothing")
        activation, parameter = activations[0] if len(activations) > 1 else (None, None)
        if self.both is not None and output != "sigmoid":
            raise self._refusal(self.both, f"makes two columns of {output} outputs; expected sigmoid")
        output = "softmax" if ending is not None else output
        classes = [label for node in maps for labels in self._attributes(node).values() for label in labels]
        try:
            labels = [label.decode() if isinstance(label, bytes) else label for label in classes]
        except UnicodeDecodeError as error:
            raise self._refusal(maps[0], f"has the label {error.object!r}, which is not UTF-8") from error
        if labels and (len(labels) != max(self._width(), 2) or len({*labels}) != len(labels)):
            raise self._refusal(maps[0], f"has the labels {labels}; expected {max(self._width(), 2)} different ones")
        # With this operator scikit-learn's converter tells the labels of a sample, one by one.
        multi_label = any(node.op_type == "Binarizer" for node in graph.node) and output == "sigmoid"
        return Perceptron(self.layers, activation, parameter, output, labels or None, multi_label, self._config())

    def _features(self) -> int | None:
        """The numbers of a sample, if the graph tells."""
        features = self.shape[1:] if self.shape else []
        return math.prod(features) if all(features) and features else None

    def _config(self) -> dict[str, Any]:
        try:
            header = files.parsed_header({entry.key: entry.value for entry in self.model.metadata_props})
        except ValueError:  # somebody else's file
            return {}
        own = header.get("network") == self.kind and header.get("format") == files.FORMAT
        return dict(header["config"]) if own else {}

    def _needed(self, output: str) -> list[Any]:
        """The nodes of which the output is made, in their order."""
        wanted, nodes = {output}, []
        for node in reversed(self.model.graph.node):
            if not wanted.isdisjoint(node.output):
                wanted.update(node.input)
                nodes.append(node)
        return nodes[::-1]

    def _walk(self, start: str, output: str) -> Any:
        """Take the graph apart into layers and gaps, and return the Softmax at its end, if there is one."""
        tip, there, nodes, before, ending, last = start, {start}, list[Any](), None, None, None
        are_rows = self.shape is None or len(self.shape) == 2
        for node in self._needed(output):
            inputs = [self.same.get(name, name) for name in node.input]
            operator, dynamic = node.op_type, [name for name in inputs if name and name not in self.known]
            if node.domain not in ("", "ai.onnx"):
                raise self._refusal(node, f"is of the domain {node.domain}")
            shape = self.shapes.get(node.input[0]) if node.input else None
            if operator == "Shape" and shape is not None and self._features():
                attributes, given = self._attributes(node), node.output[0]
                self.known[given] = np.array(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)
                if 0 in self.known[given]:
                    self.counts.add(given)
                continue
            if not dynamic:
                self._fold(node, inputs)
                continue
            if operator != "Reshape" and not self.counts.isdisjoint(inputs):
                raise self._refusal(node, "computes with the number of samples")
            changes_nothing = self._changes_nothing(node, inputs)
            if last is not None and not changes_nothing:
                raise self._refusal(node, f"stands behind {last.op_type}")
            if not there.issuperset(dynamic):
                raise self._refusal(node, f"takes {', '.join(sorted(set(dynamic) - there))} past a layer")
            if changes_nothing:
                self.same[node.output[0]] = inputs[0]
                makes_rows = operator in ("Flatten", "Reshape")
                are_rows = are_rows or makes_rows
                if shape is not None:
                    self.shapes[node.output[0]] = [*shape[:1], self._features() or 0] if makes_rows else shape
                continue
            if operator in ("Softmax", "LogSoftmax"):
                if not self.layers or self._attributes(node).get("axis", -1) not in (-1, 1):
                    raise self._refusal(node, "is not along the outputs of a layer")
                if self._width() == 1:
                    raise self._refusal(node, "is of one output; expected two or more")
                ending, last, tip = node, node, node.output[0]
                self.gaps.append(_Gap(nodes, before, start, inputs[0]))
                there = {tip}
            elif (layer := self._layer(node, inputs)) is not None:
                if nodes and before is None:
                    raise self._refusal(nodes[0], "stands before the first layer")
                if not are_rows:
                    raise self._refusal(node, f"takes samples of shape {self.shape}, which nothing makes rows (n, k)")
                if before is not None:
                    self.gaps.append(_Gap(nodes, before, start, inputs[0]))
                self.layers.append(layer)
                start = tip = node.output[0]
                nodes, before, there = [], node, {start}
            elif operator == "Add" and before is not None and not nodes and self._adds_bias(inputs):
                start = tip = node.output[0]
                there = {start}
            elif operator == "Concat" and self._adds_complement(node, inputs, nodes):
                self.both = last = node
                there.remove(nodes.pop().output[0])
                tip = self.same[node.output[0]] = inputs[1]
            elif operator in _ELEMENTWISE and all(self._is_number(n) for n in inputs if n in self.known):
                tip = node.output[0]
                nodes.append(self._with_inputs(node, inputs))
                there.update(node.output)
            else:
                raise self._refusal(node, "is no layer, no activation, and nothing that changes nothing")
        if ending is None and before is not None:
            self.gaps.append(_Gap(nodes, before, start, self.same.get(output, output)))
        elif self.same.get(output, output) != tip:
            raise self._error("its output is none of its last node")
        return ending

    def _attributes(self, node: Any) -> dict[str, Any]:
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}

    @staticmethod
    def _with_inputs(node: Any, inputs: Sequence[str]) -> Any:
        copied = type(node)()
        copied.CopyFrom(node)
        copied.input[:] = inputs
        return copied

    def _changes_nothing(self, node: Any, inputs: list[str]) -> bool:
        operator, attributes = node.op_type, self._attributes(node)
        if operator == "Dropout":
            return len(inputs) < 3 or not inputs[2] or not bool(self.known.get(inputs[2], np.True_))
        if operator == "Cast":
            return attributes["to"] in self.floats
        if operator == "Reshape":
            shape = self.known.get(inputs[1], np.empty(0)).tolist()
            if len(shape) != 2 or (attributes.get("allowzero") and 0 in shape):
                return False
            width = self._width() if self.layers else self._features() or shape[1]
            return shape[0] in (-1, 0, *(self.shape or [])[:1]) and shape[1] in (-1, width)
        if operator == "Flatten":
            rank = len(self.shapes.get(node.input[0], (0, 0)))
            return attributes.get("axis", 1) in (1, 1 - rank)
        return bool(operator == "Identity")

    def _width(self) -> int:
        """The columns of what the last layer gives, or of what is made of it."""
        return len(self.layers[-1][1]) if self.both is None else 2

    def _layer(self, node: Any, inputs: list[str]) -> tuple[Array, Array] | None:
        """Weight and bias of a Gemm or a MatMul; None of another node."""
        if node.op_type not in ("Gemm", "MatMul"):
            return None
        attributes, weight = self._attributes(node), self.known.get(inputs[1])
        if weight is None or weight.ndim != 2 or inputs[0] in self.known or attributes.get("transA", 0):
            raise self._refusal(node, "does not multiply rows by a constant matrix")
        if weight.dtype not in (np.float32, np.float64):
            raise self._refusal(node, f"has weights of {weight.dtype}; expected float32 or float64")
        if not weight.size:
            raise self._refusal(node, f"has weights of shape {weight.shape}, which has no number")
        weight = (weight.T if attributes.get("transB", 0) else weight) * weight.dtype.type(attributes.get("alpha", 1))
        if self.layers:
            (other, _), width = self.layers[-1], self._width()
            if len(weight) != width or weight.dtype != other.dtype:
                found = f"{len(weight)} inputs of {weight.dtype}"
                raise self._refusal(node, f"takes {found}, the layer before gives {width} of {other.dtype}")
        bias = np.zeros(weight.shape[1], weight.dtype)
        if len(inputs) > 2 and inputs[2]:
            if not self._fits(inputs[2], bias):
                raise self._refusal(node, "adds what is no bias")
            bias += self.known[inputs[2]].reshape(-1) * weight.dtype.type(attributes.get("beta", 1))
        return weight, bias

    def _is_number(self, name: str) -> bool:
        """Whether a constant is one number, which leaves rows what they are."""
        array = self.known[name]
        return array.size == 1 and array.ndim <= 2 and array.dtype.kind in "biuf"

    def _fits(self, name: str, bias: Array) -> bool:
        """Whether a constant can be added to a bias: it is one number for all rows and outputs, or for all rows."""
        array = self.known.get(name, np.empty(0))
        is_row = array.ndim <= 2 and array.size == (array.shape[-1] if array.ndim else 1)
        return is_row and array.dtype == bias.dtype and array.size in (1, len(bias))

    def _adds_bias(self, inputs: list[str]) -> bool:
        """Add a constant to the last layer's bias, if that is what the node does."""
        constants, bias = [name for name in inputs if name in self.known], self.layers[-1][1]
        if len(constants) != 1 or not self._fits(constants[0], bias):
            return False
        bias += self.known[constants[0]].reshape(-1)
        return True

    def _adds_complement(self, node: Any, inputs: list[str], nodes: list[Any]) -> bool:
        """Whether a node makes ``[1 - p, p]`` of p, with the last of `nodes`: of one output, the two classes."""
        if not self.layers or self._width() != 1:
            return False
        if not nodes or nodes[-1].op_type != "Sub" or inputs != [nodes[-1].output[0], nodes[-1].input[1]]:
            return False
        one = self.known.get(nodes[-1].input[0])
        return one is not None and bool(one == 1) and self._attributes(node)["axis"] in (-1, 1)

    def _fold(self, node: Any, inputs: list[str]) -> None:
        """Compute what a node makes of constants, by the package's own reference."""
        from onnx.reference import ReferenceEvaluator

        if node.op_type not in _FOLDED:
            raise self._refusal(node, "computes with constants what is not known here")
        counts = self.counts.intersection(inputs)
        others = [] if node.op_type == "Concat" else inputs[1:]  # shapes, axes, indices
        if counts and (node.op_type not in _MOVING or not counts.isdisjoint(others)):
            raise self._refusal(node, "computes with the number of samples")
        helper = self.onnx.helper
        try:
            self.may_make -= self._numbers(node, inputs)
            if self.may_make < 0:
                raise ValueError("it makes far more numbers than the file has")
            graph = helper.make_graph(
                [self._with_inputs(node, inputs)],
                "constant",
                [],
                [helper.make_value_info(node.output[0], self.onnx.TypeProto())],
                [self.onnx.numpy_helper.from_array(self.known[name], name) for name in sorted({*inputs} - {""})],
            )
            model = helper.make_model(graph, opset_imports=self.model.opset_import)
            with np.errstate(all="ignore"):
                (made,) = ReferenceEvaluator(model).run(None, {})
        except Exception as error:
            raise self._refusal(node, f"cannot be computed: {error}") from error
        self.known[node.output[0]] = made
        if node.op_type == "Constant":
            self.may_make += _MADE_OF_EACH * made.size
        if counts and (made.dtype.kind not in "iu" or not np.all(made)):
            self.counts.add(node.output[0])

    def _numbers(self, node: Any, inputs: list[str]) -> int:
        """How many numbers a node makes of constants."""
        arrays = [self.known[name] for name in inputs if name]
        if node.op_type == "Concat":
            return sum(array.size for array in arrays)
        if node.op_type == "Gather":
            rows = arrays[0].shape[self._attributes(node).get("axis", 0)]
            return int(arrays[0].size // rows * arrays[1].size)
        operands = arrays if node.op_type in _ELEMENTWISE else arrays[:1]
        return math.prod(np.broadcast_shapes(*(array.shape for array in operands)))

    def _recognised(self, gap: _Gap) -> tuple[str, float | None]:
        """The activation that the nodes of a gap spell, and its parameter where it is not the default."""
        if not gap.nodes:
            return "identity", None
        dtype = self.layers[0][0].dtype
        if len(gap.nodes) <= _MOST_NODES and all(len(node.input) <= _MOST_OPERANDS for node in gap.nodes):
            constants = {n for node in gap.nodes for n in node.input if n in self.known}
            leaves = {n: float(self.known[n].item()) for n in constants} | {gap.takes: "x"}
            tree = _tree(gap.nodes, leaves, self.opset, gap.gives)
            for name, spell in _SPELLINGS:
                g, parameters, default = _Graph(np.dtype(np.float64)), list[float](), ACTIVATIONS[name].default
                gives = spell(g, "x", math.nan)
                numbers = {n: float(array) for n, array in g.tensors.items()}
                if not _matches(tree, _tree(g.nodes, numbers | {"x": "x"}, _OPSET, gives), parameters):
                    continue
                if all(0 < p < math.inf for p in parameters):
                    rounded = {dtype.type(p) for p in parameters} - {dtype.type(default)}
                    return name, parameters[0] if rounded else None
        raise self._refusal(gap.nodes[0], "begins what is no activation of gemmlet")
