"""Model server: a repository of models, served over HTTP as Triton serves it.

    batching    when do requests that wait leave, and how many together?
    ensemble    several models, joined by the names of the tensors between them
    v2          KServe's protocol: tensors in JSON, and in binary beside it
    pbtxt       Protocol Buffers' text format
    config      config.pbtxt: what a model takes, gives, and how it is served
    repository  folders, versions, and whether they fit together
    backend     what executes a model: a model.py, as under Triton
    counting    statistics and metrics, in Triton's words
    running     a queue and its instances, in threads
    server      HTTP
    simulate    the batcher in virtual time
    triton      the real Triton, started for the same repository
    example     the repository of the lesson

Begin with `batching`, which is the idea. `python -m llmlab.inference.model_server
REPOSITORY` serves a folder.
"""

from pathlib import Path

from llmlab.inference.model_server.batching import (
    Batcher,
    QueueFull,
    Waiting,
    next_batch,
    one_by_one,
)
from llmlab.inference.model_server.config import (
    Batching,
    ModelConfig,
    Step,
    TensorConfig,
    read_config,
)
from llmlab.inference.model_server.ensemble import check_ensemble, run_ensemble
from llmlab.inference.model_server.example import dynamic, write_example
from llmlab.inference.model_server.repository import Entry, read_repository
from llmlab.inference.model_server.server import ModelServer, ServerConfig
from llmlab.inference.model_server.simulate import (
    Run,
    choose_delay,
    percentile,
    poisson,
    simulate,
)
from llmlab.inference.model_server.triton import TritonServer
from llmlab.inference.model_server.v2 import (
    NUMPY,
    InferRequest,
    Refused,
    infer_response,
    parse_infer_request,
    read_tensor,
    write_tensor,
)

# measured by scripts/model_server_sweep.py
FILE = Path(__file__).parents[1] / "data" / "model_server.csv"

__all__ = [
    "FILE",
    "NUMPY",
    "Batcher",
    "Batching",
    "Entry",
    "InferRequest",
    "ModelConfig",
    "ModelServer",
    "QueueFull",
    "Refused",
    "Run",
    "ServerConfig",
    "Step",
    "TensorConfig",
    "TritonServer",
    "Waiting",
    "check_ensemble",
    "choose_delay",
    "dynamic",
    "infer_response",
    "next_batch",
    "one_by_one",
    "parse_infer_request",
    "percentile",
    "poisson",
    "read_config",
    "read_repository",
    "read_tensor",
    "run_ensemble",
    "simulate",
    "write_example",
    "write_tensor",
]
