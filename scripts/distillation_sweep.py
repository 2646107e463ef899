"""Students of the course model: llmlab/compression/data/distillation.csv.

    python scripts/distillation_sweep.py            continue, a line a run (up to a
                                                    minute each)
    python scripts/distillation_sweep.py --check 1  run so many lines again and compare

The teacher is the course model, 1.05 M parameters; the student has the shape of the
draft model, 0.24 M.

    labels      a new student, 150 steps of 16 windows of 64 tokens of the course's
                text: hard labels, or the teacher's soft ones
    divergence  the draft model itself, 60 steps of 16 replies of 32 tokens to prompts
                of 16: the divergence, and who wrote the replies

The seed draws the first weights of a new student, the texts and the replies. All are
judged on the same held-out prompts.
"""

from __future__ import annotations

import sweeping
import torch
from torch import Tensor

from llmlab.compression.distillation import (
    FILE,
    Aligned,
    Batch,
    DistilConfig,
    gkd,
    hinton,
    kl,
    log_probs,
    minillm,
    training,
)
from llmlab.models import course_model
from llmlab.models.llama import Llama

SEEDS = (0, 1, 2)
PROMPT, REPLY = 16, 32
FIELDS = [
    "part",
    "method",
    "replies",  # who wrote them
    "seed",
    "steps",
    "valid_loss",  # nats per token of held-out text
    "forward",  # KL(p‖q) per token of the teacher's replies
    "reverse",  # KL(q‖p) per token of the student's own replies
    "surprise",  # −log p of a token that the student wrote
    "entropy",  # of the student, where it wrote
    "torch",
    "python",
]
# part, method, replies, steps
RUNS = [
    ("reference", "teacher", "", 0),
    ("reference", "draft", "", 0),
    ("labels", "hard", "text", 150),
    ("labels", "soft", "text", 150),
    ("divergence", "forward KL", "teacher", 60),
    ("divergence", "reverse KL", "teacher", 60),
    ("divergence", "forward KL", "student", 60),
    ("divergence", "reverse KL", "student", 60),
    ("divergence", "JSD 0.5", "student", 60),
    ("divergence", "JSD 0.5", "teacher", 60),
    ("divergence", "hard", "teacher", 60),
    ("divergence", "MiniLLM", "mixed", 60),
]
BETA = {"forward KL": 0.0, "JSD 0.5": 0.5, "reverse KL": 1.0}


def loss_of(method: str) -> training.Loss:
    """A method as a function of aligned logits."""

    def hard(a: Aligned) -> Tensor:
        return hinton.hard_loss(a.student_logits, a.tokens, a.mask)

    def soft(a: Aligned) -> Tensor:
        return hinton.soft_loss(a.teacher_logits, a.student_logits, a.mask)

    def divergence(a: Aligned) -> Tensor:
        return gkd.loss(a.teacher_logits, a.student_logits, a.mask, BETA[method])

    def policy_gradient(a: Aligned) -> Tensor:
        return minillm.loss(*a)

    named = {"hard": hard, "soft": soft, "MiniLLM": policy_gradient}
    return named.get(method, divergence)


