"""Other functions in the engine's places: right ones serve, wrong ones are named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from llmlab.inference import continuous_batching, sampling_and_speculation
from llmlab.inference import paged_attention as paged
from llmlab.inference.continuous_batching import Plan
from llmlab.inference.engine import PieceError, Pieces, SamplingParams
from llmlab.models import generation
from tests.inference.engine.models import make, plain, small

MODEL = make()
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4], [3, 1, 4, 1, 5, 9, 2, 6, 7], [1, 1, 1]]
GREEDY = SamplingParams(max_new_tokens=6)


def by_blocks(q, keys, values, tables, lengths):
    return paged.paged_attention_by_blocks(q, keys, values, tables, lengths)


def never_finds(pool, tokens):
    return [paged.take(pool) for _ in range(-(-len(tokens) // pool.block_size))], 0


def one_at_a_time(running, waiting, available, limits):
    """Only the oldest request gets tokens."""
    jobs = [*running, *waiting][:1]
    count = min(jobs[0].left, limits.max_tokens)
    admitted = [] if running else [jobs[0].id]
    return Plan({jobs[0].id: count}, admitted)


@pytest.mark.parametrize(
    "pieces",
    [
        {"paged_attention": by_blocks},
        {"paged_attention": paged.paged_attention},
        {"allocate": never_finds},
        {"schedule": one_at_a_time},
        {"lookup": lambda tokens, count, longest: tokens[:count]},
        {"lookup": lambda tokens, count, longest: []},
    ],
    ids=lambda pieces: next(iter(pieces.items()))[0],
)
def test_other_right_functions_serve(pieces):
    engine = small(MODEL, pieces=Pieces(**pieces), gamma=2)
    for _ in range(2):
        assert engine.generate(PROMPTS, GREEDY) == [plain(MODEL, p, 6) for p in PROMPTS]
    engine.check()
    assert engine.blocks_in_use == 0


def without_notebook(lesson: str) -> dict:
    """The functions of a solution, without its checks."""
    file = Path(__file__).parents[3] / "solutions" / "07-inference" / f"{lesson}.py"
    source = file.read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if not line.startswith("check.")]
    spec = importlib.util.spec_from_loader("solution", None)
    module = importlib.util.module_from_spec(spec)
    exec(compile("\n".join(lines), file.name, "exec"), module.__dict__)
    return vars(module)


def test_the_solutions_of_the_lessons_serve():
    blocks = without_notebook("03-paged-attention")
    tokens = without_notebook("05-sampling-and-speculation")
    names = ("allocate", "append_slot", "free", "paged_attention")
    own = {name: blocks[name] for name in names}
    own |= {name: tokens[name] for name in ("keep_top_p", "accept", "lookup")}
    engine = small(MODEL, pieces=Pieces(**own), gamma=2, num_blocks=10)
    assert engine.generate(PROMPTS, GREEDY) == [plain(MODEL, p, 6) for p in PROMPTS]
    drawn = SamplingParams(max_new_tokens=6, temperature=1.0, top_p=0.8, seed=1)
    assert engine.generate(PROMPTS, drawn) == small(
        MODEL, gamma=2, num_blocks=10
    ).generate(PROMPTS, drawn)


# Wrong ones ---------------------------------------------------------------------------


def raises(*arguments):
    raise KeyError("x")


def shifted(change):
    """`allocate`, and then `change` of its table, its number, and the pool."""

    def allocate(pool, tokens):
        table, found = paged.allocate(pool, tokens)
        return change(pool, table, found)

    return allocate


def slot(change):
    def append_slot(pool, table, length):
        copy = paged.append_slot(pool, table, length)
        return change(pool, table, copy)

    return append_slot


def in_place(pool, table, length):
    """Never takes a block."""


def taken_for_good(pool, table):
    """Counts nothing down."""
    return []


def back_too_early(pool, table):
    """Blocks that others still read are given away, too."""
    paged.free(pool, table)
    pool.available.extend(b for b in table if b not in pool.available)
    return list(table)


def meddles(pool, table):
    again = paged.free(pool, table)
    if len(pool.available) < len(pool.counts):
        used = next(b for b, count in enumerate(pool.counts) if count)
        pool.counts[used] += 1
    return again


def planning(change):
    def schedule(running, waiting, available, limits):
        plan = continuous_batching.schedule(running, waiting, available, limits)
        return change(plan, running, waiting)

    return schedule


def all_of_it(plan, running, waiting):
    everybody = {job.id: job.left for job in (*running, *waiting)}
    return Plan(everybody, [job.id for job in waiting])


WRONG = [
    ("allocate", raises, r"raised KeyError: 'x'"),
    ("allocate", lambda pool, tokens: None, "gave None"),
    ("allocate", shifted(lambda _, t, f: (t[:-1], f)), "3 blocks are due"),
    ("allocate", shifted(lambda _, t, f: ([*t[:-1], 60], f)), "gave block 60"),
    ("allocate", shifted(lambda _, t, f: ([*t[:-1], -1], f)), "gave block -1"),
    ("allocate", shifted(lambda _, t, f: ([*t[:-1], t[0]], f)), "stands in it twice"),
    ("allocate", shifted(lambda _, t, f: (t, 4)), "it is another's"),
    ("allocate", shifted(lambda _, t, f: (t, 3)), "a multiple of 4"),
    ("allocate", shifted(lambda _, t, f: (t, len(t) * 4)), "a multiple of 4"),
    (
        "allocate",
        shifted(lambda p, t, f: (p.available.append(t[0]), (t, f))[1]),
        "available while they are in use",
    ),
    ("append_slot", raises, "raised KeyError"),
    ("append_slot", in_place, "blocks are due"),
    ("append_slot", slot(lambda p, t, c: t.reverse()), "of the table|and the table"),
    ("append_slot", slot(lambda p, t, c: (0, 1)), r"gave \(0, 1\)"),
    ("free", raises, "raised KeyError"),
    ("free", taken_for_good, "left block"),
    ("free", lambda pool, table: paged.free(pool, table)[:-1], "available again are"),
    ("paged_attention", raises, "raised KeyError"),
    ("paged_attention", lambda q, *_: q[:, :1], "it must be"),
    ("paged_attention", lambda q, *_: q * torch.nan, "not finite"),
    ("paged_attention", lambda q, *_: None, "gave None"),
    ("schedule", raises, "raised KeyError"),
    ("schedule", lambda *_: {}, "a Plan is due"),
    ("schedule", lambda *_: Plan(), "nobody gets a token"),
    ("schedule", planning(all_of_it), "more than max_tokens=14"),
    ("schedule", planning(lambda p, r, w: Plan({7: 1})), r"no request \[7\]"),
    ("schedule", planning(lambda p, r, w: Plan({0: 1})), "only then"),
    ("schedule", planning(lambda p, r, w: Plan({0: 99}, [0])), "has 12 left"),
    ("schedule", planning(lambda p, r, w: Plan({0: 0}, [0])), "gets 0 tokens"),
    ("schedule", planning(lambda p, r, w: Plan({}, [], [0])), "must be running"),
    ("lookup", raises, "raised KeyError"),
    ("lookup", lambda tokens, count, longest: tokens[-1:] * 5, "gave 5 tokens"),
    ("lookup", lambda tokens, count, longest: [30], "tokens of the text"),
    ("accept", raises, "raised KeyError"),
    ("accept", lambda p, q, drafted, u: drafted, "a beginning of"),
    ("accept", lambda p, q, drafted, u: [31], "a beginning of"),
    ("accept", lambda p, q, drafted, u: None, "gave None"),
    ("accept", lambda p, q, drafted, u: [*[0 for _ in drafted], 1], "a beginning of"),
    ("keep_top_p", raises, "raised KeyError"),
    ("keep_top_p", lambda logits, p: logits - torch.inf, "no token that can be"),
    ("keep_top_k", lambda logits, k: logits[:, :k], "gave tensor"),
]


@pytest.mark.parametrize(
    ("piece", "function", "said"), WRONG, ids=[f"{w[0]}-{w[2]}" for w in WRONG]
)
def test_a_wrong_piece_is_named_and_corrupts_nothing(piece, function, said):
    engine = small(
        MODEL, pieces=Pieces(**{piece: function}), gamma=2, max_tokens=14, num_blocks=59
    )
    params = SamplingParams(
        max_new_tokens=6, temperature=1.0, top_p=0.9, top_k=9, seed=0
    )
    told = 0
    for prompt in PROMPTS:
        engine.add(prompt, params)
    with pytest.raises(PieceError, match=said) as caught:
        while not engine.idle:
            told += len(engine.step())
    assert caught.value.piece == piece
    assert f"the piece {piece!r}" in str(caught.value)
    # all requests wait, and nothing that was not told has been written
    engine.check()
    assert engine.blocks_in_use == 0
    assert not engine.running
    written = sum(len(request.written) for request in engine.waiting)
    ended = 3 - len(engine.waiting)
    assert written + 6 * ended == told
    for id in range(3):
        engine.abort(id)
    assert engine.idle


@pytest.mark.parametrize("free", [back_too_early, meddles])
def test_what_no_call_shows_the_invariants_do(free):
    engine = small(MODEL, pieces=Pieces(free=free))
    engine.add(PROMPTS[0], SamplingParams(max_new_tokens=1))
    engine.step()
    engine.add(PROMPTS[0], SamplingParams(max_new_tokens=9))
    engine.add(PROMPTS[1], SamplingParams(max_new_tokens=2))
    with pytest.raises(PieceError, match="'free'"):
        while not engine.idle:
            engine.step()
    engine.check()


def test_after_an_error_the_text_goes_on_where_it_was():
    """A piece that fails once: the same tokens, none twice and none missing."""
    calls = []

    def fails_once(q, *rest):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("once")
        return paged.paged_attention(q, *rest)

    engine = small(MODEL, pieces=Pieces(paged_attention=fails_once), gamma=2)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    written = {id: [] for id in range(3)}
    failed = 0
    while not engine.idle:
        try:
            events = engine.step()
        except PieceError:
            failed += 1
            continue
        for event in events:
            written[event.id].append(event.token)
    assert failed == 1
    assert list(written.values()) == [plain(MODEL, p, 6) for p in PROMPTS]


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="schedule=3 must be a function"):
        Pieces(schedule=3)


def test_which_are_replaced_is_known():
    assert Pieces().replaced == []
    pieces = Pieces(accept=raises, keep_top_p=generation.keep_top_p)
    assert pieces.replaced == ["accept"]
    assert Pieces().accept is sampling_and_speculation.accept
