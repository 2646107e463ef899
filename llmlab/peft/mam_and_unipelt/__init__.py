"""Combinations of methods: MAM (two of them) and UniPELT (three, each with a gate).

    mam       a prefix and a parallel adapter
    gates     the gate of the input, and what it scales
    unipelt   LoRA, prefix and adapter, each behind a gate

Start with `mam`.
"""

from llmlab.peft.mam_and_unipelt.mam import MAMConfig
from llmlab.peft.mam_and_unipelt.unipelt import UniPELTConfig

__all__ = [
    "MAMConfig",
    "UniPELTConfig",
]
