"""How far the student's distribution is from the teacher's, token by token.

    KL(p‖q)  =  Σ_v p_v (log p_v − log q_v)

    forward   KL(p‖q)    large where the teacher writes what the student would not:
                         the student must cover all of p
    reverse   KL(q‖p)    large where the student writes what the teacher would not:
                         it may leave out what it cannot fit
    JSD(β)    β KL(p‖m) + (1−β) KL(q‖m),   m = β p + (1−β) q

The last is the generalised Jensen–Shannon divergence of Agarwal et al. 2023,
https://arxiv.org/abs/2306.13649, equation 1. It is 0 at both ends, but

    JSD(β) / β        →  KL(p‖q)   as β → 0
    JSD(β) / (1−β)    →  KL(q‖p)   as β → 1

so that its gradients point in the forward direction near 0 and in the reverse one near
1. As in the authors' and TRL's text, β = 0 *is* the forward KL here and β = 1 the
reverse one: the value jumps at the ends, the direction does not.

    p, q   probabilities of teacher and student, both at the temperature T
    β      0 … 1, the share of the teacher in the mixture m
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def log_probs(
    logits: Float[Tensor, "*batch V"], temperature: float = 1.0
) -> Float[Tensor, "*batch V"]:
    """log softmax(z / T), in float32 at least: bf16 keeps two digits of a logit.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(precise) / temperature).log_softmax(-1)


def kl(
    log_p: Float[Tensor, "*batch V"], log_q: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch"]:
    """KL(p‖q) from log-probabilities. What p never writes (−∞) costs nothing.

    `torch.nn.functional.kl_div` takes the two the other way round.
    """
    never = log_p == -torch.inf
    return (log_p.exp() * (log_p - log_q).masked_fill(never, 0)).sum(-1)


def mixture(
    log_p: Float[Tensor, "*batch"], log_q: Float[Tensor, "*batch"], beta: float
) -> Float[Tensor, "*batch"]:
    """log(β p + (1−β) q), for 0 ≤ β ≤ 1.

    Raises:
        ValueError: β out of range.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be 0 … 1")
    if beta == 0:
        return log_q
    if beta == 1:
        return log_p
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))


def jsd(
    teacher_logits: Float[Tensor, "*batch V"],
    student_logits: Float[Tensor, "*batch V"],
    beta: float,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """The generalised Jensen–Shannon divergence of each position; its ends are the KLs.

    Raises:
        ValueError: shapes that differ, β or temperature out of range.
    """
    check_pair(teacher_logits, student_logits)
    log_p = log_probs(teacher_logits, temperature)
    log_q = log_probs(student_logits, temperature)
    log_m = mixture(log_p, log_q, beta)
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def masked_mean(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """The mean over all tokens with mask 1: a long reply counts more than a short one.

    Raises:
        ValueError: shapes that differ, or a mask without a 1.
    """
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; the logits are for"
            f" {tuple(values.shape)} tokens"
        )
    mask = mask.bool()
    if not mask.any():
        raise ValueError("mask is all zeros: there is no reply to learn from")
    return values[mask].mean()


def check_pair(teacher_logits: Tensor, student_logits: Tensor) -> None:
    """Raises: ValueError: the two do not speak about the same tokens."""
    if teacher_logits.shape == student_logits.shape:
        return
    shapes = f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
    if teacher_logits.shape[-1] != student_logits.shape[-1]:
        raise ValueError(
            f"teacher_logits and student_logits have shapes {shapes}: their"
            " vocabularies differ, so a logit of one says nothing about the other's"
        )
    raise ValueError(f"teacher_logits and student_logits have shapes {shapes}")
