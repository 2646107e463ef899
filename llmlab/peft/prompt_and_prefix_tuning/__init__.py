"""The room `prompt_and_prefix_tuning`."""

from llmlab.peft.prompt_and_prefix_tuning.prefix_tuning import PrefixTuningConfig
from llmlab.peft.prompt_and_prefix_tuning.prefixes import PrefixCache
from llmlab.peft.prompt_and_prefix_tuning.prompt_tuning import PromptTuningConfig
from llmlab.peft.prompt_and_prefix_tuning.virtual_tokens import (
    adapters,
    embedding_of,
    fold,
    remove,
    set_adapter,
    shape_of,
)

__all__ = [
    "PrefixCache",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "adapters",
    "embedding_of",
    "fold",
    "remove",
    "set_adapter",
    "shape_of",
]
