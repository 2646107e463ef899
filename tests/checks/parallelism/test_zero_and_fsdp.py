"""Wrong answers to the exercises of 05-parallelism/03-zero-and-fsdp, each with the
diagnosis that it must get.
"""

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.parallelism.zero_and_fsdp import check
from llmlab.parallelism.zero_and_fsdp.units import adamw_
from tests.checks.rejecting import Wrong, rejects, verdict

# Exercise 1


def held(stage, Psi, N, piece=None, w=2, g=2, o=12, shift=0):
    piece = -(-Psi // N) if piece is None else piece
    return sum(
        each * (piece if stage + shift >= first else Psi)
        for each, first in ((w, 3), (g, 2), (o, 1))
    )


def rounded_down(stage, Psi, N):
    return held(stage, Psi, N, Psi // N)


def true_division(stage, Psi, N):
    return held(stage, Psi, N, Psi / N)


def two_fp32_numbers(stage, Psi, N):
    return held(stage, Psi, N, o=8)


def fp32_gradients(stage, Psi, N):
    return held(stage, Psi, N, g=4)


def no_gradients(stage, Psi, N):
    return held(stage, Psi, N, g=0)


def no_16_bit_weights(stage, Psi, N):
    return held(stage, Psi, N, w=0)


def one_stage_early(stage, Psi, N):
    return held(stage, Psi, N, shift=1)


def one_stage_late(stage, Psi, N):
    return held(stage, Psi, N, shift=-1)


def everything_cut_at_once(stage, Psi, N):
    return 16 * (-(-Psi // N) if stage else Psi)


# Exercise 2


def line(parameters):
    return torch.cat([w.reshape(-1) for w in parameters])


def once(parameters):
    return list({id(w): w for w in parameters}.values())


def pieces(flat, p):
    return F.pad(flat, (0, -len(flat) % p)).view(p, -1)


def tied_twice(comm, parameters):
    return pieces(line(parameters), comm.size)[comm.rank]


def equal_numbers_merged(comm, parameters):
    kept = []
    for w in parameters:
        if not any(w.shape == v.shape and torch.equal(w, v) for v in kept):
            kept.append(w)
    return pieces(line(kept), comm.size)[comm.rank]


def torch_chunk(comm, parameters):
    chunks = line(once(parameters)).chunk(comm.size)
    return chunks[comm.rank] if comm.rank < len(chunks) else torch.empty(0)


def padded_in_front(comm, parameters):
    flat = line(once(parameters))
    return F.pad(flat, (-len(flat) % comm.size, 0)).view(comm.size, -1)[comm.rank]


def every_nth(comm, parameters):
    flat = line(once(parameters))
    return F.pad(flat, (0, -len(flat) % comm.size))[comm.rank :: comm.size]


def order_of_memory(comm, parameters):
    flats = [w.as_strided((w.numel(),), (1,)) for w in once(parameters)]
    return pieces(torch.cat(flats), comm.size)[comm.rank]


def where_it_appears_last(comm, parameters):
    return pieces(line(once(parameters[::-1])[::-1]), comm.size)[comm.rank]


def a_view_of_the_wrong_rank(comm, parameters):
    return pieces(line(once(parameters)), comm.size)[(comm.rank + 1) % comm.size]


def whole_line(comm, parameters):
    return pieces(line(once(parameters)), comm.size).reshape(-1)


def scattered(comm, parameters):
    flat = pieces(line(once(parameters)), comm.size)
    return comm.reduce_scatter(flat / comm.size)[0]


# Exercise 3


def step(
    comm,
    weights,
    m,
    v,
    grad,
    tokens,
    t,
    adam,
    *,
    reduce=None,
    norm=None,
    scale=None,
    gather=True,
):
    g = (
        comm.reduce_scatter(grad) / comm.all_reduce(torch.tensor(tokens))
        if reduce is None
        else reduce(comm, grad, tokens)
    )
    size = (
        comm.all_reduce(g.square().sum()).sqrt().item()
        if norm is None
        else float(norm(comm, g))
    )
    g = g * (min(1.0, adam.clip / (size + 1e-6)) if scale is None else scale(size))
    w = weights.chunk(comm.size)[comm.rank].clone()
    adamw_(w, m, v, g, t, adam)
    return comm.all_gather(w) if gather else w


def mean_of_means(*args):
    return step(
        *args, reduce=lambda comm, grad, n: comm.reduce_scatter(grad / n, op="mean")
    )


def own_tokens(*args):
    return step(*args, reduce=lambda comm, grad, n: comm.reduce_scatter(grad) / n)


def mean_of_tokens(*args):
    return step(
        *args,
        reduce=lambda comm, grad, n: (
            comm.reduce_scatter(grad) / comm.all_reduce(torch.tensor(float(n)), "mean")
        ),
    )


def no_division(*args):
    return step(*args, reduce=lambda comm, grad, n: comm.reduce_scatter(grad))


def averaged_as_well(*args):
    return step(
        *args,
        reduce=lambda comm, grad, n: (
            comm.reduce_scatter(grad, op="mean") / comm.all_reduce(torch.tensor(n))
        ),
    )


def own_norm(*args):
    return step(*args, norm=lambda comm, g: g.norm())


def sum_of_norms(*args):
    return step(*args, norm=lambda comm, g: comm.all_reduce(g.norm()))


def no_root(*args):
    return step(*args, norm=lambda comm, g: comm.all_reduce(g.square().sum()))


def mean_of_norms(*args):
    return step(*args, norm=lambda comm, g: comm.all_reduce(g.norm(), "mean"))


def largest_norm(*args):
    return step(*args, norm=lambda comm, g: comm.all_reduce(g.norm(), "max"))


def never_clips(*args):
    return step(*args, scale=lambda norm: 1.0)


def always_scales(comm, weights, m, v, grad, tokens, t, adam):
    return step(
        comm,
        weights,
        m,
        v,
        grad,
        tokens,
        t,
        adam,
        scale=lambda norm: adam.clip / (norm + 1e-6),
    )


def clipped_before_the_sum(comm, weights, m, v, grad, tokens, t, adam):
    g = grad / comm.all_reduce(torch.tensor(tokens))
    g = g * min(1.0, adam.clip / (g.norm().item() + 1e-6))
    return step(
        comm,
        weights,
        m,
        v,
        grad,
        tokens,
        t,
        adam,
        reduce=lambda c, *_: c.reduce_scatter(g),
        scale=lambda norm: 1.0,
    )


def piece_only(*args):
    return step(*args, gather=False)


def whole_gradient_everywhere(comm, weights, m, v, grad, tokens, t, adam):
    whole = comm.all_reduce(grad).chunk(comm.size)[comm.rank] / comm.all_reduce(
        torch.tensor(tokens)
    )
    return step(comm, weights, m, v, grad, tokens, t, adam, reduce=lambda *_: whole)


def state_copied(comm, weights, m, v, *rest):
    return step(comm, weights, m.clone(), v.clone(), *rest)


def only_rank_0_reduces(comm, weights, m, v, grad, tokens, t, adam):
    if comm.rank == 0:
        return weights
    return step(comm, weights, m, v, grad, tokens, t, adam)


def old_weights(comm, weights, m, v, grad, tokens, t, adam):
    step(comm, weights, m, v, grad, tokens, t, adam)
    return weights


# Exercise 4


def run(comm, pieces, x, g, *, gather, mask=True, reduce=None, again=None):
    h = [x]
    for i in range(len(pieces)):
        h.append((h[-1] @ gather(i).T).relu())
    gradients = []
    for i in reversed(range(len(pieces))):
        delta = g * (h[i + 1] > 0) if mask else g
        g = delta @ (again or gather)(i)
        dW = delta.T @ h[i]
        gradients.insert(0, comm.reduce_scatter(dW) if reduce is None else reduce(dW))
    return g, gradients


def matrices_kept(comm, pieces, x, g):
    W = [comm.all_gather(piece) for piece in pieces]
    return run(comm, pieces, x, g, gather=lambda i: W[i])


def gathered_again_but_all_at_once(comm, pieces, x, g):
    W = [comm.all_gather(piece) for piece in pieces]
    V = [comm.all_gather(piece) for piece in pieces]
    return run(comm, pieces, x, g, gather=lambda i: W[i], again=lambda i: V[i])


def not_reduced(comm, pieces, x, g):
    def own(dW):
        return dW.chunk(comm.size)[comm.rank]

    return run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i]), reduce=own
    )


def whole_gradients(comm, pieces, x, g):
    return run(
        comm,
        pieces,
        x,
        g,
        gather=lambda i: comm.all_gather(pieces[i]),
        reduce=comm.all_reduce,
    )


def averaged(comm, pieces, x, g):
    def mean(dW):
        return comm.reduce_scatter(dW, op="mean")

    return run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i]), reduce=mean
    )


