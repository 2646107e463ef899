"""Distilling abilities: the teacher's texts, not its logits, carry over what it can do.

Where to start: `tasks.py`, small problems with graders, and `learning.py`, how an
example becomes labels and a student. Then, by what is asked of the teacher:

    rationales.py       the way to the answer: Fine-tune-CoT, and MT-CoT's two tasks
    socratic.py         sub-questions, for two students that share the work
    counterfactuals.py  questions edited until the answer turns (DISCO); rationales that
                        belong to their answer, and are followed (SCOTT)
    in_context.py       reading demonstrations: soft and hard labels behind them
    lion.py             new questions where the student is weak

Symbols, the same in all files:

    q  question      r  rationale      a  answer      p, q(·)  teacher, student
    B  batch         T  tokens         V  vocabulary
"""

from pathlib import Path

from llmlab.compression.distilling_abilities import (
    counterfactuals,
    in_context,
    learning,
    lion,
    rationales,
    socratic,
    tasks,
)
from llmlab.compression.distilling_abilities.counterfactuals import (
    consistency,
    contrastive,
)
from llmlab.compression.distilling_abilities.learning import Example, fit, labels, write
from llmlab.compression.distilling_abilities.rationales import keep, mt_cot_loss
from llmlab.compression.distilling_abilities.tasks import exact_match, last_number

# What scripts/distilling_abilities_sweep.py measured, a run a line.
FILE = Path(__file__).parents[1] / "data" / "distilling_abilities.csv"

__all__ = [
    "FILE",
    "Example",
    "consistency",
    "contrastive",
    "counterfactuals",
    "exact_match",
    "fit",
    "in_context",
    "keep",
    "labels",
    "last_number",
    "learning",
    "lion",
    "mt_cot_loss",
    "rationales",
    "socratic",
    "tasks",
    "write",
]
