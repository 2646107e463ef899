"""What marks the exercises of 05-parallelism/06-sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmlab.checks.operations import Operations
from llmlab.checks.parallelism.ranks import Received, at_most, on_ranks
from llmlab.checks.parallelism.sequence.ring import check_ring
from llmlab.course.grading.checking import Checks, Mistake, diagnose, expect
from llmlab.parallelism.sequence import LAYOUTS, GPTShape, attend, layer_bytes, shards
from llmlab.parallelism.sequence import merge as reference

check = Checks("05-parallelism/06-sequence")


@check.exercise(
    points=2,
    minutes=15,
    difficulty=2,
    importance=5,
    hints=(
        (
            "Each piece has divided by its own sum of exponentials, e^ℓ. Multiply it"
            " back, add the two, divide by the sum of both."
        ),
        (
            "ℓ = log(e^ℓ_a + e^ℓ_b) is `torch.logaddexp`; the weights of the two"
            " outputs are e^(ℓ_a − ℓ) and e^(ℓ_b − ℓ)."
        ),
        (
            "Where both are −∞, ℓ_a − ℓ is −∞ + ∞ = NaN. Take 0 away there instead of"
            " ℓ: `torch.where(lse == -torch.inf, 0.0, lse)`."
        ),
    ),
    grads={"o_a": 0, "l_a": 1, "o_b": 2, "l_b": 3},
)
def merge(answer):
    """Two pieces of attention over different keys, as one."""
    T, D = 6, 4
    # pieces in which every query saw a key: here gradients are looked at, too
    for size in (0, 300, -300):
        a, b = ((torch.randn(1, 2, T, D), size + torch.randn(1, 2, T)) for _ in "ab")
        o, lse = _merged(answer, a, b)
        _merge_finite(o, lse, size=size)
        _merge_values(o, lse, a, b)
    q, k, v = (torch.randn(1, 2, n, D) for n in (T, 9, 9))
    for scale in (1.0, 60.0):
        # the first queries see little of b, the last ones everything
        late = torch.tensor([0, 0, 1, 5, 6, 6])
        a = attend(
            q * scale, k[:, :, :4], v[:, :, :4], late - 1, torch.tensor([0, 0, 2, 3])
        )
        b = attend(
            q * scale, k[:, :, 4:], v[:, :, 4:], late, torch.tensor([1, 1, 4, 5, 6])
        )
        o, lse = _merged(answer, a, b)
        _merge_finite(o, lse, blind=2, size=scale - 1)
        _merge_values(o, lse, a, b)


def _merged(answer, a: tuple, b: tuple) -> tuple[Tensor, Tensor]:
    """The answer's output and log-sum-exp of two pieces."""
    what = "merge(o_a, l_a, o_b, l_b)"
    got = answer(*a, *b)
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Mistake(f"{what} must return two tensors, the output and its log-sum-exp")
    wanted = {"the merged output": a[0].shape, "the merged log-sum-exp": a[1].shape}
    for x, (name, shape) in zip(got, wanted.items(), strict=True):
        expect(x, shape=shape, dtype=torch.float32, finite=False, what=name)
    return tuple(got)


def _merge_finite(o: Tensor, lse: Tensor, size: float, blind: int = 0) -> None:
    """NaN and infinity; `blind` queries, from the first, see neither piece."""
    if o.isnan()[:, :, :blind].any() or lse.isnan()[:, :, :blind].any():
        raise Mistake(
            "NaN where a query sees neither piece: −∞ − (−∞) is NaN; its output is 0"
            " and its log-sum-exp −∞"
        )
    saw = o[:, :, blind:]
    lost = size and not saw.any()  # NaN that was made 0
    lost = lost or lse[:, :, blind:].isinf().any()  # −∞ where a key was seen
    if not o.isfinite().all() or lse.isnan().any() or lost:
        cure = "check −∞"
        if size:
            verb = "overflows" if size > 0 else "vanishes"
            cure = (
                f"e^ℓ {verb} when ℓ is in the hundreds: only ever take e^ of a"
                " difference"
            )
        raise Mistake(f"the merged piece holds NaN or infinity: {cure}")
    if lse[:, :, :blind].isfinite().any():
        raise Mistake(
            "the log-sum-exp of a query that sees neither piece is"
            f" {lse[0, 0, 0].item():g}, a finite number: it must stay −∞, or the next"
            " merge takes it for a key"
        )


