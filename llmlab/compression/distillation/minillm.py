"""MiniLLM: the reverse KL between whole texts; Gu et al. 2023.

https://arxiv.org/abs/2306.08543. With r_t = log p(y_t|y_<t) − log q(y_t|y_<t):

    L   =  KL(q‖p)  =  −E_{y~q} Σ_t r_t
    ∇L  =  −E_{y~q} Σ_t ( R_t − 1 ) ∇ log q(y_t)              R_t = Σ_{t'≥t} r_t'

Here the texts depend on the student, and so do the rewards of all that follows a token.
The paper makes this policy gradient bearable in three ways.

1.  Single-step decomposition. What token t itself earns is summed over the whole
    vocabulary, no luck in it; only what follows is sampled:

        ∇L  =  −E Σ_t [ ∇ Σ_v q_v log(p_v / q_v)  +  R_{t+1} ∇ log q(y_t) ]

    The first part is the gradient of the token's reverse KL.
2.  Teacher-mixed sampling. Replies are drawn from p̃ = α p + (1−α) q, so that a bad
    student does not earn reward with texts that fool the teacher; importance weights
    w_t = Π_{t'≤t} q / p̃ bring it back to q. The product has a large variance: the
    paper keeps its last factor.
3.  Length normalisation. R_{t+1} is divided by how many tokens it sums, or short
    replies win because their sums are shorter.

    y_t      token t of the reply               w_t   importance weight
    p̃        what wrote the replies             α     the teacher's share in it
    R_{t+1}  reward of what follows token t, a constant, as is w_t

Deviations. The paper's 1/(T−t−1) is 1/0 one token before the end; R_{t+1} has T−t
terms, and by that we divide. Even the full product w_t is not exact for the second
part, whose rewards lie *after* t: `weights="exact"` carries each reward's own product,
for tests. Left out: PPO's clipping and the loss on a pretraining text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlab.compression.distillation.divergences import (
    check_pair,
    kl,
    log_probs,
    mixture,
)

Weights = Literal["token", "prefix", "exact"]


@dataclass(frozen=True)
class MiniLLMConfig:
    """How replies were drawn, and what is done about it."""

    alpha: float = 0.2  # the teacher's share in the distribution that wrote the replies
    weights: Weights = "token"  # the last factor of w_t, all of it, or unbiased
    length_norm: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be 0 … 1")
        if self.weights not in get_args(Weights):
            raise ValueError(
                f"weights={self.weights!r} must be one of {get_args(Weights)}"
            )


def of_tokens(
    log_all: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The log-probabilities of the tokens that stand there."""
    return log_all.gather(-1, tokens[..., None]).squeeze(-1)


def importance_weights(
    log_q: Float[Tensor, "B T"],
    log_mixed: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    product: bool = False,
) -> Float[Tensor, "B T"]:
    """q / p̃ of each token, or the product of these up to it. No gradient.

    Tokens outside the reply were not drawn: their factor is 1.
    """
    log_w = (log_q - log_mixed).detach().masked_fill(~mask.bool(), 0)
    if product:
        log_w = log_w.cumsum(-1)
    return log_w.exp()


def reward_to_go(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], length_norm: bool = True
) -> Float[Tensor, "B T"]:
    """R_{t+1} of each t: the rewards after it, or their mean. 0 at the last token.

    Rewards outside the mask count for nothing.
    """
    counts = mask.to(rewards.dtype)
    rewards = rewards.masked_fill(~mask.bool(), 0)
    after = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    if length_norm:
        left = counts.flip(-1).cumsum(-1).flip(-1) - counts
        after = after / left.clamp(min=1)
    return after


def loss(
    teacher_logits: Float[Tensor, "B T V"],
    student_logits: Float[Tensor, "B T V"],
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    config: MiniLLMConfig = MiniLLMConfig(),
) -> Float[Tensor, ""]:
    """A number whose gradient is the estimate of ∇KL(q‖p); summed over the tokens of a
    reply, the mean over replies. The number itself says little.

    Args:
        tokens: the replies, drawn token by token from p̃ of these very logits; at the
            place of the logits that predicted them.
    Raises:
        ValueError: shapes that do not fit, or a mask without a 1.
    """
    check(teacher_logits, student_logits, tokens, mask)
    mask = mask.bool()
    log_p = log_probs(teacher_logits.detach())
    log_q = log_probs(student_logits)
    log_p_y = of_tokens(log_p, tokens)
    log_q_y = of_tokens(log_q, tokens)
    log_mixed = mixture(log_p_y, log_q_y.detach(), config.alpha)
    product = config.weights != "token"
    w = importance_weights(log_q_y, log_mixed, mask, product)
    rewards = (log_p_y - log_q_y).detach()
    if config.weights == "exact":
        # each reward with the product up to its own token; see the top of the file
        long = reward_to_go(w * rewards, mask, config.length_norm)
    else:
        long = w * reward_to_go(rewards, mask, config.length_norm)
    terms = w * kl(log_q, log_p) - long * log_q_y
    return terms.masked_fill(~mask, 0).sum() / len(tokens)


def check(
    teacher_logits: Tensor, student_logits: Tensor, tokens: Tensor, mask: Tensor
) -> None:
    """Raises: ValueError: what the loss is given does not fit together."""
    check_pair(teacher_logits, student_logits)
    for name, given in (("tokens", tokens), ("mask", mask)):
        if given.shape != student_logits.shape[:-1]:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}; the logits are for"
                f" {tuple(student_logits.shape[:-1])} tokens"
            )
    if not mask.any():
        raise ValueError("mask is all zeros: there is no reply to learn from")
