"""Token ids to texts, with the course model's own tokenizer."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    """ID (B, 1) → WORD (B, 1)."""

    def initialize(self, args):
        """Read the tokenizer."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(parameters["folder"]["string_value"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def execute(self, requests):
        """One answer for each request."""
        answers = []
        for request in requests:
            ids = pb_utils.get_input_tensor_by_name(request, "ID").as_numpy()
            words = [[self.tokenizer.decode([int(token)]).encode()] for (token,) in ids]
            tensor = pb_utils.Tensor("WORD", np.array(words, dtype=np.object_))
            answers.append(pb_utils.InferenceResponse([tensor]))
        return answers
