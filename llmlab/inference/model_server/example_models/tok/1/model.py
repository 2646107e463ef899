"""Text to token ids, with the course model's own tokenizer."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    """TEXT (1,) → IDS (1, T)."""

    def initialize(self, args):
        """Read the tokenizer."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(parameters["folder"]["string_value"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def execute(self, requests):
        """One answer for each request."""
        answers = []
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()[0]
            ids = self.tokenizer.encode(text.decode()).ids
            if not ids:
                error = pb_utils.TritonError("TEXT is empty: there is no token")
                answers.append(pb_utils.InferenceResponse([], error=error))
                continue
            tensor = pb_utils.Tensor("IDS", np.array([ids], dtype=np.int64))
            answers.append(pb_utils.InferenceResponse([tensor]))
        return answers
