"""The room `p_tuning`."""

from llmlab.peft.p_tuning.p_tuning import (
    PromptEncoder,
    PTuningConfig,
    apply,
    fold,
    num_parameters,
)
from llmlab.peft.p_tuning.p_tuning_v2 import PTuningV2Config

__all__ = [
    "PTuningConfig",
    "PTuningV2Config",
    "PromptEncoder",
    "apply",
    "fold",
    "num_parameters",
]
