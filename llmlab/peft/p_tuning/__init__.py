"""P-Tuning: virtual tokens that a network makes (v1), and prompts in every layer (v2).

    p_tuning      v1: an LSTM or MLP makes the tokens before the input
    p_tuning_v2   v2: keys and values in every layer, and a label head

Both are encoders for the seam in `prompt_and_prefix_tuning.virtual_tokens`.

Start with `p_tuning`.
"""

from llmlab.peft.p_tuning.p_tuning import (
    PromptEncoder,
    PTuningConfig,
    adapters,
    apply,
    fold,
    load,
    num_parameters,
    remove,
    save,
    set_adapter,
)
from llmlab.peft.p_tuning.p_tuning_v2 import PTuningV2Config

__all__ = [
    "PTuningConfig",
    "PTuningV2Config",
    "PromptEncoder",
    "adapters",
    "apply",
    "fold",
    "load",
    "num_parameters",
    "remove",
    "save",
    "set_adapter",
]