def _merge_values(o: Tensor, lse: Tensor, a: tuple, b: tuple) -> None:
    o_a, l_a = a
    o_b, l_b = b
    right_o, right_l = reference(*a, *b)
    swapped, _ = reference(o_b, l_a, o_a, l_b)
    top = torch.maximum(l_a, l_b)
    unshared = [(o * (x - top).exp()[..., None]) for o, x in ((o_a, l_a), (o_b, l_b))]
    base_2 = [
        (o * 2 ** (x - torch.logaddexp2(l_a, l_b))[..., None])
        for o, x in ((o_a, l_a), (o_b, l_b))
    ]
    diagnose(
        o,
        right=right_o,
        mistakes={
            "the two outputs were added: each is an average already, so weigh them": (
                o_a + o_b
            ),
            (
                "the two outputs count half each: a piece counts as much as its sum of"
                " exponentials, e^ℓ"
            ): (o_a + o_b) / 2,
            "the weights are swapped: a's output was weighed with b's log-sum-exp": (
                swapped
            ),
            "the weights are those of ℓ, not of e^ℓ": (
                (l_a[..., None] * o_a + l_b[..., None] * o_b) / (l_a + l_b)[..., None]
            ),
            (
                "the weights do not add up to one: after e^(ℓ − the larger ℓ), divide"
                " by the sum of both"
            ): sum(unshared),
            "the weights are powers of 2: ℓ is a natural logarithm": sum(base_2),
            "the first piece was kept and the second dropped": o_a,
            "the second piece replaced the first": o_b,
            "the larger piece was kept and the other dropped": torch.where(
                (l_a > l_b)[..., None], o_a, o_b
            ),
        },
        tol=1e-4,
        what="the merged output",
    )
    diagnose(
        lse,
        right=right_l,
        mistakes={
            "the log-sum-exps were added: that is the log of a product": l_a + l_b,
            "the larger of the two log-sum-exps is not that of the sum": torch.maximum(
                l_a, l_b
            ),
            "this is the sum of exponentials; its logarithm is asked": right_l.exp(),
            (
                "the first piece's log-sum-exp comes back: the next merge would weigh"
                " the result too lightly"
            ): l_a,
        },
        tol=1e-4,
        what="the merged log-sum-exp",
    )


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "A late token looks at many, an early one at few. What must a rank that has"
            " the earliest piece get as its second?"
        ),
        "The mirror of piece r among pieces 0 … 2p − 1 is piece 2p − 1 − r.",
        (
            "pieces = torch.arange(T).tensor_split(2 * p); then `torch.cat` of"
            " pieces[rank] and pieces[2 * p - 1 - rank]."
        ),
    ),
)
def zigzag(answer):
    """The positions of one rank's tokens under the zigzag cut."""
    for T, p in ((24, 3), (16, 2), (29, 4), (9, 1), (13, 6)):
        positions = torch.arange(T)
        pieces = positions.tensor_split(2 * p)
        cut = shards(T, p, "zigzag")
        for rank in range(p):
            what = f"zigzag(T={T}, p={p}, rank={rank})"
            got = expect(answer(T, p, rank), shape=(None,), what=what)
            if got.is_floating_point():
                raise Mistake(f"{what} holds floats; positions are integers")
            mirror = 2 * p - 1 - rank
            off = pieces[(2 * p - rank) % (2 * p)]
            diagnose(
                got,
                right=cut[rank],
                mistakes={
                    (
                        "this is the contiguous cut: the last rank would have the most"
                        " to do"
                    ): shards(T, p, LAYOUTS[0])[rank],
                    "this is the striped cut, every p-th token": shards(
                        T, p, "striped"
                    )[rank],
                    (
                        "the second piece is p pieces further on: then late ranks have"
                        " two late pieces"
                    ): torch.cat([pieces[rank], pieces[rank + p]]),
                    (
                        "the second piece is one too far: the pieces are numbered 0 …"
                        " 2p − 1"
                    ): torch.cat([pieces[rank], off]),
                    "the two pieces are in the wrong order: the earlier tokens first": (
                        torch.cat([pieces[mirror], pieces[rank]])
                    ),
                    (
                        "the second piece is one too near: the mirror of piece r is"
                        " 2p − 1 − r"
                    ): torch.cat([pieces[rank], pieces[(mirror - 1) % (2 * p)]]),
                    (
                        "the line is cut into p pieces; it is 2p, each half as long"
                    ): _pair(positions.tensor_split(p), rank),
                    (
                        "these are the pieces of `chunk`, all rounded up: the lengths"
                        " are to differ by one at most (`tensor_split`)"
                    ): _pair(positions.chunk(2 * p), rank),
                    (
                        "all pieces have ⌊T/2p⌋ tokens: those that are left over"
                        " belong to nobody"
                    ): _pair(positions[: T - T % (2 * p)].tensor_split(2 * p), rank),
                    (
                        "the second piece is the first one's mirror image among the"
                        " tokens; take the mirror among the pieces: they need not be"
                        " equally long"
                    ): torch.cat([pieces[rank], (T - 1 - pieces[rank]).flip(0)]),
                    (
                        "each half was cut by itself: cut all T positions into 2p"
                        " pieces at once"
                    ): torch.cat(
                        [
                            positions[: T // 2].tensor_split(p)[rank],
                            positions[T // 2 :].tensor_split(p)[p - 1 - rank],
                        ]
                    ),
                    "the ranks are numbered the other way round: rank 0 is the first": (
                        _pair(pieces, p - 1 - rank)
                    ),
                    "one of the two pieces is missing": pieces[rank],
                    "the late piece runs backwards": torch.cat(
                        [pieces[rank], pieces[mirror].flip(0)]
                    ),
                },
                what=what,
            )


def _pair(pieces: Sequence[Tensor], rank: int) -> Tensor:
    """A piece from the front and one from the back; empty where there is none."""
    if rank >= len(pieces):
        return torch.empty(0, dtype=torch.long)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


@check.exercise(
    points=2,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "Add up, in units of sbh bytes, what is inside the split regions and what"
            " is outside. Which of it does t divide?"
        ),
        (
            "Outside, 10: two norms' inputs (4), the inputs of the first products (4),"
            " two dropout masks (2). Inside, 24, and the scores 5as/h."
        ),
        (
            "sbh · (10/t or 10 + 24/t + 5as/(ht)); selective recomputation drops the"
            " last term, and nothing else."
        ),
    ),
)
def layer_memory(answer):
    """Bytes that one GPT layer keeps on each tensor-parallel rank."""
    for shape, t in (
        (GPTShape(2048, 1, 12288, 96), 8),
        (GPTShape(1024, 3, 2048, 32), 4),
        (GPTShape(512, 2, 1024, 8), 1),
    ):
        s, b, h, a = shape.s, shape.b, shape.h, shape.a
        for cut in (False, True):
            for selective in (False, True):
                what = (
                    f"layer_memory(s={s}, b={b}, h={h}, a={a}, t={t},"
                    f" sequence_parallel={cut}, selective={selective})"
                )
                got = expect(
                    answer(s, b, h, a, t, cut, selective), kind=(int, float), what=what
                )
                kind = "selective" if selective else "none"
                right = layer_bytes(shape, t, sequence_parallel=cut, recompute=kind)
                mistakes = _memory_mistakes(shape, t, cut, selective, right)
                diagnose(
                    float(got),
                    right=float(right),
                    mistakes={m: float(x) for m, x in mistakes.items()},
                    tol=1e-9,
                    what=what,
                )


