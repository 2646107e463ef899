"""Wrong answers to 07-inference/08-engine, each with its diagnosis."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from llmlab.checks.inference import engine as checks
from llmlab.checks.inference.engine import check
from llmlab.inference import engine
from llmlab.inference.continuous_batching import (
    Plan,
    blocks_needed,
    challenge,
    schedule,
)
from llmlab.inference.engine import Row, weight_maps
from tests.checks.rejecting import Wrong, foreseen, rejects, verdict

SLUG = "07-inference/08-engine"

# Right, written otherwise -------------------------------------------------------------


def split_by_index(packed, heads, kv_heads, layout):
    D = packed.shape[0] // (heads + kv_heads + kv_heads)
    G = heads // kv_heads
    head = torch.arange(heads + 2 * kv_heads)
    if layout == "grouped":
        kind = head % (G + 2)
    else:
        kind = torch.zeros_like(head)
        kind[heads:] = G
        kind[heads + kv_heads :] = G + 1
    kind = kind.repeat_interleave(D)
    return packed[kind < G], packed[kind == G], packed[kind == G + 1]


def split_by_loop(packed, heads, kv_heads, layout):
    D = len(packed) // (heads + 2 * kv_heads)
    blocks = list(packed.split(D))
    q, k, v = [], [], []
    if layout == "stacked":
        q, k = blocks[:heads], blocks[heads : heads + kv_heads]
        v = blocks[heads + kv_heads :]
    while layout == "grouped" and blocks:
        for _ in range(heads // kv_heads):
            q.append(blocks.pop(0))
        k.append(blocks.pop(0))
        v.append(blocks.pop(0))
    return [torch.cat(part) for part in (q, k, v)]


def map_of_parts(raw):
    q, k, v = (f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")
    rows = [
        Row(row.source, row.targets)
        for row in weight_maps.llama_map(raw)
        if row.source not in (q, k, v, "lm_head.weight")
    ]
    how = ["copy", "unit rows"][raw.get("vocab_size") == 125_696]
    rows += [Row("lm_head.weight", ("lm_head.weight",), how)]
    return [*rows, Row(checks.PACK, (q, k, v), "stacked", 1.0)]


def map_written_out(raw):
    rows = tuple(weight_maps.baichuan_map(raw))
    return tuple(row for row in reversed(rows))


def fit_by_loop(memory, weights, activations, config, block_size=16, v=2, share=0.9):
    left = int(share * memory) - weights - activations
    token = config.head_dim * config.num_key_value_heads * 2 * v
    per_block = token * config.num_hidden_layers * block_size
    return left // per_block if left > 0 else 0


def fit_with_floats(memory, weights, activations, config, block=16, v=2, share=0.9):
    sizes = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    each = 2 * v * block
    for size in sizes:
        each *= size
    return max(int((int(memory * share) - weights - activations) // each), 0)


def with_reserve(budget, reserve):
    """Fewer tokens in a step, blocks kept for those who run."""

    def rule(running, waiting, available, limits):
        most = max(budget, len(running))
        plan = schedule(running, [], available, replace(limits, max_tokens=most))
        if plan.preempted:
            return plan
        for job in running:
            count = plan.tokens.get(job.id, 0)
            available -= blocks_needed(job, count, limits.block_size)
        left = most - sum(plan.tokens.values())
        for job in waiting:
            count, n = min(job.left, left), len(running) + len(plan.admitted)
            whole = blocks_needed(job, job.left, limits.block_size)
            full = n == limits.max_sequences or count < 1
            if full or whole + reserve * (n + 1) > available:
                break
            plan.tokens[job.id] = count
            plan.admitted.append(job.id)
            available -= blocks_needed(job, count, limits.block_size)
            left -= count
        return plan

    return rule


RIGHT = {
    "split_qkv": (split_by_index, split_by_loop),
    "baichuan_map": (map_of_parts, map_written_out),
    "blocks_that_fit": (fit_by_loop, fit_with_floats),
    "winning_schedule": (with_reserve(32, 5), with_reserve(64, 2)),
}


@pytest.mark.parametrize(
    ("exercise", "place"), [(name, i) for name in RIGHT for i in (0, 1)]
)
def test_right_answers_written_otherwise(exercise, place):
    seeds = (0, 1) if exercise != "winning_schedule" else (0,)
    for seed in seeds:
        result = verdict(check, exercise, RIGHT[exercise][place], seed=seed)
        assert result.outcome == "right", str(result)


# Wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrongs", "cases"),
    [
        (engine.split_qkv, checks.wrong_splits, checks.split_cases),
        (engine.blocks_that_fit, checks.wrong_fits, checks.fit_cases),
    ],
    ids=["split_qkv", "blocks_that_fit"],
)
def test_no_two_mistakes_come_to_the_same(right, wrongs, cases):
    torch.manual_seed(0)
    inputs = cases()
    outcomes = {"right": [right(*case) for case in inputs]}
    outcomes |= {w: [f(*case) for case in inputs] for w, f in wrongs().items()}
    for (a, x), (b, y) in itertools.combinations(outcomes.items(), 2):
        assert not checks.same(x, y), f"{a!r} and {b!r} come to the same"


def split_two(packed, heads, kv_heads, layout):
    return engine.split_qkv(packed, heads, kv_heads, layout)[:2]


def split_for_two(packed, heads, kv_heads, layout):
    return engine.split_qkv(packed, heads, heads // 2, layout)


def split_as_lists(packed, heads, kv_heads, layout):
    return tuple(p.tolist() for p in engine.split_qkv(packed, heads, kv_heads, layout))


def split_by_width(packed, heads, kv_heads, layout):
    """D from the input, and not from the rows."""
    rows = heads + 2 * kv_heads
    D = packed.shape[1] // heads if packed.dim() > 1 else len(packed) // rows
    return packed.split([heads * D, kv_heads * D, kv_heads * D])


def split_by_heads(packed, heads, kv_heads, layout):
    """D = rows / heads."""
    D = len(packed) // heads
    return packed[: heads * D], packed[: kv_heads * D], packed[-kv_heads * D :]


def split_matrices(packed, heads, kv_heads, layout):
    """Of two dimensions, always."""
    d = packed.shape[1]
    return tuple(
        part.reshape(-1, d)
        for part in engine.split_qkv(packed, heads, kv_heads, layout)
    )


def changed(change):
    """Baichuan's map after `change(row, raw)`; None leaves a row out."""

    def answer(raw):
        rows = [change(row, raw) for row in weight_maps.baichuan_map(raw)]
        return [row for row in rows if row is not None]

    return answer


