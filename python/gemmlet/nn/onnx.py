"""Networks as ONNX files: written in standard operators, and read by what the graph computes."""

from __future__ import annotations

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


def _where_positive(g: _Graph, x: str, otherwise: str) -> str:
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
    config: dict[str, Any]  # what a network of gemmlet has written besides


# Elementwise operators; what becomes of them between two layers is told by trying.
_ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu",
    "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh",
    "ThresholdedRelu", "Where",
}  # fmt: skip

# Operators of which constants are computed as soon as the file is read.
_FOLDED = {
    "Add", "Cast", "Constant", "Div", "Flatten", "Identity", "Mul", "Neg", "Reshape", "Squeeze", "Sub", "Transpose",
    "Unsqueeze",
}  # fmt: skip

# Where activations are compared: from what the tolerance hides to what no network reaches, so that relu6 is not relu,
# wherever its limits are. The first, a power of 2, gives a parameter without rounding: leaky_relu and elu there are
# proportional to it, elu by exactly -1. All are float32, the same for every graph.
_TOLERANCE = 1e-5
_FAR = np.geomspace(_TOLERANCE / 2, 1e30, 1000)
_PROBES = np.array([-(2.0**14), *np.linspace(-16, 16, 129), *_FAR, *-_FAR]).astype(np.float32).astype(np.float64)


