"""ONNX files: what is written computes what the network does, by onnxruntime; what others write is read, or refused."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from gemmlet.formulas.activations import ACTIVATIONS  # noqa: E402
from gemmlet.nn import GAN, MLP, Adam  # noqa: E402
from gemmlet.nn import onnx as onnx_files  # noqa: E402
from support import same_bits  # noqa: E402

EXPRESSED = sorted(onnx_files._OPERATORS)
DTYPES = ("float32", "float64")

# Of these onnxruntime has no kernel; the package's own reference computes them.
NOT_IN_ONNXRUNTIME = {("gelu", "float64")}


def run(path: Path, x: Any, *, reference: bool = False) -> Any:
    """What the graph in a file gives, the first output."""
    if reference:
        return ReferenceEvaluator(str(path)).run(None, {onnx.load(path).graph.input[0].name: x})[0]
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def difference(path: Path, x: Any, expected: Any, **how: Any) -> float:
    """The largest difference to what the graph gives, relative above 1."""
    result = run(path, x, **how)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    return float(np.max(np.abs(result - expected) / np.maximum(1, np.abs(expected))))


def perceptron(activation: str, dtype: str, output: str = "softmax", **settings: Any) -> MLP:
    """A network whose biases and averages are not those of a new one."""
    model = MLP([12, 16, 8, 4], activation, output, dtype=dtype, seed=3, **settings)
    rng = np.random.default_rng(0)
    for array, average in zip(model.parameters, model._average.parameters, strict=True):
        array += 0.2 * rng.standard_normal(array.shape).astype(dtype)
        average[...] = array if average is array else array + array.dtype.type(0.125)
    return model


def outputs(model: MLP, x: Any) -> Any:
    return model.predict(x) if model.output == "identity" else model.predict_proba(x)


def samples(count: int, dtype: str, width: int = 12) -> Any:
    return np.random.default_rng(1).uniform(-2, 2, (count, width)).astype(dtype)


# Writing.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onnxruntime_computes_what_the_network_does(activation: str, dtype: str, tmp_path: Path) -> None:
    path, x = tmp_path / "m.onnx", samples(1000, dtype)
    if activation not in EXPRESSED:
        with pytest.raises(ValueError, match=f"{activation}.*no ONNX operators"):
            perceptron(activation, dtype).to_onnx(path)
        assert not path.exists()
        return
    # exp is made of numbers that rounding errors grow in: the network is to be compared, not that.
    x = x / 4 if activation == "exp" else x
    for output in ("softmax", "sigmoid", "identity"):
        for parameter in (None, 0.3) if ACTIVATIONS[activation].parameter else (None,):
            model = perceptron(activation, dtype, output, activation_parameter=parameter)
            model.to_onnx(path)
            onnx.checker.check_model(path, full_check=True)
            reference = (activation, dtype) in NOT_IN_ONNXRUNTIME
            assert difference(path, x, outputs(model, x), reference=reference) < 1e-5
            assert difference(path, x[:1], outputs(model, x[:1]), reference=reference) < 1e-5


def test_a_wrong_operator_would_be_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(onnx_files._OPERATORS, "tanh", onnx_files._OPERATORS["sigmoid"])
    model, x = perceptron("tanh", "float32"), samples(1000, "float32")
    model.to_onnx(tmp_path / "m.onnx")
    assert difference(tmp_path / "m.onnx", x, outputs(model, x)) > 1e-2
    assert MLP.from_onnx(tmp_path / "m.onnx").activation == "sigmoid"  # what the graph computes, whatever it is called


@pytest.mark.parametrize("layers", [[5, 3], [1, 1], [7, 1, 1, 2]])
def test_layers_of_any_number_and_width(layers: list[int], tmp_path: Path) -> None:
    model = MLP(layers, "relu", "identity", dtype=np.float32)
    model.to_onnx(tmp_path / "m.onnx")
    x = samples(1000, "float32", layers[0])
    outputs = model.predict(x).reshape(len(x), -1)
    assert difference(tmp_path / "m.onnx", x, outputs) < 1e-5
    assert MLP.from_onnx(tmp_path / "m.onnx").layers == layers


def test_a_generator_of_classes(tmp_path: Path) -> None:
    gan = GAN(6, [16, 9], [4, 1], n_classes=3)
    gan.fit(np.random.default_rng(0).random((64, 9)), epochs=1, y=np.arange(64) % 3)
    gan.to_onnx(tmp_path / "generator.onnx")
    z, labels = gan.noise(100), np.random.default_rng(1).integers(0, 3, 100)
    rows = np.hstack([z, np.eye(3, dtype=np.float32)[labels]])
    assert difference(tmp_path / "generator.onnx", rows, gan.sample(z=z, label=labels)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ending", ["tanh", "sigmoid"])
def test_the_generator_of_a_gan(ending: str, dtype: str, tmp_path: Path) -> None:
    gan = GAN(6, [16, 9], [4, 1], generator_activation="leaky_relu", generator_output=ending, dtype=dtype)
    gan.fit(np.random.default_rng(0).random((64, 9)), epochs=3)
    path = tmp_path / "generator.onnx"
    gan.to_onnx(path)
    onnx.checker.check_model(path, full_check=True)
    z = gan.noise(1000)
    assert difference(path, z, gan.sample(z=z)) < 1e-5
    if ending == "tanh":  # whose results are moved to [0, 1]
        with pytest.raises(ValueError, match=r"node .*Tanh.* makes sigmoid|no activation"):
            MLP.from_onnx(path)


def test_the_average_is_what_is_written(tmp_path: Path) -> None:
    model, x = perceptron("relu", "float32", ema_decay=0.9), samples(100, "float32")
    model.to_onnx(tmp_path / "m.onnx")
    assert difference(tmp_path / "m.onnx", x, model.predict_proba(x)) < 1e-5
    read = MLP.from_onnx(tmp_path / "m.onnx")
    for parameter, average in zip(read.parameters, model._average.parameters, strict=True):
        assert same_bits(parameter, average)
    assert same_bits(read.predict_proba(x), model.predict_proba(x))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")

    def full(self: Path, data: bytes) -> None:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*m\.onnx"):
        perceptron("tanh", "float32").to_onnx(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        perceptron("tanh", "float32").to_onnx(tmp_path / "nowhere" / "m.onnx")


def test_too_many_parameters_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "_MOST_BYTES", 2**20 + 100)
    with pytest.raises(ValueError, match=r"the parameters have .* bytes, more than"):
        perceptron("tanh", "float32").to_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_package_an_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (perceptron("tanh", "float32").to_onnx, MLP.from_onnx, GAN().to_onnx):
        with pytest.raises(ImportError, match=r"pip install 'gemmlet\[onnx\]'"):
            call(tmp_path / "m.onnx")
    script = "import sys, gemmlet.nn; gemmlet.nn.MLP([2, 2]); sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_page(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[number]
    if "onnxruntime" in example:
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "onnx.md", "exec"), {})


# Reading what gemmlet writes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", EXPRESSED)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_round_trip(activation: str, dtype: str, with_metadata: bool, tmp_path: Path) -> None:
    """With the metadata everything is as before; without, the graph says it all but what no graph has."""
    path = tmp_path / "m.onnx"
    for parameter in (None, 0.3, 1.0000001, 2.5) if ACTIVATIONS[activation].parameter else (None,):
        for output in ("softmax", "sigmoid", "identity"):
            model = perceptron(activation, dtype, output, activation_parameter=parameter)
            model.to_onnx(path)
            if not with_metadata:
                graph = onnx.load(path)
                del graph.metadata_props[:]
                onnx.save(graph, path)
            read = MLP.from_onnx(path)
            assert (read.layers, read.activation, read.output) == (model.layers, activation, output)
            rounded = [None if p is None else np.dtype(dtype).type(p) for p in (read.activation_parameter, parameter)]
            assert rounded[0] == rounded[1]
            for a, b in zip(read.parameters, model.parameters, strict=True):
                assert same_bits(a, b)
            x = samples(50, dtype)
            assert same_bits(outputs(read, x), outputs(model, x))
            if with_metadata:
                assert read._saved_config() == model._saved_config()


def test_settings_and_labels_come_back(tmp_path: Path) -> None:
    x, y = samples(200, "float32"), np.random.default_rng(0).choice(["no", "yes", "maybe", "?"], 200)
    model = MLP([12, 9, 4], "elu", label_smoothing=0.1, ema_decay=0.9, default_optimizer=Adam(0.01), seed=4)
    model.fit(x, y, epochs=3)
    model.to_onnx(tmp_path / "m.onnx")
    read = MLP.from_onnx(tmp_path / "m.onnx")
    assert read._saved_config() == model._saved_config()
    assert read.steps == model.steps > 0
    assert read.predict(x).tolist() == model.predict(x).tolist()
    read.fit(x, y, epochs=1)
    several = MLP([12, 3], "elu", "sigmoid", activation_parameter=0.3, multi_label=True)
    several.to_onnx(tmp_path / "m.onnx")
    assert MLP.from_onnx(tmp_path / "m.onnx")._saved_config() == several._saved_config()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changed", [0.05, 0.01])
def test_what_the_graph_computes_counts(changed: float, dtype: str, tmp_path: Path) -> None:
    """Not what the metadata says of it."""
    path, x = tmp_path / "m.onnx", samples(100, dtype)
    perceptron("leaky_relu", dtype, activation_parameter=0.3).to_onnx(path)
    graph = onnx.load(path)
    for node in graph.graph.node:
        if node.op_type == "LeakyRelu":
            node.attribute[0].f = changed
    for tensor in graph.graph.initializer:
        if tensor.name == "constant_0.3":
            tensor.CopyFrom(numpy_helper.from_array(np.array(changed, dtype), tensor.name))
    onnx.save(graph, path)
    read = MLP.from_onnx(path)
    assert read.activation_parameter == (None if changed == 0.01 else float(np.dtype(dtype).type(changed)))
    assert difference(path, x, outputs(read, x)) < 1e-5


# Graphs of others.

_RNG = np.random.default_rng(5)
W0, B0 = _RNG.standard_normal((6, 5)).astype(np.float32), _RNG.standard_normal(5).astype(np.float32)
W1, B1 = _RNG.standard_normal((5, 3)).astype(np.float32), _RNG.standard_normal(3).astype(np.float32)
WEIGHTS = {"w0": W0, "b0": B0, "w1": W1, "b1": B1}

Node = tuple[Any, ...]  # operator, inputs, output, attributes
LAYER0: list[Node] = [("MatMul", "x w0", "m0"), ("Add", "m0 b0", "z0")]
LAYER1: list[Node] = [("MatMul", "a0 w1", "m1"), ("Add", "m1 b1", "z1")]
USUAL: list[Node] = [*LAYER0, ("Relu", "z0", "a0"), *LAYER1, ("Softmax", "z1", "y")]
# Of one output both classes, with the constants of ONE.
ONE = {"w": W1[:, :1], "one": np.float32([1])}
OF_TWO: list[Node] = [
    *USUAL[:3],
    ("MatMul", "a0 w", "z"),
    ("Sigmoid", "z", "p"),
    ("Sub", "one p", "q"),
    ("Concat", "q p", "both", {"axis": 1}),
]


def graph(
    path: Path,
    nodes: Sequence[Node],
    constants: dict[str, Any] | None = None,
    *,
    inputs: Sequence[str] = ("x",),
    output: str = "y",
    shape: Sequence[Any] = ("n", 6),
    opset: int = 17,
    others: Sequence[str] = (),
    kinds: tuple[int, int] = (TensorProto.FLOAT, TensorProto.FLOAT),
) -> Path:
    """Write a graph with the constants `WEIGHTS`, and others."""
    made = []
    for operator, taken, given, *attributes in nodes:
        kind, _, domain = operator.partition("@")
        settings = attributes[0] if attributes else {}
        name = f"the_{given.split()[0]}"
        made.append(helper.make_node(kind, taken.split(), given.split(), name=name, domain=domain, **settings))
    model = helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info(name, kinds[0], shape) for name in inputs],
            [
                helper.make_tensor_value_info(output, kinds[1], ["n", "k"]),
                *(helper.make_tensor_value_info(name, TensorProto.INT64, ["n", 1]) for name in others),
            ],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in (WEIGHTS | (constants or {})).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def constant(value: Any) -> dict[str, Any]:
    return {"value": numpy_helper.from_array(np.asarray(value))}


READ: dict[str, tuple[list[Node], dict[str, Any]]] = {
    "matmul and add": (USUAL, {}),
    "as scikit-learn's converter writes it": (
        [
            ("Cast", "x", "cast", {"to": TensorProto.FLOAT}),
            ("MatMul", "cast w0", "m0"),
            ("Add", "m0 row0", "z0"),
            ("Relu", "z0", "a0"),
            *LAYER1,
            ("Softmax", "z1", "p", {"axis": 1}),
            ("ArgMax", "p", "label", {"axis": 1}),
            ("Identity", "p", "y"),
        ],
        {"row0": B0[np.newaxis]},
    ),
    "gemm, transposed": (
        [
            ("Gemm", "x w0t b0", "z0", {"transB": 1}),
            ("Relu", "z0", "a0"),
            ("Gemm", "a0 w1t b1", "z1", {"transB": 1}),
            ("Softmax", "z1", "y", {"axis": -1}),
        ],
        {"w0t": W0.T.copy(), "w1t": W1.T.copy()},
    ),
    "gemm with alpha and beta": (
        [
            ("Gemm", "x w0_half b0_double", "z0", {"alpha": 2.0, "beta": 0.5}),
            ("Relu", "z0", "a0"),
            ("Gemm", "a0 w1 b1", "z1"),
            ("Softmax", "z1", "y"),
        ],
        {"w0_half": W0 / 2, "b0_double": B0 * 2},
    ),
    "gemm without a bias": (
        [
            ("Gemm", "x w0", "m0"),
            ("Add", "b0 m0", "z0"),
            ("Relu", "z0", "a0"),
            ("Gemm", "a0 w1", "m1"),
            ("Add", "m1 b1", "z1"),
            ("Softmax", "z1", "y"),
        ],
        {},
    ),
    "constants as nodes": (
        [
            ("Constant", "", "c0", constant(W0.T)),
            ("Transpose", "c0", "t0", {"perm": [1, 0]}),
            ("Identity", "b0", "i0"),
            ("MatMul", "x t0", "m0"),
            ("Add", "m0 i0", "z0"),
            *USUAL[2:],
        ],
        {},
    ),
    "what changes nothing": (
        [
            ("Flatten", "x", "flat"),
            ("Identity", "flat", "same"),
            ("MatMul", "same w0", "m0"),
            ("Add", "m0 b0", "z0"),
            ("Reshape", "z0 shape", "z"),
            ("Relu", "z", "r"),
            ("Dropout", "r ratio no", "a0 mask"),
            *LAYER1,
            ("Softmax", "z1", "p"),
            ("Dropout", "p", "y"),
        ],
        {"ratio": np.float32(0.5), "no": np.False_, "shape": np.array([0, -1])},
    ),
    "relu spelled as a maximum": ([*LAYER0, ("Max", "z0 zero", "a0"), *USUAL[3:]], {"zero": np.float32(0)}),
    "relu spelled as a clip": ([*LAYER0, ("Clip", "z0 zero", "a0"), *USUAL[3:]], {"zero": np.float32([0])[0]}),
}


def expected(x: Any) -> Any:
    """What all of them compute."""
    z = np.maximum(x.astype(float) @ W0 + B0, 0) @ W1 + B1
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("spelling", READ)
def test_a_graph_of_another_exporter(spelling: str, tmp_path: Path) -> None:
    nodes, constants = READ[spelling]
    others = ["label"] if any(node[0] == "ArgMax" for node in nodes) else []
    path = graph(tmp_path / "g.onnx", nodes, constants, others=others)
    model, x = MLP.from_onnx(path), samples(1000, "float32", 6)
    assert (model.layers, model.activation, model.output, model.dtype) == ([6, 5, 3], "relu", "softmax", np.float32)
    assert np.abs(model.predict_proba(x) - expected(x)).max() < 1e-5
    assert np.abs(run(path, x, reference=True) - expected(x)).max() < 1e-5  # the graph is what it is taken for
    model.fit(x, np.arange(1000) % 3, epochs=1)
    model.to_onnx(path)
    assert difference(path, x, model.predict_proba(x)) < 1e-5


@pytest.mark.parametrize("spell", [spell for _, spell in onnx_files._SPELLINGS])
def test_activations_as_exporters_spell_them(spell: Any, tmp_path: Path) -> None:
    """Each is the activation that it is read as; with another number in it, it is none."""
    name = next(name for name, other in onnx_files._SPELLINGS if other is spell)
    g, path, x = onnx_files._Graph(np.dtype(np.float32)), tmp_path / "g.onnx", samples(1000, "float32", 6) * 4
    if name == "exp":
        x /= 20

    def written(constants: dict[str, Any]) -> Path:
        model = onnx.load(graph(path, [*LAYER0, ("Identity", gives, "a0"), *LAYER1], constants, output="z1", opset=20))
        nodes = [*model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend([*nodes[:2], *g.nodes, *nodes[2:]])
        onnx.save(model, path)
        return path

    gives = spell(g, "z0", 0.3)
    model = MLP.from_onnx(written(g.tensors))
    assert model.activation == name
    assert model.activation_parameter == (float(np.float32(0.3)) if ACTIVATIONS[name].parameter else None)
    assert difference(path, x, model.predict(x), reference=True) < 1e-5
    for constant, value in g.tensors.items():
        if value != np.float32(0.3):
            with pytest.raises(ValueError, match="begins what is no activation"):
                MLP.from_onnx(written(g.tensors | {constant: value * np.float32(1.001) + np.float32(1e-4)}))


@pytest.mark.parametrize("alpha", [None, 1.0, 1.5])
def test_swish_of_a_newer_opset(alpha: float | None, tmp_path: Path) -> None:
    if onnx.defs.onnx_opset_version() < 24:
        pytest.skip("this onnx does not have it")
    attributes = {} if alpha is None else {"alpha": alpha}
    nodes = [*LAYER0, ("Swish", "z0", "a0", attributes), *USUAL[3:]]
    path, x = graph(tmp_path / "g.onnx", nodes, opset=24), samples(1000, "float32", 6)
    if alpha == 1.5:
        with pytest.raises(ValueError, match="begins what is no activation"):
            MLP.from_onnx(path)
        return
    model = MLP.from_onnx(path)
    assert model.activation == "silu"
    assert difference(path, x, model.predict_proba(x), reference=True) < 1e-5


def test_images_are_made_rows(tmp_path: Path) -> None:
    """As by Flatten, and as PyTorch's exporters spell it, of a fixed number of samples and of any."""
    row: list[Node] = [("MatMul", "row w0", "m0"), *USUAL[1:]]
    path = tmp_path / "g.onnx"
    shapes = [("n", 2, 3), (4, 2, 3), (None, 2, 1, 3)]
    for shape in shapes:
        for axis in (1, 1 - len(shape)):
            MLP.from_onnx(graph(path, [("Flatten", "x", "row", {"axis": axis}), *row], shape=shape))
        for new in ([-1, 6], [0, -1], [shape[0], 6], [shape[0], -1]):
            if isinstance(new[0], int):
                nodes: list[Node] = [("Reshape", "x new", "row", {"allowzero": int(0 not in new)}), *row]
                assert MLP.from_onnx(graph(path, nodes, {"new": np.array(new)}, shape=shape)).layers == [6, 5, 3]
        view: list[Node] = [("Concat", "rows rest", "new", {"axis": 0}), ("Reshape", "x new", "row"), *row]
        by_gather: list[Node] = [
            ("Shape", "x", "shape"),
            ("Gather", "shape zero", "n"),
            ("Unsqueeze", "n axes", "rows"),
        ]
        constants = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1])}
        for rows in (by_gather, [("Shape", "x", "rows", {"end": 1})]):
            model = MLP.from_onnx(graph(path, [*rows, *view], constants, shape=shape))
            x = samples(4, "float32", 6)
            assert difference(path, x.reshape(4, *shape[1:]), model.predict_proba(x)) < 1e-5
        # By the product of the widths.
        product: list[Node] = [
            *(("Gather", "shape one", "height"), ("Gather", "shape last", "width"), ("Mul", "height width", "rest")),
            *view,
        ]
        sizes = {"zero": np.array(0), "axes": np.array([0]), "one": np.array([1]), "last": np.array([-1])}
        assert MLP.from_onnx(graph(path, [*by_gather, *product], sizes, shape=shape)).layers == [6, 5, 3]
        # By the width of what is flat already.
        by_width: list[Node] = [
            *(("Flatten", "x", "flat"), ("Identity", "flat", "same"), ("Shape", "same", "width", {"start": 1})),
            *(("Concat", "rest width", "new", {"axis": 0}), ("Reshape", "same new", "again")),
            *(("Flatten", "again", "row", {"axis": -1}), *row),
        ]
        model = MLP.from_onnx(graph(path, by_width, constants, shape=shape))
        assert difference(path, x.reshape(4, *shape[1:]), model.predict_proba(x)) < 1e-5


