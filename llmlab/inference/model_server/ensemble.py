"""An ensemble: several models, joined by the names of the tensors between them.

A step maps a model's inputs to names of the ensemble, and its outputs, too. The
ensemble's own inputs are there from the start. A step can run when all its inputs are
there; then its outputs are, too. So the order in which the steps are written does not
matter, and the edges of the graph are nowhere written down: they follow from names.

Simplified: steps that could run at the same time run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmlab.inference.model_server.config import ModelConfig, Step

# (the step, the model's inputs by the model's own names) → its outputs, by its names
Infer = Callable[[Step, dict[str, Any]], Mapping[str, Any]]


def run_ensemble(
    steps: Sequence[Step], tensors: Mapping[str, Any], infer: Infer
) -> dict[str, Any]:
    """All tensors by the ensemble's names, after each step has run once.

    Args:
        tensors: the ensemble's inputs.
        infer: runs one model.
    Raises:
        ValueError: steps are left whose inputs never come.
    """
    found = dict(tensors)
    left = list(steps)
    while left:
        ready = [s for s in left if all(n in found for n in s.inputs.values())]
        if not ready:
            models = ", ".join(step.model for step in left)
            raise ValueError(f"the inputs of {models} never come")
        step = ready[0]
        left.remove(step)
        given = {own: found[name] for own, name in step.inputs.items()}
        made = infer(step, given)
        for own, name in step.outputs.items():
            found[name] = made[own]
    return found


def check_ensemble(config: ModelConfig, models: Mapping[str, ModelConfig]) -> None:
    """Whether an ensemble can work, found out before the first request.

    Raises:
        ValueError: a model or a tensor that is not there, a name that two steps write,
            inputs that never come, datatypes that do not fit, an output nobody makes.
    """
    where = f"ensemble {config.name}"
    types = {tensor.name: tensor.datatype for tensor in config.inputs}
    for step in config.steps:
        if step.model not in models:
            raise ValueError(f"{where}: there is no model {step.model!r}")
        model = models[step.model]
        if model.is_ensemble:
            raise ValueError(f"{where}: {step.model} is an ensemble itself")
        wanted = {tensor.name for tensor in model.inputs}
        if set(step.inputs) != wanted:
            raise ValueError(
                f"{where}: {step.model} has the inputs {sorted(wanted)}, and the step"
                f" maps {sorted(step.inputs)}"
            )
        outputs = {tensor.name: tensor.datatype for tensor in model.outputs}
        for own, name in step.outputs.items():
            if own not in outputs:
                raise ValueError(f"{where}: {step.model} has no output {own!r}")
            if name in types:
                raise ValueError(f"{where}: the tensor {name!r} is written twice")
            types[name] = outputs[own]
    _check_types(config, models, types, where)
    # which tensors come, without computing any: each stands for itself
    run_ensemble(config.steps, types, lambda step, given: step.outputs)


def _check_types(
    config: ModelConfig,
    models: Mapping[str, ModelConfig],
    types: Mapping[str, str],
    where: str,
) -> None:
    for step in config.steps:
        for tensor in models[step.model].inputs:
            name = step.inputs[tensor.name]
            if name in types and types[name] != tensor.datatype:
                raise ValueError(
                    f"{where}: {name!r} is {types[name]}, and {step.model} wants"
                    f" {tensor.datatype}"
                )
    for tensor in config.outputs:
        if types.get(tensor.name) != tensor.datatype:
            made = types.get(tensor.name, "made by no step")
            raise ValueError(
                f"{where}: the output {tensor.name!r} is {made}, not {tensor.datatype}"
            )