def read(path: str | os.PathLike[str], kind: str) -> Perceptron:
    """Return the perceptron that the graph in an ONNX file computes; errors are those of `MLP.from_onnx`."""
    onnx, name = _package(), os.fspath(path)
    with open(path, "rb"):  # whose errors name the file
        pass
    try:
        model = onnx.load(name, format="protobuf")  # whatever the name ends in, as `write` does
        onnx.checker.check_model(model)
    except Exception as error:  # of protobuf, of the checker, of files with external data
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
        self.known = {t.name: self._array(t) for t in model.graph.initializer}
        self.shape: list[int] = []  # of the input, 0 for what is not fixed
        self.is_flat = False  # whether what a layer takes is a matrix
        self.same: dict[str, str] = {}  # what nodes that change nothing give: the name of what they take
        self.layers: list[tuple[Array, Array]] = []
        self.gaps: list[_Gap] = []

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path} holds no perceptron: {message}")

    def _array(self, tensor: Any) -> Array:
        try:
            return np.asarray(self.onnx.numpy_helper.to_array(tensor))
        except Exception as error:  # the checker does not look at all of it
            raise ValueError(f"{self.path} is corrupt: tensor {tensor.name}: {error}") from error

    def _refusal(self, node: Any, why: str) -> ValueError:
        name = node.name or f"that gives {node.output[0]}"
        return self._error(f"node {name} ({node.op_type}) {why}")

    def perceptron(self) -> Perceptron:
        graph = self.model.graph
        inputs = [i for i in graph.input if i.name not in self.known]
        maps = [node for node in graph.node if node.op_type == "ZipMap"]  # scikit-learn's converter ends in one
        outputs = [o.name for o in graph.output if o.type.tensor_type.elem_type in self.floats]
        outputs = outputs or [node.input[0] for node in maps]
        if len(inputs) != 1 or len(outputs) != 1:
            raise self._error(f"it has {len(inputs)} inputs and {len(outputs)} outputs of floats, expected one of each")
        takes = inputs[0].type.tensor_type
        if takes.elem_type == self.onnx.TensorProto.UINT8:
            raise self._error("its input is of uint8, which gemmlet takes as value/255")
        self.shape = [d.dim_value for d in takes.shape.dim]
        self.is_flat, features = len(self.shape) <= 2, self.shape[1:]
        ending = self._walk(inputs[0].name, outputs[0])
        if not self.layers:
            raise self._error("it has no layer")
        if all(features) and features and np.prod(features) != len(self.layers[0][0]):
            raise self._error(f"its input has {np.prod(features)} features, its first layer {len(self.layers[0][0])}")
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
        output = "softmax" if ending is not None else output
        classes = [label for node in maps for labels in self._attributes(node).values() for label in labels]
        labels = [label.decode() if isinstance(label, bytes) else label for label in classes]
        return Perceptron(self.layers, activation, parameter, output, labels or None, self._config())

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
        tip, there, nodes, before, ending = start, {start}, list[Any](), None, None
        for node in self._needed(output):
            inputs = [self.same.get(name, name) for name in node.input]
            operator, dynamic = node.op_type, [name for name in inputs if name and name not in self.known]
            if node.domain not in ("", "ai.onnx"):
                raise self._refusal(node, f"is of the domain {node.domain}")
            if not dynamic:
                self._fold(node, inputs)
                continue
            if not there.issuperset(dynamic):
                raise self._refusal(node, f"takes {', '.join(sorted(set(dynamic) - there))} past a layer")
            if self._changes_nothing(node, inputs):
                self.same[node.output[0]] = inputs[0]
                self.is_flat |= operator in ("Flatten", "Reshape")
                continue
            if ending is not None:
                raise self._refusal(node, f"stands behind {ending.op_type}")
            if operator in ("Softmax", "LogSoftmax"):
                if not self.layers or self._attributes(node).get("axis", -1) not in (-1, 1):
                    raise self._refusal(node, "is not along the outputs of a layer")
                ending, tip = node, node.output[0]
                self.gaps.append(_Gap(nodes, before, start, inputs[0]))
                there = {tip}
            elif (layer := self._layer(node, inputs)) is not None:
                if nodes and before is None:
                    raise self._refusal(nodes[0], "stands before the first layer")
                if not self.is_flat:
                    raise self._refusal(node, f"takes an input of {len(self.shape)} dimensions, which nothing flattens")
                if before is not None:
                    self.gaps.append(_Gap(nodes, before, start, inputs[0]))
                self.layers.append(layer)
                start = tip = node.output[0]
                nodes, before, there = [], node, {start}
            elif operator == "Add" and before is not None and not nodes and self._adds_bias(inputs):
                start = tip = node.output[0]
                there = {start}
            elif operator == "Concat" and self._adds_complement(node, inputs, nodes):
                nodes.pop()
                tip = self.same[node.output[0]] = inputs[1]
            elif operator in _ELEMENTWISE and all(self.known[n].size == 1 for n in inputs if n in self.known):
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
            width = self.layers[-1][0].shape[1] if self.layers else shape[-1:]
            rows = (-1, 0, *self.shape[:1])
            return len(shape) == 2 and shape[0] in rows and (shape[1] in (-1, width) or not self.layers)
        return operator == "Identity" or (operator == "Flatten" and bool(attributes.get("axis", 1) == 1))

    def _layer(self, node: Any, inputs: list[str]) -> tuple[Array, Array] | None:
        """Weight and bias of a Gemm or a MatMul; None of another node."""
        if node.op_type not in ("Gemm", "MatMul"):
            return None
        attributes, weight = self._attributes(node), self.known.get(inputs[1])
        if weight is None or weight.ndim != 2 or inputs[0] in self.known or attributes.get("transA", 0):
            raise self._refusal(node, "does not multiply rows by a constant matrix")
        if weight.dtype not in (np.float32, np.float64):
            raise self._refusal(node, f"has weights of {weight.dtype}; expected float32 or float64")
        weight = (weight.T if attributes.get("transB", 0) else weight) * weight.dtype.type(attributes.get("alpha", 1))
        if self.layers:
            (other, _), width = self.layers[-1], self.layers[-1][0].shape[1]
            if len(weight) != width or weight.dtype != other.dtype:
                found = f"{len(weight)} inputs of {weight.dtype}"
                raise self._refusal(node, f"takes {found}, the layer before gives {width} of {other.dtype}")
        bias = np.zeros(weight.shape[1], weight.dtype)
        if len(inputs) > 2 and inputs[2]:
            if not self._fits(inputs[2], bias):
                raise self._refusal(node, "adds what is no bias")
            bias += self.known[inputs[2]].reshape(-1) * weight.dtype.type(attributes.get("beta", 1))
        return weight, bias

    def _fits(self, name: str, bias: Array) -> bool:
        """Whether a constant can be added to a bias: it is one number for all rows and outputs, or for all rows."""
        array = self.known.get(name, np.empty(0))
        is_row = array.size == (array.shape[-1] if array.ndim else 1)
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
        if not nodes or nodes[-1].op_type != "Sub" or inputs != [nodes[-1].output[0], nodes[-1].input[1]]:
            return False
        one = self.known.get(nodes[-1].input[0])
        return one is not None and bool(one == 1) and self._attributes(node)["axis"] in (-1, 1)

    def _run(self, nodes: Sequence[Any], inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        """What nodes compute of arrays and constants, by the package's own reference."""
        from onnx.reference import ReferenceEvaluator

        helper = self.onnx.helper
        constants = {n for node in nodes for n in node.input if n in self.known}
        element = helper.np_dtype_to_tensor_dtype
        graph = helper.make_graph(
            nodes,
            "part",
            [helper.make_tensor_value_info(name, element(array.dtype), None) for name, array in inputs.items()],
            [helper.make_value_info(name, self.onnx.TypeProto()) for name in outputs],
            [self.onnx.numpy_helper.from_array(self.known[name], name) for name in sorted(constants)],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        with np.errstate(all="ignore"):
            return list(ReferenceEvaluator(model).run(None, inputs))

    def _fold(self, node: Any, inputs: list[str]) -> None:
        if node.op_type not in _FOLDED:
            raise self._refusal(node, "computes with constants what is not known here")
        try:
            (self.known[node.output[0]],) = self._run([self._with_inputs(node, inputs)], {}, node.output[:1])
        except Exception as error:
            raise self._refusal(node, f"cannot be computed: {error}") from error

    def _recognised(self, gap: _Gap) -> tuple[str, float | None]:
        """The activation that the nodes of a gap compute, and its parameter where it is not the default."""
        if not gap.nodes:
            return "identity", None
        dtype = self.layers[0][0].dtype
        try:
            (values,) = self._run(gap.nodes, {gap.takes: _PROBES.astype(dtype)[np.newaxis]}, [gap.gives])
        except Exception as error:
            raise self._refusal(gap.nodes[0], f"cannot be computed: {error}") from error
        found = _nearest(values.reshape(-1), dtype)
        if found is None:
            raise self._refusal(gap.nodes[0], "begins what is no activation of gemmlet")
        return found


def _nearest(values: Array, dtype: np.dtype[Any]) -> tuple[str, float | None] | None:
    """The activation that gives these values of the probes, and its parameter; None if none does."""
    finite = np.isfinite(values)  # where a spelling overflows it need not agree
    if values.shape != _PROBES.shape or not finite[np.abs(_PROBES) <= 16].all():
        return None
    found, least = None, _TOLERANCE
    with np.errstate(all="ignore"):
        for entry in ACTIVATIONS.values():
            number, parameter = entry.default, None
            if entry.parameter is not None:
                number = float(values[0]) / float(entry.forward(_PROBES[:1], 1.0)[0])
                if not 0 < number < np.inf:
                    continue
                parameter = None if dtype.type(number) == dtype.type(entry.default) else number
            expected = entry.forward(_PROBES, number)
            error = float(np.max(np.abs(values - expected)[finite] / (1 + np.abs(expected[finite]))))
            if error < least:
                found, least = (entry.name, parameter), error
    return found
