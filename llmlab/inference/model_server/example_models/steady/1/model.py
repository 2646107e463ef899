"""A model whose time is known: it sums, and sleeps.

A large model that decodes is like that: it reads all its weights for one request, and
once for sixteen.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """X (B, 8) → Y (B, 1), the sum."""

    def initialize(self, args):
        """How long it takes."""
        parameters = json.loads(args["model_config"])["parameters"]
        given = parameters.get("milliseconds", {"string_value": "5"})
        self.seconds = float(given["string_value"]) / 1000

    def execute(self, requests):
        """All requests in one sum, and one sleep."""
        batches = [
            pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            for request in requests
        ]
        sums = np.concatenate(batches).sum(-1, keepdims=True).astype(np.float32)
        time.sleep(self.seconds)
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("Y", y)])
            for y in np.split(sums, ends)
        ]
