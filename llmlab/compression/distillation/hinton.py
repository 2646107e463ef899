"""Soft labels: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531.

The teacher's softmax is softened by a temperature T, so that what it holds for nearly
as good as its best answer can be seen; the student is softened as much.

    p_i  =  exp(v_i / T) / Σ_j exp(v_j / T)         v  the teacher's logits
    q_i  =  exp(z_i / T) / Σ_j exp(z_j / T)         z  the student's

    L    =  α T² KL(p‖q)  +  (1−α) CE(y, softmax(z))        the label y at T = 1

The gradient of KL(p‖q) is (q_i − p_i) / T, and q − p shrinks like 1/T too: the factor
T² keeps the soft part as strong as the hard one whatever T is. At high T it is

    T² ∂KL/∂z_i  →  ((z_i − z̄) − (v_i − v̄)) / V           matching centred logits

The paper writes the cross-entropy −Σ p log q in place of KL; it is larger by the
entropy of p, which no student can change, and 0 is easier to read.

Baselines: `hard_loss`, labels alone; and sequence-level distillation (Kim & Rush 2016,
https://arxiv.org/abs/1606.07947), which is `hard_loss` on texts that the teacher wrote.
Simplified: they are samples, not the best of a beam.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlab.compression.distillation.divergences import (
    check_pair,
    kl,
    log_probs,
    masked_mean,
)


def soft_loss(
    teacher_logits: Float[Tensor, "B T V"],
    student_logits: Float[Tensor, "B T V"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T² KL(p‖q), the mean over the tokens of the replies. The teacher is a constant.

    Raises:
        ValueError: shapes that do not fit, an empty mask, T not positive.
    """
    check_pair(teacher_logits, student_logits)
    log_p = log_probs(teacher_logits.detach(), temperature)
    log_q = log_probs(student_logits, temperature)
    return temperature**2 * masked_mean(kl(log_p, log_q), mask)


def hard_loss(
    student_logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """−log q of the labels at temperature 1, the mean over the tokens of the replies.

    Where the mask is 0 a label is not looked at, so it may be −100.

    Raises:
        ValueError: shapes that do not fit, or an empty mask.
    """
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; the logits are for"
            f" {tuple(student_logits.shape[:-1])} tokens"
        )
    labels = labels.masked_fill(~mask.bool(), 0)
    log_q = log_probs(student_logits).transpose(1, 2)  # (B, T, V) -> (B, V, T)
    return masked_mean(F.nll_loss(log_q, labels, reduction="none"), mask)


def loss(
    teacher_logits: Float[Tensor, "B T V"],
    student_logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    temperature: float = 2.0,
    alpha: float = 0.9,
) -> Float[Tensor, ""]:
    """α T² KL(p‖q) + (1−α) CE. The paper found a small share of hard labels best.

    Args:
        alpha: α, the share of the soft labels, 0 … 1.
    Raises:
        ValueError: as `soft_loss`, or α out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be 0 … 1")
    soft = soft_loss(teacher_logits, student_logits, mask, temperature)
    return alpha * soft + (1 - alpha) * hard_loss(student_logits, labels, mask)
