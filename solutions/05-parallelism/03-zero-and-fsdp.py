# %% [markdown]
# # Solutions: ZeRO and FSDP
#
# From the bytes of a rank to a block whose weights are whole only while they are used. The rank functions get a communicator
# `comm` and run once on every rank of a `World`. If your ranks wait for each other for ever, the check says who waits for
# whom, at once. Stuck? `check.hint("my_piece")` shows a hint, and the next one when it is called again.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.parallelism.zero_and_fsdp import check
from llmlab.parallelism import Communicator
from llmlab.parallelism.zero_and_fsdp import Adam, adamw_

# %% [markdown]
# ## Exercise 1: what a rank holds
# ●○○○○ difficulty · ●●●●○ importance · 10 minutes · 1 point
#
# Mixed precision with Adam: a 16-bit weight and a 16-bit gradient for each of $\Psi$ parameters, and three 32-bit numbers. Stage 1 cuts the
# 32-bit numbers over $N$ ranks, stage 2 the gradients as well, stage 3 everything. All pieces have the same length, so a cut
# of $\Psi$ elements has pieces of $\lceil \Psi/N \rceil$. Stage 0 cuts nothing.


# %% tags=["exercise"]
def bytes_per_rank(stage: int, Psi: int, N: int) -> int:
    """Bytes that each of N ranks holds for Psi parameters, padding included, at stage
    0, 1, 2 or 3.
    """
    # BEGIN SOLUTION
    piece = -(-Psi // N)
    weights = 2 * (piece if stage >= 3 else Psi)
    gradients = 2 * (piece if stage >= 2 else Psi)
    optimizer = 12 * (piece if stage >= 1 else Psi)
    return weights + gradients + optimizer
    # END SOLUTION


# %% tags=["check"]
check.bytes_per_rank(bytes_per_rank)

# %% [markdown] tags=["solution"]
# The order of the stages is the order of the prizes: three quarters of the bytes are optimizer state, needed once per step, so it
# goes first. Weights go last, because they are needed all the time: taking them away is what costs traffic.

# %% [markdown]
# ## Exercise 2: this rank's piece
# ●●○○○ difficulty · ●●●●○ importance · 15 minutes · 2 points
#
# Join a model's parameters end to end, pad the line with zeros at its end to a multiple of the number of ranks, and return the
# piece of this rank. A tied weight appears twice in the list, as the same object; it has one gradient and must be there once,
# where it appears first. Two different parameters that happen to hold equal numbers (all norms start as ones) are not tied. No
# communication is needed.


# %% tags=["exercise"]
def my_piece(comm: Communicator, parameters: list[Tensor]) -> Tensor:
    """Piece number comm.rank of comm.size equal pieces of all parameters, flattened in
    order, each object once.

    Parameters may have any shapes, and need not be contiguous. Returns a 1-D tensor of
    ⌈Ψ / comm.size⌉ elements.
    """
    # BEGIN SOLUTION
    once = {id(w): w for w in parameters}.values()
    flat = torch.cat([w.reshape(-1) for w in once])
    flat = F.pad(flat, (0, -len(flat) % comm.size))
    return flat.view(comm.size, -1)[comm.rank]
    # END SOLUTION


# %% tags=["check"]
check.my_piece(my_piece)

# %% [markdown] tags=["solution"]
# `torch.chunk` is no help here: it makes the last pieces shorter, or fewer, and a reduce-scatter needs equal ones. The padding is
# harmless: its gradient is 0, so it adds nothing to the norm, and Adam leaves it 0. A tied weight that is counted twice would
# be updated by two owners, and its gradient would enter the norm twice.

# %% [markdown]
# ## Exercise 3: a step of ZeRO
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# All parameters are one flat tensor, which every rank has; its length is a multiple of the number of ranks. Each rank brings the gradient
# of its own *summed* loss and the number of its tokens. Do what one process would do with all tokens together:
#
# 1. $g$ = the gradients' sum over ranks, divided by the tokens of all ranks, this rank's piece only;
# 2. clip: scale $g$ by $\min(1, c / (\lVert g\rVert + 10^{-6}))$, with the norm of the *whole* gradient and $c$ = `adam.clip`;
# 3. `adamw_(w, m, v, g, t, adam)` steps this rank's piece in place (`w`, `m`, `v` and `g` have one shape);
# 4. return the new weights, whole on every rank.
#
# No rank may send more than an all-reduce of the gradient would, and a few single numbers.


# %% tags=["exercise"]
def zero_step(
    comm: Communicator,
    weights: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    tokens: int,
    t: int,
    adam: Adam,
) -> Tensor:
    """The weights after one step; m and v are changed in place.

    Shapes: weights and grad (n), whole; m and v (n / comm.size), this rank's piece.
    comm.reduce_scatter(x): piece number comm.rank of the sum over ranks.
    comm.all_gather(x): all pieces joined. comm.all_reduce(x): the sum over ranks; x
    must be a tensor.
    """
    # BEGIN SOLUTION
    total = comm.all_reduce(torch.tensor(tokens))
    g = comm.reduce_scatter(grad) / total
    norm = comm.all_reduce(g.square().sum()).sqrt()
    g = g * min(1.0, adam.clip / (norm.item() + 1e-6))
    w = weights.chunk(comm.size)[comm.rank].clone()
    adamw_(w, m, v, g, t, adam)
    return comm.all_gather(w)
    # END SOLUTION


# %% tags=["check"]
check.zero_step(zero_step)

# %% [markdown] tags=["solution"]
# The mean of the ranks' means is not the mean: a rank with 10 tokens would count as much as one with 1,000. And the norm of a
# piece is smaller than the norm of the whole, so ranks that clip by their own would scale their pieces differently: no
# error, a slightly different direction at every step, and a run that nobody can reproduce on another number of ranks.

# %% [markdown]
# ## Exercise 4 (challenge): whole only while it is used
# ●●●●○ difficulty · ●●●●● importance · 30 minutes · 4 points
#
# A chain of layers $h_{i+1} = \mathrm{relu}(h_i W_i^\top)$ with $h_0 = x$. Rank $r$ holds rows block $r$ of each $W_i$: `pieces[i]`. Each rank
# has its own $x$, and the gradient of its own loss with respect to the last $h$. Run forward and backward by hand:
#
# $$\delta_i = g_{i+1} \odot [h_{i+1} > 0], \qquad \frac{\partial L}{\partial W_i} = \delta_i^\top h_i, \qquad g_i = \delta_i W_i .$$
#
# Return the gradient of this rank's $x$, and this rank's piece of each $\partial L/\partial W_i$, summed over ranks. **The target:** never more than
# two whole matrices at a time, and $3\Psi$ numbers on the wire ($2\frac{p-1}{p}\Psi$ for gathers, $\frac{p-1}{p}\Psi$ for reductions).


# %% tags=["exercise"]
def chain_gradients(
    comm: Communicator, pieces: list[Tensor], x: Tensor, grad_out: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(gradient of x, [piece of the gradient of W_i, summed over ranks, for each i]).

    Shapes: pieces[i] (out_i / comm.size, in_i); x (batch, in_0); grad_out (batch, out
        of the last).
    comm.all_gather(piece): the whole W. comm.reduce_scatter(dW): this rank's rows of
    the sum. No autograd is needed.
    """
    # BEGIN SOLUTION
    h = [x]
    for piece in pieces:
        W = comm.all_gather(piece)
        h.append((h[-1] @ W.T).relu())
        del W
    g, gradients = grad_out, []
    for i in reversed(range(len(pieces))):
        delta = g * (h[i + 1] > 0)
        W = comm.all_gather(pieces[i])
        g = delta @ W
        del W
        gradients.insert(0, comm.reduce_scatter(delta.T @ h[i]))
    return g, gradients
    # END SOLUTION


# %% tags=["check"]
check.chain_gradients(chain_gradients)

# %% [markdown] tags=["solution"]
# This is ZeRO-3 without its machinery. The gradient of $W_i$ needs no $W_i$, only $h_i$ and $\delta_i$; it is the gradient that goes on to the
# layer below that needs the matrix a second time. Keeping the matrices from forward would save a third of the traffic and cost
# all of the memory: FSDP2 calls that choice `reshard_after_forward=False`.