class Sweep:
    """The teacher, the texts, and what everybody is judged by."""

    def __init__(self) -> None:
        self.teacher = course_model.load()
        self.draft = course_model.load_draft()
        self.train = course_model.tokens("train")
        held_out = course_model.tokens("valid")
        self.judged = self.texts(held_out, 128, PROMPT + REPLY, seed=99)
        self.teachers_text = self.replies(self.teacher, self.judged[:, :PROMPT], 99)
        self.pool: tuple[int, list[Batch]] = (-1, [])

    def texts(self, stream: Tensor, count: int, length: int, seed: int) -> Tensor:
        """Windows from random places."""
        dice = torch.Generator().manual_seed(1_000_003 * seed + length)
        starts = torch.randint(len(stream) - length, (count,), generator=dice)
        return stream[starts[:, None] + torch.arange(length)]

    def replies(self, model: Llama, prompts: Tensor, seed: int) -> Tensor:
        dice = torch.Generator().manual_seed(seed)
        return training.write(model, prompts, REPLY, dice).ids

    def batches(self, part: str, replies: str, seed: int, steps: int) -> list[Batch]:
        if part == "labels":
            ids = self.texts(self.train, 16 * steps, 64, seed)
            made = [Batch(i, training.reply_mask(i, 1), 1) for i in ids.split(16)]
            return made
        if self.pool[0] != seed:
            prompts = self.texts(self.train, 16 * steps, PROMPT, seed)
            written = [self.replies(self.teacher, p, seed) for p in prompts.split(160)]
            cut = torch.cat(written).split(16)
            reply = training.reply_mask(cut[0], PROMPT)
            self.pool = (seed, [Batch(ids, reply, PROMPT) for ids in cut])
        return self.pool[1]

    def student(self, part: str, method: str, replies: str, seed: int, steps: int):
        if method == "teacher":
            return self.teacher
        if part == "labels":
            torch.manual_seed(seed)
            model = Llama(self.draft.config)
        else:
            model = course_model.load_draft()
        if steps == 0:
            return model
        config = DistilConfig(
            lr=3e-3 if part == "labels" else 1e-3,
            on_policy=float(replies in ("student", "mixed")),
            mixed=0.2 if replies == "mixed" else 0.0,
            new_tokens=REPLY,
            seed=seed,
        )
        batches = self.batches(part, replies, seed, steps)
        training.distil(model, self.teacher, batches, loss_of(method), config)
        return model

    @torch.no_grad()
    def measure(self, student: Llama) -> dict[str, float]:
        """Everything in nats per token of a reply."""
        reply = slice(PROMPT - 1, -1)  # logits that predict a token of a reply

        def both(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            log_p, log_q = (
                log_probs(training.logits_of(m, ids)[:, reply])
                for m in (self.teacher, student)
            )
            return log_p, log_q, ids[:, PROMPT:]

        of_tokens = minillm.of_tokens
        _, log_q, tokens = both(self.judged)
        found = {"valid_loss": -of_tokens(log_q, tokens).mean()}
        log_p, log_q, _ = both(self.teachers_text)
        found["forward"] = kl(log_p, log_q).mean()
        log_p, log_q, tokens = both(self.replies(student, self.judged[:, :PROMPT], 7))
        found["reverse"] = kl(log_q, log_p).mean()
        found["surprise"] = -of_tokens(log_p, tokens).mean()
        found["entropy"] = -(log_q.exp() * log_q).sum(-1).mean()
        return {name: float(value) for name, value in found.items()}

    def run(self, part: str, method: str, replies: str, steps: int, seed: int) -> dict:
        """One line of the file."""
        student = self.student(part, method, replies, seed, steps)
        found = {name: f"{v:.4f}" for name, v in self.measure(student).items()}
        line = {"part": part, "method": method, "replies": replies, "seed": seed}
        versions = dict(zip(sweeping.VERSIONS, sweeping.versions(), strict=True))
        return line | {"steps": steps} | found | versions


def runs() -> list[tuple]:
    """Seed by seed, so that a part of the file is a whole comparison."""
    every = []
    for seed in SEEDS:
        for run in RUNS:
            if seed == 0 or run[0] != "reference":
                every.append((*run, seed))
    return every


def main() -> None:
    check = sweeping.asked(__doc__)
    key = ("part", "method", "replies", "steps", "seed")
    done = {tuple(line[name] for name in key): line for line in sweeping.read(FILE)}
    sweep = Sweep()
    if check:
        for run in runs()[:check]:
            before = done[tuple(map(str, run))]
            now = sweep.run(*run)
            print(*run, *(f"{f}: {before[f]} then, {now[f]} now" for f in FIELDS[5:10]))
        return
    for run in runs():
        if tuple(map(str, run)) in done:
            continue
        line = sweep.run(*run)
        sweeping.append(FILE, line)


if __name__ == "__main__":
    main()
