"""GKD: the student learns on its own texts; Agarwal et al. 2023.

https://arxiv.org/abs/2306.13649, algorithm 1. A student that only ever read good texts
does not know how to go on from its own mistakes. So a share λ of the batches holds
replies that the student has just written, and the teacher says at each token what it
would have written *there*:

    L  =  (1−λ) E_{y ~ data} [ D(p‖q)(y|x) ]  +  λ E_{y ~ q} [ D(p‖q)(y|x) ]

    D(p‖q)(y|x)  =  1/|y| Σ_t D( p(·|y_<t, x) ‖ q(·|y_<t, x) )       D: forward or
                                                            reverse KL, or JSD(β)

Nothing flows through the sampling: the texts count as data. (This is not the gradient
of a divergence between whole texts; that is what MiniLLM is about.)

    x, y   prompt and reply                      λ   share of batches of own replies
    β      0 forward KL, 1 reverse KL, between them JSD(β)

Simplified: as in the paper's code and in TRL the mean is over the tokens of a batch,
not of each reply first. The paper's optional reward for reinforcement learning is left
out.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlab.compression.distillation.divergences import jsd, masked_mean


def loss(
    teacher_logits: Float[Tensor, "B T V"],
    student_logits: Float[Tensor, "B T V"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """D(p‖q), the mean over the tokens of the replies. The teacher is a constant.

    Raises:
        ValueError: shapes that do not fit, an empty mask, β or T out of range.
    """
    tokens = jsd(teacher_logits.detach(), student_logits, beta, temperature)
    return masked_mean(tokens, mask)
