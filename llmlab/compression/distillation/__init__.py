"""Distillation: a small model, the student, learns from a large one, the teacher.

Where to start: `divergences.py`, how far apart two distributions over the vocabulary
are, in either direction. The three methods are functions of logits and a mask:

    hinton.py    soft labels at a temperature T, and the baselines: hard labels, and the
                 teacher's own texts as labels (sequence-level)
    gkd.py       any mixture of the two directions, on the student's own texts
    minillm.py   the reverse direction for whole texts, by policy gradient

    training.py  the loop, for any teacher and student that map ids to logits: replies
                 are read or written, logits are aligned with what they predict, and a
                 method's loss is taken

Symbols, the same in all files:

    p    the teacher's probabilities          q    the student's
    z    logits                               T    temperature, and tokens of a text
    V    vocabulary                           B    batch
    mask 1 for a token of the reply, 0 for the prompt and for padding
"""

from llmlab.compression.distillation import (
    divergences,
    gkd,
    hinton,
    minillm,
    training,
)
from llmlab.compression.distillation.divergences import kl, log_probs
from llmlab.compression.distillation.minillm import MiniLLMConfig
from llmlab.compression.distillation.training import (
    FILE,
    Aligned,
    Batch,
    DistilConfig,
)

__all__ = [
    "FILE",
    "Aligned",
    "Batch",
    "DistilConfig",
    "MiniLLMConfig",
    "divergences",
    "gkd",
    "hinton",
    "kl",
    "log_probs",
    "minillm",
    "training",
]