@pytest.mark.parametrize(
    ("nodes", "new", "message"),
    [
        (USUAL, None, r"the_m0 \(MatMul\) takes samples of shape \[0, 2, 3\]"),
        ([("Reshape", "x new", "row")], [4, 6], r"the_row \(Reshape\) is no layer"),
        ([("Reshape", "x new", "row")], [-1, 3], r"the_row \(Reshape\) is no layer"),
        ([("Reshape", "x new", "row", {"allowzero": 1})], [0, 6], r"the_row \(Reshape\) is no layer"),
        ([("Flatten", "x", "row", {"axis": 2})], None, r"the_row \(Flatten\) is no layer"),
        ([("Flatten", "x", "row", {"axis": -1})], None, r"the_row \(Flatten\) is no layer"),
        ([("Flatten", "x", "a"), ("Flatten", "a", "row", {"axis": -2})], None, r"the_row \(Flatten\) is no layer"),
    ],
)
def test_samples_that_are_no_rows(nodes: list[Node], new: Any, message: str, tmp_path: Path) -> None:
    rest: list[Node] = [] if nodes is USUAL else [("MatMul", "row w0", "m0"), *USUAL[1:]]
    path = graph(tmp_path / "g.onnx", [*nodes, *rest], {"new": np.array(new or [0])}, shape=("n", 2, 3))
    with pytest.raises(ValueError, match=message):
        MLP.from_onnx(path)


