"""Backends: what executes a model. Here one, `python`, whose models are files.

A model of the python backend is a file `model.py` with a class `TritonPythonModel`:
`initialize(args)` once, `execute(requests)` for each batch, `finalize()` at the end.
`execute` is given a *list of requests*, each with its own tensors, and returns a list
of answers of the same length: to put them together and to take them apart is the
model's business. That is where the batch is made that the scheduler only allowed.

An instance is an object of that class, from a module of its own, in a thread of its
own. Simplified: in Triton it is a process of its own, so that Python's lock and a
crash stay in it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from llmlab.inference.model_server import triton_python_backend_utils as pb_utils
from llmlab.inference.model_server.config import ModelConfig
from llmlab.inference.model_server.v2 import InferRequest, datatype_of

Outputs = dict[str, np.ndarray]


class ModelFailed(Exception):
    """A model could not answer a request."""


class Instance(Protocol):
    """What the server asks of a backend."""

    def prepare(self, requests: Sequence[InferRequest]) -> list:
        """The requests in the backend's own form."""

    def execute(self, prepared: list) -> list:
        """Runs the model once, over the whole batch."""

    def collect(self, answers: list) -> list[Outputs | ModelFailed]:
        """For each request its tensors, or why there are none."""

    def finalize(self) -> None:
        """The model is unloaded."""


class PythonInstance:
    """One `TritonPythonModel`.

    Args:
        number: which of the instances.
    Raises:
        ValueError: there is no model.py, or it cannot be loaded.
    """

    def __init__(
        self, config: ModelConfig, folder: Path, version: int, number: int
    ) -> None:
        self.config = config
        file = folder / str(version) / "model.py"
        name = f"{config.name}_0_{number}"
        if not file.is_file():
            raise ValueError(f"{config.name}/{version} has no model.py")
        try:
            self.model = _loaded(file, name).TritonPythonModel()
            if hasattr(self.model, "initialize"):
                self.model.initialize(_arguments(config, folder, version, name))
        except Exception as error:  # the author's code may raise anything
            raise ValueError(
                f"{config.name}/{version}/model.py: {type(error).__name__}: {error}"
            ) from error

    def prepare(self, requests: Sequence[InferRequest]) -> list:
        """The requests as `execute` is given them."""
        names = [tensor.name for tensor in self.config.outputs]
        made = []
        for request in requests:
            tensors = [pb_utils.Tensor(name, x) for name, x in request.inputs.items()]
            asked = request.outputs or names
            made.append(pb_utils.InferenceRequest(tensors, request.id, asked))
        return made

    def execute(self, prepared: list) -> list:
        """The author's `execute`."""
        answers = self.model.execute(prepared)
        if not isinstance(answers, list) or len(answers) != len(prepared):
            got = len(answers) if isinstance(answers, list) else type(answers).__name__
            raise ModelFailed(f"execute returned {got} for {len(prepared)} requests")
        return answers

    def collect(self, answers: list) -> list[Outputs | ModelFailed]:
        """Tensors by name, each held to the configuration."""
        return [self._one(answer) for answer in answers]

    def _one(self, answer: pb_utils.InferenceResponse) -> Outputs | ModelFailed:
        if answer.has_error():
            return ModelFailed(answer.error().message())
        found = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
        for tensor in self.config.outputs:
            if tensor.name not in found:
                return ModelFailed(f"the output {tensor.name!r} is missing")
            datatype = datatype_of(found[tensor.name])
            if datatype != tensor.datatype:
                return ModelFailed(
                    f"the output {tensor.name!r} is {datatype}, not {tensor.datatype}"
                )
        return found

    def finalize(self) -> None:
        """The author's `finalize`, if there is one."""
        if hasattr(self.model, "finalize"):
            self.model.finalize()


def _loaded(file: Path, name: str):
    """A file as a module, with our utilities under the name that it imports."""
    sys.modules.setdefault("triton_python_backend_utils", pb_utils)
    spec = importlib.util.spec_from_file_location(f"llmlab_served_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments(
    config: ModelConfig, folder: Path, version: int, name: str
) -> dict[str, str]:
    """What `initialize` is given: texts, as under Triton."""
    return {
        "model_config": json.dumps(config.as_json()),
        "model_instance_device_id": "0",
        "model_instance_kind": "CPU",
        "model_instance_name": name,
        "model_name": config.name,
        "model_repository": str(folder),
        "model_version": str(version),
    }


# name → (config, the model's folder, version, number) → an instance
BACKENDS: dict[str, Callable[[ModelConfig, Path, int, int], Instance]] = {
    "python": PythonInstance
}
