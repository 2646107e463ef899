"""Prompt Tuning and Prefix Tuning: trained vectors that a model reads before its input.

    virtual_tokens   where they come in, and their adapters
    prefixes         prefixes as keys and values: pure functions and one cache
    prompt_tuning    vectors before the embedded input
    prefix_tuning    keys and values before those of every layer
    files            save and load in `peft`'s format

Start with `virtual_tokens`.
"""

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