def test_labels_of_scikit_learns_converter(tmp_path: Path) -> None:
    """Of several labels a sample it makes an output that tells which are true."""
    nodes: list[Node] = [
        *USUAL[:-1],
        ("Sigmoid", "z1", "y"),
        ("Binarizer@ai.onnx.ml", "y", "b", {"threshold": 0.5}),
        ("Cast", "b", "label", {"to": TensorProto.INT64}),
    ]
    path, x = graph(tmp_path / "g.onnx", nodes, others=["label"]), samples(50, "float32", 6)
    model = MLP.from_onnx(path)
    assert model.multi_label
    assert model.predict(x).tolist() == (run(path, x, reference=True) > 0.5).tolist()
    assert not MLP.from_onnx(graph(path, nodes[:-2])).multi_label


def test_logits_are_what_they_are_said_to_be(tmp_path: Path) -> None:
    path, x = graph(tmp_path / "g.onnx", USUAL[:-1], output="z1"), samples(50, "float32", 6)
    assert MLP.from_onnx(path).output == "identity"
    model = MLP.from_onnx(path, output="softmax")
    assert np.abs(model.predict_proba(x) - expected(x)).max() < 1e-5
    assert MLP.from_onnx(path, output="sigmoid").output == "sigmoid"
    with pytest.raises(ValueError, match="output 'other' is unknown"):
        MLP.from_onnx(path, output="other")
    logs = MLP.from_onnx(graph(path, [*USUAL[:-1], ("LogSoftmax", "z1", "y")]))
    assert np.abs(logs.predict_proba(x) - expected(x)).max() < 1e-5
    with pytest.raises(ValueError, match=r"output is 'sigmoid', but the graph in .* ends in softmax"):
        MLP.from_onnx(path, output="sigmoid")


