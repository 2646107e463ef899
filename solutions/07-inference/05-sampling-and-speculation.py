# %% [markdown]
# # Solutions: Sampling and speculation
#
# Four functions of a serving engine: a sampler, the rule that makes speculation exact, a draft that costs nothing, and the mask that reads a whole
# tree of drafts in one pass. Symbols are those of the lesson: $p$ is the target's distribution, $q$ the draft's, $\gamma$ the number of
# drafted tokens. Stuck? `check.hint("accept")` shows a hint, and the next one when it is called again.

# %%
import torch
from torch import Tensor

from llmlab.checks.inference.sampling_and_speculation import check
from llmlab.inference.sampling_and_speculation import draw

# %% [markdown]
# ## Exercise 1: the nucleus
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# Top-p keeps, in each row, the fewest tokens, largest first, whose probabilities together reach $p$. So the token that crosses $p$ stays, and at least one
# token stays always. All other logits become $-\infty$. When several tokens are equal at the border, no more of them stay than are needed; which of
# them is up to you.


# %% tags=["exercise"]
def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (batch, vocab) with −∞ for all that is not in the nucleus; 0 < p ≤ 1.

    The logits that stay are as they were. `logits` itself stays as it is.
    """
    # BEGIN SOLUTION
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # what stands in front of each token
    stays = before < p
    stays = torch.zeros_like(stays).scatter(-1, order, stays)
    return logits.masked_fill(~stays, -torch.inf)
    # END SOLUTION


# %% tags=["check"]
check.keep_top_p(keep_top_p)

# %% [markdown] tags=["solution"]
# The question for each token is what stands before it. As long as that is below $p$, the token is needed; for the first token it is 0, so one always stays. With
# `<=` a token would stay although those before it have exactly $p$. `scatter` writes each answer to the place that its token came from.

# %% [markdown]
# ## Exercise 2: accept
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 4 points
#
# The draft has drawn the tokens `drafted[i]` from the rows `q[i]`. The target's rows are `p[i]`; it has one more. From first to last: token $x$ of
# place $i$ stays if $u_i < p_i(x) / q_i(x)$. The first that does not stay is replaced by a draw from $\max(p_i - q_i, 0)$, divided by its sum,
# and the text ends there. When all stay, one more is drawn from the last row of $p$. The last uniform, `u[-1]`, draws, in both cases:
# `draw(distribution, u)` takes a distribution that sums to 1 and returns a token.


# %% tags=["exercise"]
def accept(p: Tensor, q: Tensor, drafted: list[int], u: Tensor) -> list[int]:
    """The tokens that are kept: the drafted ones that stay, and one more.

    Shapes: p (γ + 1, vocab), q (γ, vocab), u (γ + 1,) in [0, 1); γ may be 0.
    """
    # BEGIN SOLUTION
    for i, x in enumerate(drafted):
        if u[i] >= p[i, x] / q[i, x]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*drafted[:i], draw(rest / rest.sum(), u[-1])]
    return [*drafted, draw(p[-1], u[-1])]
    # END SOLUTION


# %% tags=["check"]
check.accept(accept)

# %% [markdown] tags=["solution"]
# Token $x$ comes out in two ways. It was drafted and stayed: $q(x) \min(1, p(x)/q(x)) = \min(p, q)$. Or another was rejected and $x$ was drawn: rejection has
# the probability $1 - \sum \min(p, q) = \sum \max(p - q, 0)$, which is the very sum that the residual was divided by, so this adds $\max(p - q, 0)$.
# Together they are $p$. The check goes through all drafts and all stretches of the uniforms, and finds this with no sampling noise.

# %% [markdown]
# ## Exercise 3: the text as a draft
# ●●○○○ difficulty · ●●●○○ importance · 12 minutes · 2 points
#
# Did the last tokens stand in the text before? Then what followed them may follow again. Look for the last `longest` tokens first, then for
# one fewer, down to one. As soon as a number of tokens is found, return what followed them, at most `count` tokens. Of several places the earliest
# counts. The place must be an earlier one, but it may overlap the last tokens. `[]` if nothing is found.


# %% tags=["exercise"]
def lookup(tokens: list[int], count: int, longest: int) -> list[int]:
    """At most `count` tokens that followed the last tokens where they stood before.

    A text may be shorter than `longest`.
    """
    # BEGIN SOLUTION
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + count]
    return []
    # END SOLUTION


# %% tags=["check"]
check.lookup(lookup)

# %% [markdown] tags=["solution"]
# The last `n` tokens begin at `len(tokens) - n`, so that is where the search must end: at that place they would find themselves, and nothing follows. The
# longest match comes first because it is the most certain. This draft has no distribution of its own. Its $q$ is 1 at the token, so `accept` keeps it
# with probability $p(x)$, and the residual is $p$ without it.

# %% [markdown]
# ## Exercise 4: the mask of a tree
# ●●●○○ difficulty · ●●●○○ importance · 12 minutes · 2 points
#
# Drafted tokens may form a tree. Node 0 is its root, and `parents[i]` is the node that node `i` follows, which always stands before it; the root's is −1. All nodes go through the
# target in one pass, after `past` tokens in the cache. A node may look at the whole cache, at all of its ancestors, and at itself.


# %% tags=["exercise"]
def tree_mask(parents: list[int], past: int) -> Tensor:
    """(n, past + n), boolean: True where the node of the row may look.

    The columns are the tokens of the cache, then the nodes.
    """
    # BEGIN SOLUTION
    n = len(parents)
    mask = torch.zeros(n, past + n, dtype=torch.bool)
    mask[:, :past] = True
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] = mask[parent]
        mask[i, past + i] = True
    return mask
    # END SOLUTION


# %% tags=["check"]
check.tree_mask(tree_mask)

# %% [markdown] tags=["solution"]
# Whoever the parent sees, the child sees; then it sees itself. Parents stand before their children, so a parent's row is complete when it is copied. A chain gives the
# causal mask: a tree without branches is plain speculation.
