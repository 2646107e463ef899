import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        told = {key: args[key] for key in sorted(args) if key != "model_config"}
        told["model_repository"] = told["model_repository"].split("/")[-1]
        config = pb_utils.get_output_config_by_name(
            json.loads(args["model_config"]), "H"
        )
        told["H"] = np.dtype(pb_utils.triton_string_to_numpy(config["data_type"])).name
        self.told = json.dumps(told)

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if len(x) == 3:
                raise ValueError("three is refused")
            if len(x) == 4:
                error = pb_utils.TritonError("four is refused")
                answers.append(pb_utils.InferenceResponse([], error=error))
                continue
            with np.errstate(all="ignore"):
                tensors = [
                    pb_utils.Tensor("F", x),
                    pb_utils.Tensor("H", x.astype(np.float16)),
                    pb_utils.Tensor("B", x > 0),
                    pb_utils.Tensor("I", np.full(len(x), 2**62 + 1)),
                    pb_utils.Tensor(
                        "S", np.array([b"%d" % i for i in range(len(x))], np.object_)
                    ),
                    pb_utils.Tensor("TOLD", np.array([self.told.encode()], np.object_)),
                ]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