@pytest.mark.parametrize("labels", [[0, 1], [3, 7], ["no", "yes"]])
def test_a_classifier_of_scikit_learns_converter(labels: list[Any], tmp_path: Path) -> None:
    """Of two classes it makes a column each, and then a map for each row, whose keys are the labels."""
    of_two = [*OF_TWO, ("Identity", "both", "y")]
    maps = ("ZipMap@ai.onnx.ml", "y", "maps", {f"classlabels_{'strings' if labels[0] == 'no' else 'int64s'}": labels})
    path, x = graph(tmp_path / "g.onnx", of_two, ONE), samples(100, "float32", 6)
    both = run(path, x, reference=True)
    assert np.abs(both - np.c_[1 - both[:, 1], both[:, 1]]).max() < 1e-6
    found = onnx.load(graph(path, [*of_two, maps], ONE))
    key = TensorProto.STRING if labels[0] == "no" else TensorProto.INT64
    of_maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    found.graph.output[0].CopyFrom(helper.make_value_info("maps", of_maps))
    onnx.save(found, path)
    model = MLP.from_onnx(path)
    assert (model.layers, model.output, model.classes) == ([6, 5, 1], "sigmoid", None if labels[1] == 1 else labels)
    assert np.abs(model.predict_proba(x) - both).max() < 1e-5
    assert model.predict(x).tolist() == [labels[int(p > 0.5)] for p in both[:, 1]]
    named = found.graph.node[-1].attribute[0]
    for wrong in ([*labels, *labels], labels[:1] * 2):
        named.CopyFrom(helper.make_attribute(named.name, wrong))
        onnx.save(found, path)
        with pytest.raises(ValueError, match=r"g\.onnx .* the_maps \(ZipMap\) has the labels .*; expected 2 different"):
            MLP.from_onnx(path)