def _memory_mistakes(
    shape: GPTShape, t: int, cut: bool, selective: bool, right: float
) -> dict[str, float]:
    """Diagnosis → the bytes that this mistake leads to."""
    s, b, h = shape.s, shape.b, shape.h
    sbh = s * b * h
    scores = 5 * shape.a * s / h
    kept = 0.0 if selective else scores
    outside = 10 / (t if cut else 1)
    return {
        (
            "t divides the 34 also without sequence parallelism: 10 of it"
            " are outside of the split regions"
        ): sbh * (34 + kept) / t,
        "nothing is divided by t": sbh * (34 + kept),
        "the scores are not divided by t: a rank has a/t heads": (
            sbh * (outside + 24 / t + kept)
        ),
        "sequence parallelism divides the 10, too": (sbh * (10 + 24 / t + kept / t)),
        ("the scores are still there: selective recomputation forgets them"): sbh
        * (outside + 24 / t + scores / t),
        (
            "Q, K and V (6 of the 34) were dropped as well: they are what"
            " the scores are computed from again"
        ): right - 6 * sbh / t,
        ("these are elements, or every element counts one byte; it has two"): right / 2,
        (
            "the scores are there with selective recomputation, and gone"
            " without: it is what forgets them"
        ): sbh * (outside + 24 / t + (scores - kept) / t),
        "sequence parallelism is on where it is to be off": (
            sbh * (10 / (1 if cut else t) + 24 / t + kept / t)
        ),
        "10 and 24 are exchanged: 24 is inside the split regions": (
            sbh * (24 / (t if cut else 1) + 10 / t + kept / t)
        ),
        "sequence parallelism divides the 10 by t; it does not take it away": (
            right - (sbh * outside if cut else 0)
        ),
        "the scores are divided by t already, with sequence parallelism too": (
            sbh * (outside + 24 / t + kept / t / (t if cut else 1))
        ),
        "the scores count b twice: they are 5as²b bytes": (
            sbh * (outside + 24 / t + b * kept / t)
        ),
        "these are the bytes of all t ranks together; one is asked": (right * t),
        (
            "what is inside the split regions is divided by t already:"
            " sequence parallelism divides only the 10"
        ): sbh * (10 + 24 / t + kept / t) / (t if cut else 1),
        (
            "a part of the scores is still there: selective recomputation"
            " forgets them, dropout included"
        ): right + sbh * (scores / 5 if selective else 0) / t,
        "this is full recomputation: selective forgets the scores only": (2 * sbh),
        "the scores grow with s²: a factor s is missing": (
            sbh * (outside + 24 / t + kept / s / t)
        ),
    }


