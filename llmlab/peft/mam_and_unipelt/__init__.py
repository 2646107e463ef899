"""The room `mam_and_unipelt`."""

from llmlab.peft.mam_and_unipelt.mam import MAMConfig
from llmlab.peft.mam_and_unipelt.unipelt import UniPELTConfig

__all__ = [
    "MAMConfig",
    "UniPELTConfig",
]