@pytest.mark.parametrize(
    ("make", "activation", "parameter"),
    [
        (lambda nn: nn.ReLU(), "relu", None),
        (lambda nn: nn.LeakyReLU(0.2), "leaky_relu", 0.2),
        (lambda nn: nn.PReLU(), "leaky_relu", 0.25),
        (lambda nn: nn.ELU(1.5), "elu", 1.5),
        (lambda nn: nn.GELU(), "gelu", None),
        (lambda nn: nn.GELU(approximate="tanh"), "gelu_tanh", None),
        (lambda nn: nn.SiLU(), "silu", None),
        (lambda nn: nn.Softplus(), "softplus", None),
        (lambda nn: nn.Tanh(), "tanh", None),
        (lambda nn: nn.Sigmoid(), "sigmoid", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_pytorch_exports(make: Callable[[Any], Any], activation: str, parameter: Any, tmp_path: Path) -> None:
    """PyTorch spells some activations in several operators."""
    torch = pytest.importorskip("torch")
    path, x = tmp_path / "t.onnx", samples(100, "float32")
    layers = [torch.nn.Linear(12, 8), make(torch.nn), torch.nn.Dropout(), torch.nn.Linear(8, 7), make(torch.nn)]
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(7, 3), torch.nn.Softmax(dim=1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that needs no package besides
        torch.onnx.export(
            net, (torch.from_numpy(x),), path, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
        )
    model = MLP.from_onnx(path)
    assert (model.layers, model.activation, model.output) == ([12, 8, 7, 3], activation, "softmax")
    assert model.activation_parameter == (None if parameter is None else float(np.float32(parameter)))
    assert np.abs(model.predict_proba(x) - net(torch.from_numpy(x)).detach().numpy()).max() < 1e-5


def test_pytorch_tells_how_many_samples_there_are(tmp_path: Path) -> None:
    """Its exporter has nodes for that. To reshape they change nothing; anything else of them is no perceptron."""
    torch = pytest.importorskip("torch")
    path, x = tmp_path / "t.onnx", samples(100, "float32")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, counts: bool) -> None:
            super().__init__()
            self.layer, self.counts = torch.nn.Linear(12, 3), counts

        def forward(self, x: Any) -> Any:
            z = self.layer(x.view(x.size(0), x.size(1) * x.size(2))).view(x.size(0), -1)
            return z + x.size(0) if self.counts else z

    for counts in (False, True):
        net, images = Net(counts).eval(), torch.from_numpy(x.reshape(100, 3, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (images[:7],), path, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False)
        if counts:
            with pytest.raises(ValueError, match=r"t\.onnx .* \(Add\) computes with the number of samples"):
                MLP.from_onnx(path)
        else:
            assert np.abs(MLP.from_onnx(path).predict(x) - net(images).detach().numpy()).max() < 1e-5


# What is refused, with the name of the first node that does not fit.

# The number of samples, with a constant.
FIRST = {"first": np.array([0])}
COUNT: list[Node] = [
    *(("Shape", "x", "s"), ("Gather", "s first", "n")),
    ("Cast", "n", "count", {"to": TensorProto.FLOAT}),
]
# Of one output, with the constants of ONE.
OF_ONE: list[Node] = [*USUAL[:3], ("MatMul", "a0 w", "z")]

HALF, THIRD = {"half": np.float32(0.5)}, {"w2": np.eye(3, dtype=np.float32)}
REFUSED: dict[str, tuple[list[Node], dict[str, Any], str]] = {
    "an unknown activation": (
        [*LAYER0, ("HardSigmoid", "z0", "a0"), *USUAL[3:]],
        {},
        r"node the_a0 \(HardSigmoid\) begins what is no activation",
    ),
    "relu up to 6": (
        [*LAYER0, ("Clip", "z0 zero six", "a0"), *USUAL[3:]],
        {"zero": np.float32(0), "six": np.float32(6)},
        r"the_a0 \(Clip\) begins",
    ),
    "relu up to 20000": (
        [*LAYER0, ("Clip", "z0 zero most", "a0"), *USUAL[3:]],
        {"zero": np.float32(0), "most": np.float32(20000)},
        r"the_a0 \(Clip\) begins",
    ),
    "relu from a threshold on": (
        [*LAYER0, ("ThresholdedRelu", "z0", "a0", {"alpha": 0.24}), *USUAL[3:]],
        {},
        r"the_a0 \(ThresholdedRelu\) begins",
    ),
    "a shrinkage": (
        [*LAYER0, ("Abs", "z0", "m"), ("Less", "m small", "c"), ("Where", "c zero z0", "a0"), *USUAL[3:]],
        {"zero": np.float32(0), "small": np.float32(0.2)},
        r"the_m \(Abs\) begins",
    ),
    "a steep silu, which nearly is relu": (
        [*LAYER0, ("Mul", "z0 steep", "s"), ("Sigmoid", "s", "g"), ("Mul", "z0 g", "a0"), *USUAL[3:]],
        {"steep": np.float32(1e6)},
        r"the_s \(Mul\) begins",
    ),
    "a node that is doubled again and again": (
        [
            *LAYER0,
            ("Add", "z0 z0", "d0"),
            *[("Add", f"d{i} d{i}", f"d{i + 1}") for i in range(60)],
            ("Relu", "d60", "a0"),
            *USUAL[3:],
        ],
        {},
        r"the_d0 \(Add\) begins",
    ),
    "a number of three dimensions": (
        [*LAYER0, ("Max", "z0 zero", "a0"), *USUAL[3:]],
        {"zero": np.zeros((1, 1, 1), np.float32)},
        r"the_a0 \(Max\) is no layer",
    ),
    "a bias of three dimensions": (
        [("MatMul", "x w0", "m0"), ("Add", "m0 b", "z0"), *USUAL[2:]],
        {"b": B0.reshape(1, 1, -1)},
        r"the_z0 \(Add\) is no layer",
    ),
    "a scaled activation": (
        [*LAYER0, ("Relu", "z0", "r"), ("Mul", "r half", "a0"), *USUAL[3:]],
        HALF,
        r"the_r \(Relu\) begins",
    ),
    "two activations": (
        [
            *LAYER0,
            ("Relu", "z0", "a0"),
            *LAYER1,
            ("Tanh", "z1", "a1"),
            ("MatMul", "a1 w2", "z2"),
            ("Softmax", "z2", "y"),
        ],
        THIRD,
        r"the_a1 \(Tanh\) makes the activation tanh, the first one is relu",
    ),
    "two slopes": (
        [
            *LAYER0,
            ("LeakyRelu", "z0", "a0", {"alpha": 0.2}),
            *LAYER1,
            ("LeakyRelu", "z1", "a1", {"alpha": 0.3}),
            ("MatMul", "a1 w2", "y"),
        ],
        THIRD,
        r"the_a1 \(LeakyRelu\) makes the activation leaky_relu of 0\.3, the first one is leaky_relu of 0\.2",
    ),
    "a layer without an activation": (
        [*USUAL[:-1], ("MatMul", "z1 w2", "z2"), ("Softmax", "z2", "y")],
        THIRD,
        r"the_m1 \(MatMul\) makes the activation identity, the first one is relu",
    ),
    "a slope for each channel": (
        [*LAYER0, ("PRelu", "z0 slopes", "a0"), *USUAL[3:]],
        {"slopes": np.arange(5, dtype=np.float32)},
        r"the_a0 \(PRelu\) is no layer",
    ),
    "a convolution": (
        [("Conv", "x kernel", "c"), ("Flatten", "c", "f"), ("MatMul", "f w0", "m0"), *USUAL[1:]],
        {"kernel": np.ones((1, 1, 1), np.float32)},
        r"the_c \(Conv\) is no layer",
    ),
    "a skip connection": (
        [*USUAL[:5], ("Add", "z1 x", "s"), ("Softmax", "s", "y")],
        {},
        r"the_s \(Add\) takes x past a layer",
    ),
    "a scaled input": (
        [("Mul", "x half", "s"), ("MatMul", "s w0", "m0"), *USUAL[1:]],
        HALF,
        r"the_s \(Mul\) stands before",
    ),
    "a temperature": (
        [*USUAL[:-1], ("Mul", "z1 half", "t"), ("Softmax", "t", "y")],
        HALF,
        r"the_t \(Mul\) begins what is no activation",
    ),
    "tanh outputs": ([*USUAL[:-1], ("Tanh", "z1", "y")], {}, r"the_y \(Tanh\) makes tanh of the outputs"),
    "softmax of relu": (
        [*USUAL[:-1], ("Relu", "z1", "r"), ("Softmax", "r", "y")],
        {},
        r"the_r \(Relu\) makes relu of the outputs",
    ),
    "softmax over the rows": (
        [*USUAL[:-1], ("Softmax", "z1", "y", {"axis": 0})],
        {},
        r"the_y \(Softmax\) is not along",
    ),
    "something behind softmax": (
        [*USUAL[:-1], ("Softmax", "z1", "p"), ("Log", "p", "y")],
        {},
        r"the_y \(Log\) stands behind",
    ),
    "a weight that is computed": (
        [("MatMul", "x w0", "m0"), ("MatMul", "m0 w1", "z"), ("Gemm", "z x", "y", {"transB": 1})],
        {},
        r"the_y \(Gemm\) takes x past a layer",
    ),
    "a matrix on the left": ([("Gemm", "x w0", "y", {"transA": 1})], {}, r"the_y \(Gemm\) does not multiply rows"),
    "a stack of matrices": (
        [("MatMul", "x w", "y")],
        {"w": np.ones((2, 6, 5), np.float32)},
        r"the_y \(MatMul\) does not multiply rows",
    ),
    "a bias for each row": (
        [("Gemm", "x w0 rows", "y")],
        {"rows": np.ones((4, 1), np.float32)},
        r"the_y \(Gemm\) adds what is no bias",
    ),
    "float16": (
        [
            ("Cast", "x", "h", {"to": TensorProto.FLOAT16}),
            ("MatMul", "h w", "p"),
            ("Cast", "p", "y", {"to": TensorProto.FLOAT}),
        ],
        {"w": W0.astype(np.float16)},
        r"the_h \(Cast\) is no layer",
    ),
    "layers that do not fit": (
        [*LAYER0, ("Relu", "z0", "a0"), ("MatMul", "a0 w0", "y")],
        {},
        r"the_y \(MatMul\) takes 6 inputs of float32, the layer before gives 5",
    ),
    "another domain": (
        [("Scaler@ai.onnx.ml", "x", "s", {"offset": [0.0], "scale": [1.0]}), ("MatMul", "s w0", "y")],
        {},
        r"the_s \(Scaler\) is of the domain ai.onnx.ml",
    ),
    "a batch that is reshaped": (
        [*LAYER0, ("Relu", "z0", "a"), ("Reshape", "a shape", "a0"), *USUAL[3:]],
        {"shape": np.array([5, 5])},
        r"the_a0 \(Reshape\) is no layer",
    ),
    "dropout that drops": (
        [*LAYER0, ("Relu", "z0", "r"), ("Dropout", "r half yes", "a0"), *USUAL[3:]],
        HALF | {"yes": np.True_},
        r"the_a0 \(Dropout\) is no layer",
    ),
    "constants of unknown making": (
        [("Einsum", "w0", "t", {"equation": "ij->ij"}), ("MatMul", "x t", "y")],
        {},
        r"the_t \(Einsum\) computes with constants",
    ),
    "another number of columns": (
        [*USUAL[:-1], ("Sigmoid", "z1", "p"), ("Sub", "half p", "q"), ("Concat", "q p", "y", {"axis": 1})],
        HALF,
        r"the_y \(Concat\) is no layer",
    ),
    "one class times both": ([*OF_TWO, ("Mul", "both q", "y")], ONE, r"the_y \(Mul\) stands behind Concat"),
    "the logarithm of both classes": ([*OF_TWO, ("Log", "both", "y")], ONE, r"the_y \(Log\) stands behind Concat"),
    "samples and their complements": (
        [("Sub", "one x", "q"), ("Concat", "q x", "both", {"axis": 1}), ("MatMul", "both w", "y")],
        ONE | {"w": np.ones((12, 2), np.float32)},
        r"the_both \(Concat\) is no layer",
    ),
    "a layer behind both classes": (
        [*OF_TWO, ("MatMul", "both w2", "y")],
        ONE | {"w2": np.ones((1, 2), np.float32)},
        r"the_y \(MatMul\) stands behind Concat",
    ),
    "logits of both classes": (
        [*OF_ONE, ("Sub", "one z", "q"), ("Concat", "q z", "y", {"axis": 1})],
        ONE,
        r"the_y \(Concat\) makes two columns of identity outputs",
    ),
    "several outputs and their complements": (
        [*USUAL[:-1], ("Sigmoid", "z1", "p"), ("Sub", "one p", "q"), ("Concat", "q p", "y", {"axis": 1})],
        ONE,
        r"the_y \(Concat\) is no layer",
    ),
    "complements of both classes": (
        [*OF_TWO, ("Sub", "one both", "others"), ("Concat", "others both", "y", {"axis": 1})],
        ONE,
        r"the_others \(Sub\) stands behind Concat",
    ),
    "softmax of both classes": ([*OF_TWO, ("Softmax", "both", "y")], ONE, r"the_y \(Softmax\) stands behind Concat"),
    "both classes in one column": (
        [*OF_TWO, ("Reshape", "both column", "y")],
        ONE | {"column": np.array([-1, 1])},
        r"the_y \(Reshape\) stands behind Concat",
    ),
    "softmax of one output": ([*OF_ONE, ("Softmax", "z", "y")], ONE, r"the_y \(Softmax\) is of one output"),
    "the number of samples in a sum": (
        [*COUNT, *USUAL[:-1], ("Add", "z1 count", "y")],
        FIRST,
        r"the_y \(Add\) computes with the number of samples",
    ),
    "the number of samples in a maximum": (
        [*COUNT, *LAYER0, ("Max", "z0 count", "a0"), *USUAL[3:]],
        FIRST,
        r"the_a0 \(Max\) computes with the number of samples",
    ),
    "the number of samples in weights": (
        [*COUNT, ("Add", "w0 count", "w"), ("MatMul", "x w", "y")],
        FIRST,
        r"the_w \(Add\) computes with the number of samples",
    ),
    "the number of samples as an index": (
        [*COUNT[:2], ("Gather", "b0 n", "b"), ("MatMul", "x w0", "m"), ("Add", "m b", "y")],
        FIRST,
        r"the_b \(Gather\) computes with the number of samples",
    ),
    "twice as many rows": (
        [
            *USUAL[:-1],
            *COUNT[:2],
            *(("Add", "n n", "twice"), ("Concat", "twice rest", "shape", {"axis": 0}), ("Reshape", "z1 shape", "y")),
        ],
        FIRST | {"rest": np.array([-1])},
        r"the_twice \(Add\) computes with the number of samples",
    ),
    "no outputs": (
        [("MatMul", "x w", "z"), ("Relu", "z", "a"), ("MatMul", "a v", "y")],
        {"w": np.ones((6, 0), np.float32), "v": np.ones((0, 3), np.float32)},
        r"the_z \(MatMul\) has weights of shape \(6, 0\)",
    ),
    "weights that are doubled again and again": (
        [
            ("Identity", "w0", "d0"),
            *(("Concat", f"d{i} " * 2, f"d{i + 1}", {"axis": 0}) for i in range(60)),
            ("MatMul", "x d60", "y"),
        ],
        {},
        r"the_d15 \(Concat\) cannot be computed: it makes far more numbers than the file has",
    ),
    "a sum of a row and a column": (
        [("Add", "row column", "w"), ("MatMul", "x w", "y")],
        {"row": np.ones((1, 2**11), np.float32), "column": np.ones((2**11, 1), np.float32)},
        r"the_w \(Add\) cannot be computed: it makes far more numbers",
    ),
    "a row again and again": (
        [("Gather", "row zeros", "w"), ("MatMul", "x w", "y")],
        {"row": np.ones((1, 2**11), np.float32), "zeros": np.zeros(2**11, np.int64)},
        r"the_w \(Gather\) cannot be computed: it makes far more numbers",
    ),
    "maxima of many operands": (
        [
            *(*LAYER0, ("Identity", "z0", "d0")),
            *(("Max", f"d{i} " * 9, f"d{i + 1}") for i in range(9)),
            *(("Relu", "d9", "a0"), *USUAL[3:]),
        ],
        {},
        r"the_d1 \(Max\) begins",
    ),
    "no layer": ([("Relu", "x", "y")], {}, "it has no layer"),
    "too few features": ([("MatMul", "x w", "y")], {"w": np.ones((4, 2), np.float32)}, "its input has 6 features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    nodes, constants, message = REFUSED[case]
    path = graph(tmp_path / "g.onnx", nodes, constants)
    with pytest.raises(ValueError, match=rf"g\.onnx holds no perceptron: .*{message}"):
        MLP.from_onnx(path)


def test_as_many_constants_are_computed_as_fit_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_files, "_MADE", 0)
    monkeypatch.setattr(onnx_files, "_MADE_OF_EACH", 2)
    wide: list[Node] = [("Constant", "", "t0", constant(np.ones((6, 100), np.float32)))]
    for count in (2, 4):
        nodes = [*wide, *(("Transpose", f"t{i}", f"t{i + 1}") for i in range(count)), ("MatMul", f"x t{count}", "y")]
        path = graph(tmp_path / "g.onnx", nodes)
        if count == 2:
            assert MLP.from_onnx(path).layers == [6, 100]
        else:
            with pytest.raises(ValueError, match=r"the_t3 \(Transpose\) cannot be computed: it makes far more numbers"):
                MLP.from_onnx(path)


def test_labels_of_logits(tmp_path: Path) -> None:
    """What they are labels of is to be said."""
    maps = ("ZipMap@ai.onnx.ml", "z1", "maps", {"classlabels_int64s": [3, 7, 9]})
    graph(tmp_path / "g.onnx", [*USUAL[:-1], maps], output="z1")
    with pytest.raises(ValueError, match=r"g\.onnx has labels, but ends in a layer: output must be softmax or sigmoid"):
        MLP.from_onnx(tmp_path / "g.onnx")
    assert MLP.from_onnx(tmp_path / "g.onnx", output="softmax").classes == [3, 7, 9]


def test_a_label_that_is_no_text(tmp_path: Path) -> None:
    maps = ("ZipMap@ai.onnx.ml", "y", "maps", {"classlabels_strings": ["a", b"\xff", "c"]})
    path = graph(tmp_path / "g.onnx", [*USUAL, maps])
    with pytest.raises(ValueError, match=r"g\.onnx .* the_maps \(ZipMap\) has the label b'\\xff', which is not UTF-8"):
        MLP.from_onnx(path)


def test_inputs_and_outputs_are_counted(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx", [("Add", "x other", "s"), ("MatMul", "s w0", "y")], inputs=["x", "other"])
    with pytest.raises(ValueError, match="its inputs are x of float, other of float; expected one"):
        MLP.from_onnx(path)
    half = graph(
        path, [("Cast", "x", "y", {"to": TensorProto.FLOAT16})], kinds=(TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    with pytest.raises(ValueError, match="its outputs are y of float16; expected one of float"):
        MLP.from_onnx(half)


def test_inputs_of_integers(tmp_path: Path) -> None:
    """They count as their value, as in `predict`; but for uint8, of which the two differ."""
    nodes: list[Node] = [("Cast", "x", "f", {"to": TensorProto.FLOAT}), ("MatMul", "f w0", "m0"), *USUAL[1:]]
    x = np.random.default_rng(0).integers(0, 9, (5, 6))
    path = graph(tmp_path / "g.onnx", nodes, kinds=(TensorProto.INT64, TensorProto.FLOAT))
    assert difference(path, x, MLP.from_onnx(path).predict_proba(x)) < 1e-5
    path = graph(path, nodes, kinds=(TensorProto.UINT8, TensorProto.FLOAT))
    with pytest.raises(ValueError, match=r"its input x is of uint8, which MLP takes as value/255"):
        MLP.from_onnx(path)


def test_old_operators_are_refused(tmp_path: Path) -> None:
    """Before opset 7 they broadcast in another way, and Dropout drops."""
    with pytest.raises(ValueError, match="its operators are of opset 6; expected 7 or newer"):
        MLP.from_onnx(graph(tmp_path / "g.onnx", USUAL[2:3], output="a0", inputs=["z0"], opset=6))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no graph" * 9]
)
def test_damaged_files_are_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx", USUAL)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"g\.onnx (is corrupt|holds no perceptron)"):
        MLP.from_onnx(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        MLP.from_onnx(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("field", ["data_type", "dims", "raw_data"])
def test_damaged_tensors_are_named(field: str, tmp_path: Path) -> None:
    model = onnx.load(graph(tmp_path / "g.onnx", USUAL))
    tensor = next(t for t in model.graph.initializer if t.name == "w1")
    if field == "dims":
        tensor.dims[:] = [2, 5]
    else:
        setattr(tensor, field, {"data_type": 77, "raw_data": tensor.raw_data[:-2]}[field])
    onnx.save(model, tmp_path / "g.onnx")
    with pytest.raises(ValueError, match=r"g\.onnx is corrupt.*'?w1'?"):
        MLP.from_onnx(tmp_path / "g.onnx")


@pytest.mark.parametrize("name", ["m.json", "m.textproto", "m.onnxtxt", "m.pb", "m"])
def test_files_of_any_name(name: str, tmp_path: Path) -> None:
    model = perceptron("tanh", "float32")
    model.to_onnx(tmp_path / name)
    assert MLP.from_onnx(tmp_path / name)._saved_config() == model._saved_config()


def test_the_function_for_the_other_format_is_named(tmp_path: Path) -> None:
    model = perceptron("tanh", "float32")
    model.save(tmp_path / "saved")
    model.to_onnx(tmp_path / "exported")
    with pytest.raises(ValueError, match=r"saved is a safetensors file, no ONNX file; MLP\.load reads those"):
        MLP.from_onnx(tmp_path / "saved")
    for load in (MLP.load, GAN.load, MLP.load_optimizers):
        with pytest.raises(ValueError, match=r"exported is .*it begins as ONNX files do, which MLP\.from_onnx reads"):
            load(tmp_path / "exported")


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    model = perceptron("tanh", "float32")
    model.to_onnx(tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    helper.set_model_props(graph, {"gemmlet": graph.metadata_props[0].value.replace('"seed": 3', '"seed": -3')})
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"m\.onnx is corrupt.*seed must be at least 0, got -3"):
        MLP.from_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", ["no JSON", '{"format": 99, "network": "MLP", "config": {"layers": 0}}', "[]"])
def test_metadata_of_others_is_passed_over(text: str, tmp_path: Path) -> None:
    model = perceptron("tanh", "float32", classes=list("abcd"))
    model.to_onnx(tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    helper.set_model_props(graph, {"gemmlet": text})
    onnx.save(graph, tmp_path / "m.onnx")
    read = MLP.from_onnx(tmp_path / "m.onnx")
    assert (read.layers, read.classes) == (model.layers, None)