@check.exercise(
    points=4,
    minutes=30,
    difficulty=4,
    importance=5,
    hints=(
        (
            "Loop over p steps. In step s this rank holds the keys of rank (rank − s)"
            " mod p: hand on what you have, not your own again."
        ),
        (
            "`attend` gives one step's piece; `merge` adds it. Start with an output of"
            " zeros and a log-sum-exp of −∞, or with your own piece. The positions of"
            " the keys are cut[(rank − s) % p]."
        ),
        (
            "kv = comm.sendrecv(kv, (rank + 1) % p, (rank − 1) % p) after each step but"
            " the last, with kv = torch.stack([k, v])."
        ),
    ),
)
def ring_attention(answer):
    """Challenge: exact causal attention round a ring, with p − 1 hops."""
    shuffled = [torch.tensor(c) for c in ([7, 0, 10, 5], [3, 11, 1, 8], [9, 2, 6, 4])]
    for cut in (
        shuffled,
        shards(8, 2, "contiguous"),
        shards(14, 3, "zigzag"),
        shards(15, 5, "zigzag"),
        shards(5, 1, "contiguous"),
    ):
        _check_ring_run(answer, cut)


def _check_ring_run(answer, cut: list[Tensor]) -> None:
    B, H, K, D = 2, 4, 2, 6
    p = len(cut)
    T = sum(map(len, cut))
    q = torch.randn(B, H, T, D)
    k = torch.randn(B, K, T, D)
    v = torch.randn(B, K, T, D)
    kept = [0] * p
    made: list[set[tuple[int, ...]]] = [set() for _ in cut]

    def fn(comm):
        tokens = cut[comm.rank]
        local = [t[:, :, tokens].clone() for t in (q, k, v)]
        watched = Received(comm, "sendrecv", "recv")
        with Operations() as seen:
            got = answer(watched, *local, cut)
        kept[comm.rank] = watched.most_numbers
        made[comm.rank] = {shape for _, shape in seen.done}
        return got

    results, ledger = on_ranks(p, fn)
    names = [f"ring_attention(...) on rank {r} of {p}" for r in range(p)]
    for got, tokens, what in zip(results, cut, names, strict=True):
        shape = (B, H, len(tokens), D)
        expect(got, shape=shape, dtype=torch.float32, finite=False, what=what)
        if got.isnan().any():
            raise Mistake(
                f"{what} holds NaN: is a piece in which no query sees a key merged"
                " with another such piece?"
            )
    # from the last rank on: nobody comes after it, so that a rank that skips the later
    # ones is not taken for one that looks at its own keys alone
    for r in reversed(range(p)):
        check_ring(results[r], (q, k, v), cut, r, names[r])
    gathers = ("all_gather", "broadcast", "all_to_all")
    longest = max(map(len, cut))
    shard = 2 * B * K * longest * D
    # with few ranks, what is being sent and what comes are all there is
    joined = any(T in shape[-2:-1] for shapes in made for shape in shapes)
    together = p > 3 and (joined or max(kept) >= (p - 1) * shard)
    if together or (p > 1 and any(ledger.count(op) for op in gathers)):
        raise Mistake(
            "the values are right, but a rank holds all keys at once: hand them"
            " round the ring with sendrecv, and let a piece go when it is merged"
        )
    at_most(ledger, (p - 1) * shard, "p − 1 hops are enough, and the queries stay home")