def head(how):
    """Another way to make the head."""
    return changed(lambda r, raw: replace(r, how=how(raw)) if "lm_h" in r.source else r)


def pack(**changes):
    """Another row for W_pack."""
    return changed(
        lambda r, raw: replace(r, **changes) if r.source == checks.PACK else r
    )


def exchanged(a, b):
    """Two targets exchanged."""

    def change(row, raw):
        swap = {a: b, b: a}
        names = []
        for name in row.targets:
            found = next((x for x in swap if x in name), None)
            names.append(name.replace(found, swap[found]) if found else name)
        return replace(row, targets=tuple(names))

    return changed(change)


def map_of_llama(raw):
    return weight_maps.llama_map(raw)


def map_of_one_layer(raw):
    rows = weight_maps.baichuan_map(raw)
    return weight_maps.expanded(rows, 1)


def map_with_text(raw):
    return [Row("model.norm.weight", "model.norm.weight")]


def map_of_tuples(raw):
    return [("model.norm.weight", ("model.norm.weight",))]


def map_of_names(raw):
    return ["model.norm.weight"]


def map_with_bias(raw):
    bias = "model.layers.{}.self_attn.o_proj.bias"
    return [*weight_maps.baichuan_map(raw), Row(bias, (bias,))]


Q, K, V = (f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")
EMBED = "model.embed_tokens.weight"
MAPS = [
    (pack(targets=(K, Q, V)), "in this order, not k, q, v"),
    (pack(targets=(Q, V, K)), "in this order, not q, v, k"),
    (pack(targets=(V, K, Q)), "in this order, not v, k, q"),
    (pack(how="grouped"), "W_pack is stacked"),
    (pack(how="halves"), "does not make three"),
    (pack(how="copy"), "does not make three"),
    (pack(how="split"), "no function is called: split"),
    (pack(factor=0.5), "not right: a factor"),
    (changed(lambda r, raw: None if r.source == checks.PACK else r), "no row reads"),
    (changed(lambda r, raw: None if "norm.w" in r.source else r), "norm.weight"),
    (changed(lambda r, raw: None if "lm_h" in r.source else r), "lm_head.weight"),
    (head(lambda raw: "copy"), "it is Baichuan 2"),
    (head(lambda raw: "unit rows"), "it is the first Baichuan"),
    (
        head(lambda raw: "unit rows" if raw["vocab_size"] > 10**5 else "copy"),
        "a vocabulary of 130,000",
    ),
    (
        head(lambda raw: "copy" if raw["vocab_size"] == 125696 else "unit rows"),
        "it is the first Baichuan",
    ),
    (
        changed(lambda r, raw: replace(r, how="unit rows") if r.source == EMBED else r),
        "only the head of Baichuan 2",
    ),
    (exchanged("gate_proj", "up_proj"), "holds what belongs to"),
    (exchanged("input_layernorm", "post_attention_layernorm"), "holds what belongs to"),
    (map_of_llama, "W_pack holds all three"),
    (map_of_one_layer, "has the number of a layer"),
    (map_with_text, "a comma is a tuple"),
    (map_of_names, "where a Row is asked"),
    (map_of_tuples, "where a Row is asked"),
    (map_with_bias, "o_proj.bias"),
    (lambda raw: None, "returned None"),
    (lambda raw: [], "is empty"),
    (lambda raw: [Row("x", (1,))], "are texts"),
]


def fit_as_float(*case):
    return float(engine.blocks_that_fit(*case))


def fit_in_bits(memory, weights, activations, config, b, v, share):
    return engine.blocks_that_fit(memory, weights, activations, config, b, 8 * v, share)


def short_steps(running, waiting, available, limits):
    most = max(48, len(running))
    return schedule(running, waiting, available, replace(limits, max_tokens=most))


def long_steps_with_reserve(running, waiting, available, limits):
    return with_reserve(512, 3)(running, waiting, available, limits)


def first_come(running, waiting, available, limits):
    return schedule(running, waiting, available, limits)


def never_admits(running, waiting, available, limits):
    return Plan()


def takes_too_much(running, waiting, available, limits):
    return schedule(running, waiting, 10**6, limits)


def over_the_budget(running, waiting, available, limits):
    return schedule(running, waiting, available, replace(limits, max_tokens=10**6))


def widens_the_limits(running, waiting, available, limits):
    object.__setattr__(limits, "max_tokens", 10**6)
    return schedule(running, waiting, available, limits)


def takes_more_blocks(running, waiting, available, limits):
    for job in (*running, *waiting):
        object.__setattr__(job, "blocks", 10**6)
    return schedule(running, waiting, available, limits)


def moves_the_bounds(running, waiting, available, limits):
    before = challenge.LEAST, challenge.BOUND
    challenge.LEAST, challenge.BOUND = 0.0, 10.0
    try:
        return schedule(running, waiting, available, limits)
    finally:
        challenge.LEAST, challenge.BOUND = before


def says_nothing(running, waiting, available, limits):
    schedule(running, waiting, available, limits)


W, S = "winning_schedule", "split_qkv"
test_wrong_answers = rejects(
    SLUG,
    [
        *foreseen(S, checks.wrong_splits()),
        Wrong(S, split_two, "gave 2 things"),
        Wrong(S, split_by_width, "packed (24, 5), failed"),
        Wrong(S, split_by_heads, "has the shape (24, 5), where (12, 5) is asked"),
        Wrong(S, split_matrices, "of a bias, which has rows alone"),
        Wrong(S, split_for_two, "rows"),
        Wrong(S, split_as_lists, "a tensor is asked"),
        *[Wrong("baichuan_map", answer, says) for answer, says in MAPS],
        *foreseen("blocks_that_fit", checks.wrong_fits()),
        Wrong("blocks_that_fit", fit_as_float, "int"),
        Wrong("blocks_that_fit", fit_in_bits, "is not right in case"),
        Wrong(W, first_come, "Both must be better"),
        Wrong(W, short_steps, "tokens per second are asked"),
        Wrong(W, long_steps_with_reserve, "Which steps are long"),
        Wrong(W, never_admits, "nothing happens any more"),
        Wrong(W, takes_too_much, "cannot be carried out"),
        Wrong(W, over_the_budget, "the limit is 512"),
        Wrong(W, widens_the_limits, "the limit is 512"),
        Wrong(W, takes_more_blocks, "a Job was changed"),
        Wrong(W, moves_the_bounds, "Both must be better"),
        Wrong(W, says_nothing, "returned None"),
    ],
    drawing_nothing=[W],
)
