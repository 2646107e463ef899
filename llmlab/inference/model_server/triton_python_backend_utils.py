"""What a `model.py` imports under Triton's python backend, as far as it is needed here.

Triton's is compiled into its backend. This one has the same names, so that one
`model.py` runs under both. See https://github.com/triton-inference-server/python_backend.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np


class TritonError:
    """Why a request was not answered."""

    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        """The reason."""
        return self._message


class TritonModelException(Exception):
    """Raised by the utilities below."""


class Tensor:
    """An array with a name."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name = name
        self._array = np.asarray(array)

    def name(self) -> str:
        """The name of the input or output."""
        return self._name

    def as_numpy(self) -> np.ndarray:
        """The array."""
        return self._array


class InferenceRequest:
    """One request of a batch."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        request_id: str = "",
        requested_output_names: Sequence[str] = (),
    ) -> None:
        self._inputs = list(inputs)
        self._id = request_id
        self._outputs = list(requested_output_names)

    def inputs(self) -> list[Tensor]:
        """All inputs."""
        return self._inputs

    def request_id(self) -> str:
        """The client's id, or ''."""
        return self._id

    def requested_output_names(self) -> list[str]:
        """The outputs that the client asks for."""
        return self._outputs


class InferenceResponse:
    """The answer to one request: tensors, or an error."""

    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self._tensors = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        """What was computed."""
        return self._tensors

    def has_error(self) -> bool:
        """Whether there is no answer."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """The error, or None."""
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """The input called `name`, or None."""
    for tensor in request.inputs():
        if tensor.name() == name:
            return tensor
    return None


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    """The output called `name`, or None."""
    for tensor in response.output_tensors():
        if tensor.name() == name:
            return tensor
    return None


def get_input_config_by_name(model_config: dict, name: str) -> dict | None:
    """The entry of an input in the model's configuration, or None."""
    return _entry(model_config, "input", name)


def get_output_config_by_name(model_config: dict, name: str) -> dict | None:
    """The entry of an output in the model's configuration, or None."""
    return _entry(model_config, "output", name)


def _entry(model_config: dict | str, key: str, name: str) -> dict | None:
    if isinstance(model_config, str):
        model_config = json.loads(model_config)
    for entry in model_config.get(key, []):
        if entry["name"] == name:
            return entry
    return None


def triton_string_to_numpy(data_type: str) -> type:
    """np.float32 for "TYPE_FP32"; np.object_ for texts."""
    from llmlab.inference.model_server.config import DATATYPES
    from llmlab.inference.model_server.v2 import NUMPY

    if data_type not in DATATYPES:
        raise TritonModelException(f"{data_type} is not known")
    return NUMPY[DATATYPES[data_type]]
