"""Training plans as the extension modules of the CPU take them: csrc/cpu/bindings/training.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..training import plan as training
from ..training.plan import NOISE, SAMPLES, Backward, Forward, GradientPenalty, Loss, Penalty, TrainingPlan, Update

# By what `csrc/cpu/training/plan.h` knows the inputs of a network that are no other network's outputs.
_SOURCES: dict[training.Source, int] = {SAMPLES: -1, NOISE: -2}

# Phases that read a gradient, and which one: what the next phase after `Loss` or `Backward` is.
_READERS = {"backward": "backward", "penalty": "update", "gradient_penalty": "update", "update": "update"}


# The numbers of formulas in an extension module, by name.
Numbers = Mapping[str, int]


def executor(
    module: Any, plan: TrainingPlan, activations: Numbers, losses: Numbers, rules: Numbers
) -> Callable[[training.Batches], training.Outcome | None] | None:
    """``train(batches)`` of an extension module for a plan; None if it does not know something of it.

    It returns None, and leaves the batches to the reference, where skipped zeros would hide weights.

    The number of a row loss is ``~number`` here.
    Sparse matrices are for a single network, no network reads itself, and a gradient is read once.
    """
    try:
        stacks = [training.dense_layers(network) for network in plan.networks]
        networks = [[_layer(layer, activations) for layer in stack] for stack in stacks]
        phases: list[tuple[Any, ...]] = []
        reader: dict[int, str] = {}  # by network, which phase its gradient is there for
        for phase in plan.phases[1:]:
            phases.append(_phase(plan, phase, losses, rules))
            kind, network, to = phases[-1][:3]
            if (kind == "forward" and network in to) or (kind in _READERS and reader.get(network) != _READERS[kind]):
                return None
            if kind == "loss":
                reader[network] = "backward"
            elif kind == "backward":
                reader[network] = "update" if to < 0 else ""
                if to >= 0:
                    reader[to] = "backward"
            elif kind == "update":
                reader[network] = ""
    except (KeyError, training.UnsupportedError):
        return None
    if phases[-1][0] != "update":
        return None
    if plan.gather.dataset.indptr is not None:
        kinds = [phase[0] for phase in phases]
        if phases[0] != ("forward", 0, [_SOURCES[SAMPLES]]) or kinds.count("forward") + kinds.count("update") > 2:
            return None
    dataset, scale, shift = plan.gather
    if dataset.labels is not None and dataset.indptr is not None:
        return None
    dropout = [
        (network, i, layer.dropout.keep, layer.dropout.stream, layer.dropout.seed)
        for network, stack in enumerate(stacks)
        for i, layer in enumerate(stack)
        if layer.dropout is not None
    ]
    if dropout and any(isinstance(phase, GradientPenalty) for phase in plan.phases):
        return None
    input_noise = [
        (network, stack[0].noise.deviation, stack[0].noise.stream, stack[0].noise.seed)
        for network, stack in enumerate(stacks)
        if stack[0].noise is not None
    ]
    if input_noise and dataset.indptr is not None:
        return None
    fixed = networks, phases, dropout, input_noise, *dataset[:-1], *(dataset.labels or (None, 0)), scale, shift
    kept = module.kept_memory()

    def train(batches: training.Batches) -> training.Outcome | None:
        order, size, hyperparameters, sums, decay, noise, _, first_step = batches
        outcome = module.train(*fixed, order, size, hyperparameters, sums, decay, noise, first_step, kept)
        return None if outcome is None else training.Outcome(tuple(outcome[0]), outcome[1])

    return train


def _layer(layer: training.DenseLayer, activations: Numbers) -> tuple[Any, ...]:
    (weight, weight_state, weight_average), (bias, bias_state, bias_average), activation, parameter, *_ = layer
    number = -1 if activation is None else activations[activation]
    return weight, bias, number, parameter, weight_state, bias_state, weight_average, bias_average


def _phase(plan: TrainingPlan, phase: training.Phase, losses: Numbers, rules: Numbers) -> tuple[Any, ...]:
    if isinstance(phase, Forward):
        forward = "forward", phase.network, [_SOURCES.get(source, source) for source in phase.inputs]
        return (*forward, phase.stream) if phase.stream else forward
    if isinstance(phase, Loss):
        number = losses[phase.name]
        return "loss", phase.network, number, phase.value, plan.weight(phase), phase.targets, *phase.limits
    if isinstance(phase, Backward):
        return "backward", phase.network, -1 if phase.to is None else phase.to
    if isinstance(phase, Penalty):
        return "penalty", *phase
    if isinstance(phase, GradientPenalty):
        return "gradient_penalty", *phase
    if isinstance(phase, Update) and phase.max_norm is None:
        limit = math.inf if phase.clip_value is None else phase.clip_value
        return "update", phase.network, rules[phase.rule], limit, phase.decays_biases
    raise training.UnsupportedError(phase)