def all_reduced_then_cut(comm, pieces, x, g):
    def cut(dW):
        return comm.all_reduce(dW).chunk(comm.size)[comm.rank]

    return run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i]), reduce=cut
    )


def no_mask(comm, pieces, x, g):
    return run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i]), mask=False
    )


def from_last_to_first(comm, pieces, x, g):
    grad, gradients = run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i])
    )
    return grad, gradients[::-1]


def x_summed(comm, pieces, x, g):
    grad, gradients = run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i])
    )
    return comm.all_reduce(grad), gradients


def pieces_only(comm, pieces, x, g):
    return run(comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i]))[1]


def last_layer_forgotten(comm, pieces, x, g):
    grad, gradients = run(
        comm, pieces, x, g, gather=lambda i: comm.all_gather(pieces[i])
    )
    return grad, gradients[:-1]


def never_gathers(comm, pieces, x, g):
    return run(comm, pieces, x, g, gather=lambda i: pieces[i])


def bytes_rounded_up(stage, Psi, N):
    cut = (0, 12, 14, 16)[stage]
    return (16 - cut) * Psi - (-cut * Psi // N)


def always_one_more(stage, Psi, N):
    return held(stage, Psi, N, piece=Psi // N + 1)


def all_is_padded(stage, Psi, N):
    piece = -(-Psi // N)
    return held(stage, piece * N, N, piece=piece)


def all_ranks_together(stage, Psi, N):
    return N * held(stage, Psi, N)


def fp32_numbers_only(stage, Psi, N):
    return held(stage, Psi, N, w=0, g=0)


def fp32_weights_too(stage, Psi, N):
    return held(stage, Psi, N, w=4, g=4)


def always_padded(comm, parameters):
    flat = line(once(parameters))
    flat = torch.nn.functional.pad(flat, (0, comm.size - len(flat) % comm.size))
    return flat.view(comm.size, -1)[comm.rank]


def padded_with_ones(comm, parameters):
    flat = line(once(parameters))
    ones = flat.new_ones(-len(flat) % comm.size)
    return torch.cat([flat, ones]).view(comm.size, -1)[comm.rank]


def each_by_itself(comm, parameters):
    return torch.cat(
        [pieces(w.reshape(-1), comm.size)[comm.rank] for w in once(parameters)]
    )


def column_by_column(comm, parameters):
    turned = [w.T if w.dim() == 2 else w for w in once(parameters)]
    return pieces(line(turned), comm.size)[comm.rank]


def largest_first(comm, parameters):
    by_size = sorted(once(parameters), key=lambda w: -w.numel())
    return pieces(line(by_size), comm.size)[comm.rank]


def found_by_in(comm, parameters):
    kept = []
    for w in parameters:
        if w not in kept:
            kept.append(w)
    return pieces(line(kept), comm.size)[comm.rank]


def cut_and_padded_by_is(comm, parameters):
    """Right: objects by `is`, the piece padded after it is cut."""
    kept = []
    for w in parameters:
        if not any(w is other for other in kept):
            kept.append(w)
    flat = line(kept)
    n = -(-len(flat) // comm.size)
    own = flat[comm.rank * n : (comm.rank + 1) * n]
    return torch.cat([own, own.new_zeros(n - len(own))])


def root_of_the_mean(*args):
    return step(
        *args, norm=lambda comm, g: comm.all_reduce(g.square().sum(), "mean").sqrt()
    )


def norm_before_the_division(comm, weights, m, v, grad, tokens, t, adam):
    total = comm.all_reduce(torch.tensor(float(tokens)))
    return step(
        comm,
        weights,
        m,
        v,
        grad,
        tokens,
        t,
        adam,
        norm=lambda comm, g: comm.all_reduce(g.square().sum()).sqrt() * total,
    )


def each_number_clamped(comm, weights, m, v, grad, tokens, t, adam):
    total = comm.all_reduce(torch.tensor(float(tokens)))
    g = (comm.reduce_scatter(grad) / total).clamp(-adam.clip, adam.clip)
    w = weights.chunk(comm.size)[comm.rank].clone()
    adamw_(w, m, v, g, t, adam)
    return comm.all_gather(w)


def one_step_later(comm, weights, m, v, grad, tokens, t, adam):
    return step(comm, weights, m, v, grad, tokens, t + 1, adam)


def first_piece_everywhere(comm, weights, *rest):
    first = weights.chunk(comm.size)[0]
    return step(comm, first.repeat(comm.size), *rest)


def others_stay_old(comm, weights, *rest):
    own = step(comm, weights, *rest, gather=False)
    out = weights.clone()
    out.chunk(comm.size)[comm.rank].copy_(own)
    return out


def two_sums_in_one(comm, weights, m, v, grad, tokens, t, adam):
    """Right: tokens and squares summed together, in float64."""
    g = comm.reduce_scatter(grad)
    sums = torch.tensor([float(tokens), float(g.double().square().sum())])
    total, squares = comm.all_reduce(sums.double()).tolist()
    g = g / total * min(1.0, adam.clip / (squares**0.5 / total + 1e-6))
    n = len(m)
    w = weights[comm.rank * n :][:n].clone()
    adamw_(w, m, v, g, t, adam)
    return comm.all_gather(w)


def chain(comm, pieces, x, g, *, mask, last_relu=True, made_of_g=False):
    """`mask(i, h)` multiplies g at layer i."""
    n = len(pieces)
    h = [x]
    for i, piece in enumerate(pieces):
        y = h[-1] @ comm.all_gather(piece).T
        h.append(y.relu() if last_relu or i < n - 1 else y)
    out = []
    for i in reversed(range(n)):
        delta = g * mask(i, h)
        out.insert(0, comm.reduce_scatter((g if made_of_g else delta).T @ h[i]))
        g = delta @ comm.all_gather(pieces[i])
    return g, out


def last_mask_missing(comm, pieces, x, g):
    n = len(pieces)
    return chain(
        comm, pieces, x, g, mask=lambda i, h: h[i + 1] > 0 if i < n - 1 else 1.0
    )


def mask_of_the_input(comm, pieces, x, g):
    h = [x]
    for piece in pieces:
        h.append((h[-1] @ comm.all_gather(piece).T).relu())
    out = []
    for i in reversed(range(len(pieces))):
        out.insert(0, comm.reduce_scatter(g.T @ h[i]))
        g = (g @ comm.all_gather(pieces[i])) * (h[i] > 0)
    return g, out


def weights_before_the_mask(comm, pieces, x, g):
    return chain(comm, pieces, x, g, mask=lambda i, h: h[i + 1] > 0, made_of_g=True)


def last_matrix_used_again(comm, pieces, x, g):
    """Right: the last layer's matrix is still there; einsum and where."""
    h = [x]
    for piece in pieces:
        W = comm.all_gather(piece)
        h.append(torch.relu(torch.einsum("bi,oi->bo", h[-1], W)))
    out = [None] * len(pieces)
    for i in reversed(range(len(pieces))):
        if i < len(pieces) - 1:
            W = comm.all_gather(pieces[i])
        delta = torch.where(h[i + 1] > 0, g, 0.0)
        out[i] = comm.reduce_scatter(torch.einsum("bo,bi->oi", delta, h[i]))
        g = delta @ W
    return g, out


def max_for_min(comm, weights, m, v, grad, tokens, t, adam):
    def scale(norm):
        return max(1.0, adam.clip / (float(norm) + 1e-6))

    return step(comm, weights, m, v, grad, tokens, t, adam, scale=scale)


def weights_alone_at_stage_3(stage, Psi, N):
    return 14 * Psi + 2 * -(-Psi // N) if stage == 3 else held(stage, Psi, N)


def largest_tokens(comm, weights, m, v, grad, tokens, t, adam):
    most = comm.all_reduce(torch.tensor(tokens), "max")
    return step(
        comm,
        weights,
        m,
        v,
        grad,
        tokens,
        t,
        adam,
        reduce=lambda comm, grad, n: comm.reduce_scatter(grad) / most,
    )


def x_masked(comm, pieces, x, g):
    g, out = last_matrix_used_again(comm, pieces, x, g)
    return g * (x > 0), out


test_wrong_answers = rejects(
    "05-parallelism/03-zero-and-fsdp",
    [
        Wrong("bytes_per_rank", rounded_down, "round up"),
        Wrong("bytes_per_rank", true_division, "where an int is asked"),
        Wrong("bytes_per_rank", two_fp32_numbers, "32-bit numbers are three"),
        Wrong("bytes_per_rank", fp32_gradients, "kept in 16 bits"),
        Wrong("bytes_per_rank", no_gradients, "are missing"),
        Wrong("bytes_per_rank", no_16_bit_weights, "are missing"),
        Wrong("bytes_per_rank", one_stage_early, "what the next stage holds"),
        Wrong("bytes_per_rank", one_stage_late, "what the stage before holds"),
        Wrong("bytes_per_rank", everything_cut_at_once, "bytes_per_rank(1"),
        Wrong("my_piece", tied_twice, "counted twice"),
        Wrong("my_piece", equal_numbers_merged, "compare by id, not by value"),
        Wrong("my_piece", torch_chunk, "pad with zeros"),
        Wrong("my_piece", padded_in_front, "padding belongs at the end"),
        Wrong("my_piece", every_nth, "every N-th element"),
        Wrong("my_piece", order_of_memory, "order of memory"),
        Wrong("my_piece", where_it_appears_last, "where it appears first"),
        Wrong("my_piece", a_view_of_the_wrong_rank, "another rank's piece"),
        Wrong("my_piece", whole_line, "this is the whole line"),
        Wrong("my_piece", scattered, "something was sent"),
        Wrong("zero_step", mean_of_means, "mean of the ranks' means"),
        Wrong("zero_step", own_tokens, "tokens of this rank"),
        Wrong("zero_step", mean_of_tokens, "mean of the ranks' tokens"),
        Wrong("zero_step", no_division, "divide it by the tokens of all ranks"),
        Wrong("zero_step", averaged_as_well, "as well as over tokens"),
        Wrong("zero_step", own_norm, "norm of its own piece"),
        Wrong("zero_step", sum_of_norms, "norms do not add"),
        Wrong("zero_step", no_root, "root of the summed squares"),
        Wrong("zero_step", mean_of_norms, "mean of the pieces' norms"),
        Wrong("zero_step", largest_norm, "largest of the pieces' norms"),
        Wrong("zero_step", never_clips, "is clipping missing"),
        Wrong("zero_step", always_scales, "one that is smaller stays"),
        Wrong("zero_step", clipped_before_the_sum, "clip the sum"),
        Wrong("zero_step", piece_only, "gather them"),
        Wrong("zero_step", whole_gradient_everywhere, "numbers where"),
        Wrong("zero_step", state_copied, "m did not change"),
        Wrong("zero_step", only_rank_0_reduces, "do not fit together"),
        Wrong("zero_step", old_weights, "weights did not change"),
        Wrong("chain_gradients", matrices_kept, "gather them again"),
        Wrong("chain_gradients", gathered_again_but_all_at_once, "alive at a time"),
        Wrong("chain_gradients", not_reduced, "rank's own gradient"),
        Wrong("chain_gradients", whole_gradients, "is whole"),
        Wrong("chain_gradients", averaged, "mean over ranks"),
        Wrong("chain_gradients", all_reduced_then_cut, "numbers where"),
        Wrong("chain_gradients", no_mask, "mask is missing"),
        Wrong("chain_gradients", from_last_to_first, "first layer to the last"),
        Wrong("chain_gradients", x_summed, "this rank alone"),
        Wrong("chain_gradients", pieces_only, "must return two things"),
        Wrong("chain_gradients", last_layer_forgotten, "3 pieces for 4 layers"),
        Wrong("chain_gradients", never_gathers, "mat1 and mat2"),
        Wrong("bytes_per_rank", bytes_rounded_up, "not bytes"),
        Wrong("bytes_per_rank", always_one_more, "no more than Ψ/N"),
        Wrong("bytes_per_rank", all_is_padded, "needs no padding"),
        Wrong("bytes_per_rank", all_ranks_together, "all N ranks"),
        Wrong("bytes_per_rank", fp32_numbers_only, "alone are counted"),
        Wrong("bytes_per_rank", fp32_weights_too, "weight and gradient have 16 bits"),
        Wrong("my_piece", always_padded, "needs no padding"),
        Wrong("my_piece", padded_with_ones, "is of zeros"),
        Wrong("my_piece", each_by_itself, "join them first"),
        Wrong("my_piece", column_by_column, "column by column"),
        Wrong("my_piece", largest_first, "another order"),
        Wrong("my_piece", found_by_in, "compared by their values"),
        Wrong("zero_step", root_of_the_mean, "root of the mean"),
        Wrong("zero_step", norm_before_the_division, "before it is divided"),
        Wrong("zero_step", each_number_clamped, "clamped by itself"),
        Wrong("zero_step", one_step_later, "number t + 1"),
        Wrong("zero_step", first_piece_everywhere, "stepped the first piece"),
        Wrong("zero_step", others_stay_old, "gather the others"),
        Wrong("chain_gradients", last_mask_missing, "at the last layer"),
        Wrong("chain_gradients", mask_of_the_input, "its output's"),
        Wrong("chain_gradients", weights_before_the_mask, "not of g_{i+1}"),
        Wrong("zero_step", max_for_min, "max for min"),
        Wrong("bytes_per_rank", weights_alone_at_stage_3, "cuts the weights as well"),
        Wrong("zero_step", largest_tokens, "the largest of the ranks' tokens"),
        Wrong("chain_gradients", x_masked, "through no relu"),
    ],
)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("my_piece", cut_and_padded_by_is),
        ("zero_step", two_sums_in_one),
        ("chain_gradients", last_matrix_used_again),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)
