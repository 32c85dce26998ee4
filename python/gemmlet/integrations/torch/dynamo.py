"""The backend of `torch.compile`: chains of linear layers, activations and a loss, each in one call.

It takes the graph that Dynamo has traced, before autograd: to go through AOTAutograd costs small networks as much as
eager takes for all of it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.nn import functional

from ...formulas.activations import ACTIVATIONS
from .extension import (
    ACTIVATION_FUNCTIONS,
    ACTIVATION_METHODS,
    DTYPES,
    LOSS_FUNCTIONS,
    NONE,
    Activation,
    Kernels,
    Loss,
    Network,
    calls,
    capsule,
    has_no_version,
    is_negated,
    kernels,
)

# Activations whose result PyTorch saves for backward: that of others may be changed in place until then.
_SAVED_BY_RESULT = ("relu", "tanh", "sigmoid")


def backend(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compile a graph of Dynamo: ``torch.compile(model, backend="gemmlet")``.

    Each chain of linear layers, with their activations and perhaps the loss behind them, becomes one call, forward and
    backward; the rest of the graph runs as it is. PyTorch runs a chain where something is unusual: tensors that are not
    float32 or float64 on the CPU, a second derivative, targets that PyTorch would ignore, refuse or broadcast.

    Parameters
    ----------
    graph : torch.fx.GraphModule
    inputs : sequence of tensors
    **options
        Not used.

    Returns
    -------
    callable
        Takes the inputs, and returns the outputs.
    """
    # Dynamo compiles anew where one of these has changed.
    is_special = (
        torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if kernels() is not None and not is_special and not any(map(_changes_state, graph.graph.nodes)):
        chains = _find_chains(graph.graph)
        for chain in chains:
            _replace(graph.graph, chain)
        if chains:
            graph.graph.lint()
            graph.recompile()
    run: Callable[..., Any] = graph.forward
    return run


# Nodes.


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _changes_state(node: fx.Node) -> bool:
    """Whether a call gives nothing, as those do that enter autocast, or change the gradient mode."""
    return node.op in ("call_function", "call_method", "call_module") and _example(node) is None


def _fits(*nodes: Any) -> bool:
    """Whether they are plain tensors that the kernels take."""
    examples = [_example(node) for node in nodes]
    return all(
        isinstance(each, torch.Tensor)
        and each.device.type == "cpu"
        and each.layout is torch.strided
        and each.dtype in DTYPES
        and each.dtype == examples[0].dtype
        for each in examples
    )


def _is_linear(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is not functional.linear or node.kwargs:
        return False
    x, weight, bias = (*node.args, None, None)[:3]
    return _fits(node, x, weight, *([] if bias is None else [bias])) and _example(weight).ndim == 2


def _is_identity(node: fx.Node) -> bool:
    """Whether it is a dropout that drops nothing."""
    if node.op != "call_function" or node.target is not functional.dropout:
        return False
    bound = _signature(node.target).bind(*node.args, **node.kwargs).arguments
    return bound.get("training") is False or bound.get("p") == 0


def _activation(node: fx.Node) -> tuple[Activation | None, bool]:
    """What a node is, and whether it is in place."""
    arguments = list(node.args[1:])
    named = dict(node.kwargs)
    names: tuple[str, ...] = ()
    made: Callable[..., Activation | None]
    if node.op == "call_method" and node.target in ACTIVATION_METHODS:
        made = ACTIVATION_METHODS[str(node.target)]
    elif node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS:
        names, made = ACTIVATION_FUNCTIONS[node.target]
    else:
        return None, False
    named |= dict(zip((*names, "inplace"), arguments, strict=False))
    in_place = bool(named.pop("inplace", False))
    if len(arguments) > len(names) + 1 or any(isinstance(each, fx.Node) for each in named.values()):
        return None, in_place
    return made(**named), in_place


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _loss(node: fx.Node, last: Activation) -> Loss | None:
    """What a node is: a mean of what the kernels compute, of matrices, or of a matrix and class indices."""
    made = LOSS_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if made is None:
        return None
    bound = _signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    prediction, target = given.pop("input"), given.pop("target")
    if given.pop("size_average", None) is not None or given.pop("reduce", None) is not None:
        return None
    if given["reduction"] != "mean" or not isinstance(target, fx.Node):
        return None
    loss = made(**given)
    wanted = _example(target)
    if loss is None or not isinstance(wanted, torch.Tensor) or not _fits(prediction):
        return None
    if loss.name == "softmax_cross_entropy" and wanted.dtype == torch.int64:
        fits = wanted.ndim == 1 and wanted.device.type == "cpu"
    else:
        fits = wanted.ndim == 2 and _fits(prediction, target)
    if loss.name == "binary_cross_entropy" and last.name != "sigmoid":  # PyTorch checks its range
        fits = False
    return loss if fits and _example(prediction).ndim == 2 else None


# Chains.


class Chain:
    """Nodes that one call computes: linear layers with their activations, and perhaps a loss.

    It is called with the tensors that they take: the input, a weight and a bias (or None) for each layer, the targets.
    """

    def __init__(self, linear: fx.Node) -> None:
        self.nodes = [linear]
        self.activations = [NONE]
        self.loss: Loss | None = None
        self._found: Kernels | None = None
        self._capsule: Any = None
        self._saved: dict[tuple[bool, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.__name__ = "gemmlet_chain"

    def extend(self, node: fx.Node) -> bool:
        """Add a node that reads the last one; False if it does not fit."""
        (activation, _), last = _activation(node), self.activations[-1]
        if node.args[:1] != (self.nodes[-1],) or self.loss is not None:
            return False
        if _is_linear(node) and self.nodes[-1] not in node.args[1:] and _fits(node, self.nodes[-1]):
            self.activations.append(NONE)
        elif activation is not None and last is NONE and len(node.all_input_nodes) == 1:
            self.activations[-1] = activation
        elif _is_identity(node):
            pass
        elif (loss := _loss(node, last)) is not None and self.nodes[-1] not in node.args[1:]:
            self.loss = loss
        else:
            return False
        self.nodes.append(node)
        return True

    def finish(self) -> tuple[Any, ...]:
        """Take note of the functions, and return the nodes that are the arguments."""
        arguments: list[Any] = [self.nodes[0].args[0]]
        self._functions: list[
            tuple[Any, int]
        ] = []  # with the number of tensors that each takes besides the last result
        for node in self.nodes:
            if _is_linear(node):
                arguments += (*node.args[1:], None)[:2]
                self._functions.append((functional.linear, 2))
            elif node is self.nodes[-1] and self.loss is not None:
                bound = _signature(node.target).bind(*node.args, **node.kwargs).arguments
                arguments.append(bound["target"])
                settings = {name: each for name, each in bound.items() if name not in ("input", "target")}
                self._functions.append((functools.partial(node.target, **settings), 1))
            else:
                function = node.target if node.op == "call_function" else getattr(torch, str(node.target))
                self._functions.append((_behind(function, node.args[1:], dict(node.kwargs)), 0))
        self.network = Network(tuple(self.activations), self.loss)
        last = self.activations[-1].name
        self.reads_result = self.loss is None and last is not None and not ACTIVATIONS[last].needs_x
        self.copies_result = last not in _SAVED_BY_RESULT
        self.end_of_parameters = 1 + 2 * len(self.activations)
        # The arguments but biases that are not there.
        there = [i for i, each in enumerate(arguments) if each is not None]
        self._tensors = operator.itemgetter(*there)
        # Those whose values gradients depend on: a bias behind which there is no function is only added.
        added = self.end_of_parameters - 1 if self.loss is None and self.activations[-1] is NONE else None
        self._differentiated = [i for i in there if i != added]
        return tuple(arguments)

    def __call__(self, *inputs: Any) -> Any:
        """Compute the last node."""
        found = kernels()
        if found is not self._found:
            self._found, self._capsule = found, None if found is None else capsule(self.network, found)
        tensors = self._tensors(inputs)
        if (
            found is None
            or forward_ad._current_level >= 0
            or any(map(is_negated, tensors))
            or (self.loss is not None and inputs[-1].requires_grad)
        ):
            return self._by_pytorch(inputs)
        needs_graph = torch.is_grad_enabled() and any(map(_requires_grad, tensors))
        made = found.module.torch_forward(self._capsule, inputs, needs_graph)
        if made is None:
            return self._by_pytorch(inputs)
        calls["forward"] += 1
        return _apply(self, made, *inputs) if needs_graph else made[0]

    def _by_pytorch(self, inputs: tuple[Any, ...]) -> Any:
        calls["forward by PyTorch"] += 1
        return self.eager(*inputs)

    def eager(self, result: Any, *inputs: Any) -> Any:
        """Compute it by PyTorch."""
        at = 0
        for function, count in self._functions:
            result = function(result, *inputs[at : at + count])
            at += count
        return result

    def gradients(
        self, inputs: list[Any], versions: list[int | None], kept: torch.Tensor, grad: Any, needed: tuple[bool, ...]
    ) -> list[torch.Tensor | None]:
        """The gradients by PyTorch; with a graph of their own, where a second derivative is wanted."""
        others = self.saved(needed)[1]
        changed = {i for i, was, now in zip(others, versions, _versions(inputs, others), strict=True) if was != now}
        if any(i % 2 for i in changed) or 0 in changed:
            raise RuntimeError("a tensor that a gradient needs has been changed in place since the forward pass")
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            end = len(kept)  # of the biases as they were, the last of what is kept
            for i in range(self.end_of_parameters - 1, 0, -2):
                begin = end - inputs[i - 1].shape[0]
                if i in changed:
                    inputs[i] = _WithValues.apply(inputs[i], kept[begin:end])
                end = begin
            # Aliases: an input may be computed from another one, whose gradient that way is not the chain's. Those that
            # have been frozen since are asked for as well.
            own = inputs.copy()
            wanted = []
            for i in itertools.compress(range(len(needed)), needed):
                own[i] = inputs[i].view_as(inputs[i]).requires_grad_()
                wanted.append(own[i])
            found = iter(torch.autograd.grad(self.eager(*own), wanted, grad, create_graph=create_graph))
        return [next(found) if is_needed else None for is_needed in needed]

    def saved(self, needed: tuple[bool, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The positions of the inputs that PyTorch saves for backward, and of others that a second derivative reads.

        The others may be changed until backward.
        """
        found = self._saved.get(needed)
        if found is None:
            layers = range(len(self.activations))
            lowest = next((i for i in layers if (i == 0 and needed[0]) or needed[1 + 2 * i] or needed[2 + 2 * i]), 0)
            weights = [1 + 2 * i for i in layers if i > lowest or (i == 0 and needed[0])]
            targets = [] if self.loss is None else [self.end_of_parameters]
            read = (*([0] if needed[1] else []), *weights, *targets)
            found = self._saved[needed] = read, tuple(i for i in self._differentiated if i not in read)
        return found


_requires_grad = operator.attrgetter("requires_grad")


def _versions(inputs: Sequence[Any], positions: tuple[int, ...]) -> list[int | None]:
    """How often tensors have been changed, None of those of the inference mode."""
    try:
        return [inputs[i]._version for i in positions]
    except RuntimeError:  # rarely: to ask each takes as long as to read its version
        return [None if has_no_version(inputs[i]) else inputs[i]._version for i in positions]


def _behind(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda x: function(x, *arguments, **named)


class _WithValues(torch.autograd.Function):  # type: ignore[misc]
    """A tensor as it was when it had other values."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class _Differentiable(torch.autograd.Function):  # type: ignore[misc]
    """A chain whose gradient is wanted. The results are there already."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, made: Any, *inputs: Any) -> Any:
        result, kept = made
        needed = ctx.needs_input_grad[2 : chain.end_of_parameters + 2]
        read, others = chain.saved(needed)
        saved, rest = [kept], list(inputs)
        for i in read:  # those are freed by backward, though the result may live on
            saved.append(inputs[i])
            rest[i] = None
        if chain.reads_result:
            saved.append(result.clone() if chain.copies_result else result)
        ctx.state = chain, chain._found, chain._capsule, needed, read, rest, _versions(inputs, others)
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved = ctx.saved_tensors
        chain, found, network, needed, read, rest, versions = ctx.state
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # what was saved is freed as well
            ctx.state = None
        inputs = rest.copy()
        for i, each in zip(read, saved[1:], strict=False):  # they may come from a hook
            inputs[i] = each
        grads = None
        is_plain = not torch.is_grad_enabled() and forward_ad._current_level < 0
        is_plain = is_plain and not torch._C._len_torch_dispatch_stack()
        if is_plain and not is_negated(grad) and not any(map(is_negated, saved)):
            if chain.activations[-1] is not NONE or grad.ndim != 2:
                grad = grad.contiguous()
            result = saved[-1] if chain.reads_result else None
            grads = found.module.torch_backward(network, grad, tuple(inputs), saved[0], result, needed)
        if grads is None:
            calls["backward by PyTorch"] += 1
            grads = chain.gradients(inputs, versions, saved[0], grad, needed)
        else:
            calls["backward"] += 1
        return (None, None, *grads) if chain.loss is None else (None, None, *grads, None)


# Without the Python that looks for functorch's wrappers: the kernels have taken all arguments, so there are none.
_apply = super(torch.autograd.Function, _Differentiable).apply


def _find_chains(graph: fx.Graph) -> list[Chain]:
    """The chains of a graph, each as long as it can be, of nodes of which nobody else reads any but the last.

    All of a chain is computed where its last node stands: nothing in between may change what it reads.
    """
    chains: list[Chain] = []
    by_last: dict[fx.Node, Chain] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        source = node.args[0] if node.args else None
        chain = by_last.get(source) if isinstance(source, fx.Node) and len(source.users) == 1 else None
        if chain is not None and chain.extend(node):
            del by_last[source]
            by_last[node] = chain
        elif _is_linear(node):
            chains.append(Chain(node))
            by_last[node] = chains[-1]
        elif not _is_pure(node):
            by_last.clear()
    return chains


def _is_pure(node: fx.Node) -> bool:
    """Whether a node is known to change nothing."""
    activation, in_place = _activation(node)
    return (activation is not None and not in_place) or node.target in LOSS_FUNCTIONS


def _replace(graph: fx.Graph, chain: Chain) -> None:
    last = chain.nodes[-1]
    arguments = chain.finish()
    with graph.inserting_after(last):
        node = graph.call_function(chain, arguments)
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for each in reversed(chain.nodes):
        graph.erase_node(each)
