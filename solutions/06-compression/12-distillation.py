# %% [markdown]
# # Solutions: Distillation
#
# Four losses and what they are made of: Hinton's soft labels, the divergence with both KLs at its ends, the loss on the student's own replies,
# and the reward of MiniLLM. $p$ is the teacher, $q$ the student. Stuck? `check.hint("soft_loss")` shows a hint, and the next one when it is called again.

# %%
from torch import Tensor

from llmlab.checks.compression.distillation import check

# %% [markdown]
# ## Exercise 1: soft labels
# ●●○○○ difficulty · ●●●●● importance · 10 minutes · 2 points
#
# Divide both logits by the temperature $T$ and take softmax over the vocabulary: $p$ for the teacher, $q$ for the student. Return
# $T^2 \, \mathrm{KL}(p \Vert q)$, the mean over the rows. A KL is $\sum_v p_v (\log p_v - \log q_v)$.


# %% tags=["exercise"]
def soft_loss(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float
) -> Tensor:
    """T² KL(p‖q), a scalar: summed over the vocabulary, the mean over the rows.

    Shapes: both logits (N, V). A gradient reaches the student's logits.
    """
    # BEGIN SOLUTION
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * kl.mean()
    # END SOLUTION


# %% tags=["check"]
check.soft_loss(soft_loss)

# %% [markdown] tags=["solution"]
# The gradient of the KL with respect to a logit is $(q_i - p_i)/T$, and at high $T$ the difference $q_i - p_i$ itself falls like $1/T$. With $T^2$ the
# pull stays as strong, so that hard labels can be mixed in with one weight whatever $T$ is. `F.kl_div(log_q, p, reduction="batchmean")` is the same
# KL: it takes the student first, as a logarithm, and in this version of PyTorch `"mean"` divides by the vocabulary, too.

# %% [markdown]
# ## Exercise 2: from one direction to the other
# ●●●○○ difficulty · ●●●●● importance · 10 minutes · 3 points
#
# $p$ is the teacher, $q$ the student. With $m = \beta p + (1 - \beta) q$, return for each position
# $\beta \, \mathrm{KL}(p \Vert m) + (1 - \beta) \, \mathrm{KL}(q \Vert m)$. At $\beta = 0$ return $\mathrm{KL}(p \Vert q)$ and at $\beta = 1$ return
# $\mathrm{KL}(q \Vert p)$.


# %% tags=["exercise"]
def jsd(teacher_logits: Tensor, student_logits: Tensor, beta: float) -> Tensor:
    """The generalised Jensen–Shannon divergence of each position, (B,); at β = 0 and 1
    the forward and the reverse KL.

    Shapes: both logits (B, V). A gradient reaches the student's logits.
    """
    # BEGIN SOLUTION
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    # END SOLUTION


# %% tags=["check"]
check.jsd(jsd)

# %% [markdown] tags=["solution"]
# At $\beta = 0$ the mixture is $q$, and the formula gives 0: no use as a loss. But divided by $\beta$ it tends to $\mathrm{KL}(p \Vert q)$, and near 1, divided by
# $1 - \beta$, to $\mathrm{KL}(q \Vert p)$. So the ends are the KLs by agreement, in the paper and in TRL. The price is a jump: near the ends the
# divergence and its gradient are small, at the ends they are not.

# %% [markdown]
# ## Exercise 3: on its own replies
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# The student wrote replies, and both models have read prompt and reply. Return the reverse KL, $\mathrm{KL}(q \Vert p)$, the mean over *all tokens of replies*.
# `reply` is true where a *token* belongs to a reply; the logits at $t$ predict the token at $t + 1$. The teacher gets no gradient.


# %% tags=["exercise"]
def on_policy_loss(
    teacher_logits: Tensor, student_logits: Tensor, reply: Tensor
) -> Tensor:
    """The mean of KL(q‖p) over the tokens of replies, a scalar.

    Shapes: logits (B, T, V), reply (B, T), booleans. Prompt and padding do not count.
        No gradient reaches the teacher's logits; one reaches the student's.
    """
    # BEGIN SOLUTION
    log_p = teacher_logits.detach().log_softmax(-1)[:, :-1]
    log_q = student_logits.log_softmax(-1)[:, :-1]
    each = (log_q.exp() * (log_q - log_p)).sum(-1)  # (B, T − 1)
    return each[reply[:, 1:]].mean()
    # END SOLUTION


# %% tags=["check"]
check.on_policy_loss(on_policy_loss)

# %% [markdown] tags=["solution"]
# The first token of a reply is predicted by the last of the prompt: logits lose their last column, the mask its first. Without the mask the student
# would learn to write prompts. One division by all reply tokens makes each token count the same; a mean of means would give a short
# reply as much weight as a long one. The texts are data: no gradient passes through how they were drawn.

# %% [markdown]
# ## Exercise 4: what follows a token
# ●●●●○ difficulty · ●●●○○ importance · 15 minutes · 4 points
#
# MiniLLM's long part needs $w_t R_{t+1}$ at each token of a reply. The reward of a token is $r_t = \log p - \log q$; $R_{t+1}$ is the *mean* of the rewards of the
# reply's tokens *after* $t$, and 0 at the last token. The weight is $w_t = q / \tilde p$ of token $t$ alone, as the tokens were drawn from the mixture $\tilde p$.
# Outside the mask return 0. Nothing carries a gradient.


# %% tags=["exercise"]
def weighted_reward_to_go(
    log_p: Tensor, log_q: Tensor, log_mixed: Tensor, mask: Tensor
) -> Tensor:
    """w_t R_{t+1} of each token, (B, T), without gradient; 0 where the mask is False.

    Shapes: all (B, T): log-probabilities of the tokens that were drawn, by teacher,
        student and mixture; the mask is True on a run of tokens, the reply.
    """
    # BEGIN SOLUTION
    counts = mask.float()
    r = (log_p - log_q).detach() * counts
    after = r.flip(-1).cumsum(-1).flip(-1) - r
    left = counts.flip(-1).cumsum(-1).flip(-1) - counts
    R = after / left.clamp(min=1)
    w = (log_q - log_mixed).detach().exp()
    return w * R * counts
    # END SOLUTION


# %% tags=["check"]
check.weighted_reward_to_go(weighted_reward_to_go)

# %% [markdown] tags=["solution"]
# The token's own reward is left out because the single-step part sums it over the whole vocabulary. Without the division a reply could earn by
# being short: each token costs some reward, so fewer tokens cost less. The full weight would be the product of all factors up to $t$. It is exact for no
# part that lies after $t$, and its variance grows with each factor: the paper keeps the last one.
