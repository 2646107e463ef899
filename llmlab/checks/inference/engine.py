"""Checks of 07-inference/08-engine.

A split and a plan are compared with what usual mistakes give. A weight map is used: a
random checkpoint goes through it, and the logits tell. A scheduler serves traces in
virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from numbers import Integral
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.checks.judging import first_difference
from llmlab.course.grading.checking import Checks, Mistake, expect
from llmlab.inference import engine
from llmlab.inference.continuous_batching import Job, Limits, Plan, challenge
from llmlab.inference.engine import Row, weight_maps
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import preset

check = Checks("07-inference/08-engine")


def judge(
    found: list,
    right: Callable,
    mistakes: Mapping[str, Callable],
    cases: list,
    what: str,
    show: Callable[[tuple], str] | None = None,
    why: Callable[[tuple, object, object], str] = lambda case, mine, its: "",
) -> None:
    """Compare what an answer gives in all cases with the right and the wrong ways.

    Args:
        show: a case in words.
        why: what is wrong with the first result that differs, where that can be seen.
    """
    wanted = [right(*case) for case in cases]
    n = first_difference(
        found, wanted, mistakes, lambda wrong: [wrong(*case) for case in cases], same
    )
    if n is None:
        return
    if words := why(cases[n], found[n], wanted[n]):
        raise Mistake(words)
    where = f"{what} is not right in case {n + 1} of {len(cases)}"
    if show is not None:
        where += f": for {show(cases[n])} it gave {found[n]}"
    raise Mistake(where, foreseen=False)


def same(a: object, b: object) -> bool:
    """Equal, tensors by shape and value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.float(), b.float())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        pairs = zip(a, b, strict=False)
        return len(a) == len(b) and all(same(x, y) for x, y in pairs)
    return a == b


# 1 ------------------------------------------------------------------------------------


def split_cases() -> list[tuple]:
    """Both layouts, weights and biases, groups of 2, 3 and 1, one key head."""
    cases = []
    for H, K, D, d in ((4, 2, 3, 5), (6, 2, 2, 12), (3, 3, 2, 4), (4, 1, 3, 12)):
        rows = (H + 2 * K) * D
        for layout in ("stacked", "grouped"):
            cases.append((torch.randn(rows, d), H, K, layout))
    cases.append((torch.randn(16), 4, 2, "stacked"))
    cases.append((torch.randn(16), 4, 2, "grouped"))
    return cases


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    hints=(
        (
            "There are H + 2K heads in all, of D rows each. That gives D, and nothing"
            " else has to be known of the matrix."
        ),
        (
            "Stacked: `packed.split([H * D, K * D, K * D])`. Grouped: first make the"
            " groups a dimension, `packed.unflatten(0, (K, H // K + 2, D))`."
        ),
        (
            "In a group the last two are k and v: `groups[:, -2]` and `groups[:, -1]`,"
            " each (K, D, …). `.flatten(0, 1)` makes rows of them; q needs"
            " `.flatten(0, 2)`."
        ),
    ),
)
def split_qkv(answer):
    """The weights of q, k and v out of one matrix, in two layouts."""
    cases = split_cases()
    found = []
    for case in cases:
        packed, what = case[0], said(case)
        try:
            parts = answer(*case)
        except NotImplementedError:
            raise
        except IndexError as error:
            if packed.dim() > 1:
                raise
            raise Mistake(f"{what} of a bias, which has rows alone: {error}") from None
        except RuntimeError as error:
            raise Mistake(f"{what} failed: {error}", foreseen=False) from None
        expect(parts, kind=(list, tuple), what=what)
        if len(parts) != 3:
            raise Mistake(f"{what} gave {len(parts)} things: q, k and v are asked")
        for name, part in zip("qkv", parts, strict=True):
            expect(part, dtype=torch.float32, what=f"{name} of {what}")
        found.append(tuple(parts))
    name = "split_qkv"
    judge(found, engine.split_qkv, wrong_splits(), cases, name, why=why_split)


def said(case: tuple) -> str:
    """'split_qkv(packed, 4, 2, 'stacked')', and of which shape `packed` is."""
    packed, H, K, layout = case
    return f"split_qkv(packed, {H}, {K}, {layout!r}), packed {tuple(packed.shape)},"


def why_split(case: tuple, mine: tuple, its: tuple) -> str:
    """Which shapes are asked, if they are others."""
    for name, part, right in zip("qkv", mine, its, strict=True):
        if part.shape != right.shape:
            return (
                f"{name} of {said(case)} has the shape {tuple(part.shape)}, where"
                f" {tuple(right.shape)} is asked: D is the rows of `packed` / (H + 2K)"
            )
    return ""


def groups_of(packed: Tensor, H: int, K: int) -> Tensor:
    """(K, G + 2, D, …)."""
    return packed.unflatten(0, (K, H // K + 2, -1))


def rows(x: Tensor, like: Tensor) -> Tensor:
    """All dimensions but those of a row in one."""
    return x.reshape(-1, *like.shape[1:])


def split_with(
    stacked: Callable | None = None, grouped: Callable | None = None
) -> Callable:
    """`split_qkv`, one of its layouts another way."""

    def way(packed: Tensor, H: int, K: int, layout: str) -> tuple:
        own = {"stacked": stacked, "grouped": grouped}[layout]
        if own is None:
            return engine.split_qkv(packed, H, K, layout)
        return tuple(own(packed, H, K))

    return way


def order(first: int, second: int, third: int, layout: str) -> Callable:
    """The right parts, handed over in another order."""

    def way(packed: Tensor, H: int, K: int) -> tuple:
        parts = engine.split_qkv(packed, H, K, layout)
        return parts[first], parts[second], parts[third]

    return way


def parts_in(packed: Tensor, sizes: Sequence[int], places: Sequence[int]) -> tuple:
    """Cut into sizes; part i is what stands at places[i]."""
    parts = packed.split(list(sizes))
    return tuple(parts[i] for i in places)


def thirds(packed: Tensor, H: int, K: int) -> tuple:
    """As if there were as many key heads as query heads."""
    return packed.tensor_split(3)


def keys_first(packed: Tensor, H: int, K: int) -> tuple:
    """k, v, q."""
    D = len(packed) // (H + 2 * K)
    return parts_in(packed, [K * D, K * D, H * D], (2, 0, 1))


def group_front(packed: Tensor, H: int, K: int) -> tuple:
    """k and v in front of their queries."""
    g = groups_of(packed, H, K)
    return rows(g[:, 2:], packed), rows(g[:, 0], packed), rows(g[:, 1], packed)


def channels_inside(packed: Tensor, H: int, K: int) -> tuple:
    """(K, D, G + 2): heads vary faster than channels."""
    g = packed.unflatten(0, (K, -1, H // K + 2)).transpose(1, 2)
    q, k, v = g[:, :-2], g[:, -2], g[:, -1]
    return tuple(rows(x, packed) for x in (q, k, v))


def kinds_outside(packed: Tensor, H: int, K: int) -> tuple:
    """(G + 2, K, D): groups vary faster than what is in them."""
    g = packed.unflatten(0, (H // K + 2, K, -1)).transpose(0, 1)
    q, k, v = g[:, :-2], g[:, -2], g[:, -1]
    return tuple(rows(x, packed) for x in (q, k, v))


def heads_dealt(packed: Tensor, H: int, K: int) -> tuple:
    """q in the order first of each group, second of each group …"""
    g = groups_of(packed, H, K)
    q = g[:, :-2].transpose(0, 1)
    return tuple(rows(x, packed) for x in (q, g[:, -2], g[:, -1]))


def repeated(layout: str) -> Callable:
    """Keys and values once for each query head."""

    def way(packed: Tensor, H: int, K: int) -> tuple:
        q, *pair = engine.split_qkv(packed, H, K, layout)
        heads = [x.unflatten(0, (K, -1)) for x in pair]
        return q, *(rows(x.repeat_interleave(H // K, 0), packed) for x in heads)

    return way


def one_query(packed: Tensor, H: int, K: int) -> tuple:
    """Only the first query of each group."""
    g = groups_of(packed, H, K)
    return tuple(rows(x, packed) for x in (g[:, 0], g[:, -2], g[:, -1]))


def left_as_groups(packed: Tensor, H: int, K: int) -> tuple:
    """Right, but the dimensions are not joined."""
    g = groups_of(packed, H, K)
    return g[:, :-2], g[:, -2], g[:, -1]


def wrong_splits() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    both = engine.split_qkv
    return {
        "stacked: three equal parts are right only where K = H; k and v have K · D"
        " rows": split_with(stacked=thirds),
        "stacked: k and v are exchanged": split_with(stacked=order(0, 2, 1, "stacked")),
        "stacked: the order is q, k, v, not k, v, q": split_with(stacked=keys_first),
        "stacked: k and v are repeated for each query head: a weight keeps its K"
        " heads": split_with(stacked=repeated("stacked")),
        "what is grouped was cut as if it were stacked: look at the layout, and make"
        " groups the first dimension": lambda p, H, K, layout: both(p, H, K, "stacked"),
        "the layout was not looked at: everything was cut as if it were"
        " grouped": lambda p, H, K, layout: both(p, H, K, "grouped"),
        "the two layouts are exchanged": lambda p, H, K, layout: both(
            p, H, K, "grouped" if layout == "stacked" else "stacked"
        ),
        "grouped: k and v are exchanged": split_with(grouped=order(0, 2, 1, "grouped")),
        "grouped: a group ends with its k and v, it does not begin with"
        " them": split_with(grouped=group_front),
        "grouped: (K, D, G + 2) was made; the rows of a head stay together, so (K, G +"
        " 2, D)": split_with(grouped=channels_inside),
        "grouped: (G + 2, K, D) was made; the groups come first, so (K, G + 2,"
        " D)": split_with(grouped=kinds_outside),
        "grouped: the query heads are in the wrong order: all of the first group, then"
        " all of the second": split_with(grouped=heads_dealt),
        "grouped: k and v are repeated for each query head: a weight keeps its K"
        " heads": split_with(grouped=repeated("grouped")),
        "grouped: a group has H / K queries, not one": split_with(grouped=one_query),
        "grouped: the parts still have a dimension for the groups: flatten": split_with(
            grouped=left_as_groups
        ),
    }


# 2 ------------------------------------------------------------------------------------

SECOND = 125696  # the vocabulary by which Baichuan 2 is known
PACK = "model.layers.{}.self_attn.W_pack.weight"


@cache
def baichuan(vocabulary: int) -> tuple[LlamaConfig, dict[str, Tensor], dict]:
    """A small random Baichuan: its shape, the Llama that it is, and its checkpoint."""
    config = LlamaConfig(vocabulary, 8, 12, 2, 2, initializer_range=0.5)
    random = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        names = {name: p.shape for name, p in Llama(config).named_parameters()}
    right = {
        name: torch.randn(shape, generator=random) * 0.5 + float(len(shape) == 1)
        for name, shape in names.items()
    }
    source = dict(right)
    for i in range(2):
        at = f"model.layers.{i}.self_attn."
        parts = [source.pop(f"{at}{x}_proj.weight") for x in "qkv"]
        source[PACK.replace("{}", str(i))] = torch.cat(parts)
    if vocabulary == SECOND:
        right = right | {"lm_head.weight": F.normalize(right["lm_head.weight"])}
    return config, right, source


@check.exercise(
    points=4,
    minutes=20,
    difficulty=3,
    importance=5,
    hints=(
        (
            "Write down which names Baichuan has. All but one are ours already, so"
            " their rows are `Row(name, (name,))`; `weight_maps.same(*names)` makes"
            " several at once."
        ),
        (
            "W_pack is one source with three targets: `Row(source, (q, k, v),"
            " 'stacked')`. For each layer the number is `{}`, in source and targets."
        ),
        (
            "Only the head looks at `raw`: `'unit rows'` where `raw['vocab_size']` is"
            " 125696, else `'copy'`."
        ),
    ),
)
def baichuan_map(answer):
    """A new model: Baichuan's tensors become our Llama's."""
    for vocabulary in (61, SECOND):
        config, right, source = baichuan(vocabulary)
        raw = {"model_type": "baichuan", "vocab_size": vocabulary, "hidden_size": 8}
        found = rows_of(answer(raw))
        named_mistakes(found)
        try:
            _, state = weight_maps.convert(found, source, config)
        except ValueError as error:
            raise Mistake(in_words(str(error))) from None
        for name, tensor in right.items():
            if not torch.allclose(state[name], tensor, atol=1e-6):
                raise Mistake(said_of(name, state[name], right, source, vocabulary))
        ids = torch.tensor([[3, 9, 27, 40, 12]])
        with torch.inference_mode():
            got = weight_maps.as_model(config, state)(ids)
            wanted = weight_maps.as_model(config, dict(right))(ids)
        if not torch.allclose(got, wanted, atol=1e-4):
            raise Mistake("the logits differ from Baichuan's", foreseen=False)
    other = rows_of(answer(raw | {"vocab_size": 130_000}))
    if any(row.source == "lm_head.weight" and row.how != "copy" for row in other):
        raise Mistake(
            "a vocabulary of 130,000 is taken for that of Baichuan 2: only 125,696 is"
        )


def rows_of(value: object) -> list[Row]:
    """The answer as rows, or a mistake that says what it is instead."""
    what = "baichuan_map(raw)"
    expect(value, kind=(list, tuple), what=what, finite=False)
    found = []
    for row in value:
        if not isinstance(row, Row):
            raise Mistake(f"{what} holds {row!r}, where a Row is asked")
        if isinstance(row.targets, str):
            raise Mistake(
                f"the targets of {row.source!r} are a text: ({row.targets!r},) with a"
                " comma is a tuple of one name"
            )
        names = (row.source, row.how, *row.targets)
        if not all(isinstance(name, str) for name in names):
            raise Mistake(f"{what} holds {row!r}: source, targets and how are texts")
        found.append(row)
    if not found:
        raise Mistake(f"{what} is empty: every tensor needs a row")
    return found


def named_mistakes(found: list[Row]) -> None:
    """What can be said from the rows alone."""
    sources = {row.source for row in found}
    if any("layers.0." in row.source for row in found):
        raise Mistake(
            "a row has the number of a layer: write `{}`, and it stands for all of them"
        )
    if any("self_attn.q_proj" in source for source in sources):
        raise Mistake(
            "q_proj, k_proj and v_proj are not in this checkpoint: W_pack holds all"
            " three"
        )
    pack = [row for row in found if row.source == PACK]
    if not pack:
        raise Mistake(f"no row reads {PACK}")
    (row, *_) = pack
    letters = [name.split(".")[-2][0] for name in row.targets if "_proj." in name]
    if sorted(letters) == ["k", "q", "v"] and letters != ["q", "k", "v"]:
        raise Mistake(f"W_pack holds q, k, v in this order, not {', '.join(letters)}")
    if row.how == "grouped":
        raise Mistake("W_pack is stacked: all of q, then all of k, then all of v")
    if row.how in ("halves", "copy", "transpose"):
        raise Mistake(f"W_pack has three parts, and {row.how!r} does not make three")


def in_words(text: str) -> str:
    """What `convert` says; where a layer's name is in it, the pattern is meant."""
    return text.replace("the weight map does not fit: ", "your map does not fit: ")


def said_of(
    name: str, tensor: Tensor, right: dict, source: dict, vocabulary: int
) -> str:
    """What is wrong with one of our tensors."""
    if name == "lm_head.weight" and vocabulary == SECOND:
        if torch.equal(tensor, source[name]):
            return (
                "with a vocabulary of 125,696 it is Baichuan 2: the rows of its head"
                " have unit length"
            )
        if torch.allclose(tensor, F.normalize(source[name], dim=0)):
            return "the columns of the head have unit length: its rows should"
    if name == "lm_head.weight" and torch.allclose(tensor, F.normalize(source[name])):
        return (
            f"with a vocabulary of {vocabulary} it is the first Baichuan, whose head is"
            " as it is stored"
        )
    if torch.allclose(tensor, F.normalize(right[name])) if tensor.dim() > 1 else False:
        return f"{name} has unit rows: only the head of Baichuan 2 does"
    for other, value in right.items():
        if other != name and value.shape == tensor.shape and torch.equal(value, tensor):
            return f"{name} holds what belongs to {other}"
    for other, value in source.items():
        if value.shape == tensor.shape and torch.equal(value, tensor):
            return f"{name} holds {other}"
    return f"{name} is not right: a factor, or another way to make it?"


# 3 ------------------------------------------------------------------------------------


def fit_cases() -> list[tuple]:
    """A GPU and large models, odd sizes at the borders, nothing left."""
    llama = preset("llama-3.1-8b")
    tiny = LlamaConfig(100, 24, 40, 3, 6, num_key_value_heads=2, head_dim=6)
    block = 2 * 3 * 2 * 6 * 4 * 4  # of tiny, in blocks of 4 with 4 bytes
    return [
        (80 * 10**9, 16 * 10**9, 2 * 10**9, llama, 16, 2, 0.92),
        (24 * 10**9, 16 * 10**9, 10**9, llama, 32, 1, 0.9),
        (10 * block, block, block, tiny, 4, 4, 1.0),
        (10 * block - 1, block, block, tiny, 4, 4, 1.0),
        (10 * block, 3 * block, 1, tiny, 4, 4, 0.5),
        (10 * block, 4 * block, block, tiny, 4, 4, 0.5),
        (10 * block, 9 * block, 3 * block, tiny, 4, 4, 0.9),
    ]


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    hints=(
        (
            "Two numbers are needed: how many bytes are left for the cache, and how"
            " many bytes a block has."
        ),
        (
            "Left: memory · utilisation − weights − activations. The share is of the"
            " whole memory, and what it does not cover nobody gets."
        ),
        (
            "A block: 2 (keys and values) · num_hidden_layers · num_key_value_heads ·"
            " head_dim · block_size · value_bytes. Round down, and not below 0."
        ),
    ),
)
def blocks_that_fit(answer):
    """How many blocks of keys and values the memory has room for."""
    cases = fit_cases()
    found = []
    for case in cases:
        value = expect(answer(*case), kind=int, what="blocks_that_fit(…)")
        found.append(int(value))
    name = "blocks_that_fit"
    judge(found, engine.blocks_that_fit, wrong_fits(), cases, name, shown_fit)


def shown_fit(case: tuple) -> str:
    """'memory 80000000000, weights …'."""
    memory, weights, activations, config, block, value, share = case
    return (
        f"memory {memory}, weights {weights}, activations {activations}, utilisation"
        f" {share}, {config.num_hidden_layers} layers, {config.num_attention_heads}"
        f" heads, {config.num_key_value_heads} key heads of {config.head_dim}, blocks"
        f" of {block} tokens with {value} bytes"
    )


def fitting(
    left: Callable = lambda m, w, a, u: int(m * u) - w - a,
    heads: Callable = lambda c: c.num_key_value_heads,
    layers: Callable = lambda c: c.num_hidden_layers,
    kinds: int = 2,
    width: Callable = lambda c: c.head_dim,
    tokens: Callable = lambda b: b,
    value: Callable = lambda v: v,
    end: Callable = lambda left, block: max(0, left // block),
) -> Callable:
    """`blocks_that_fit`, and what comes out with one thing changed."""

    def way(memory, weights, activations, config, b=16, v=2, share=0.9) -> int:
        token = kinds * layers(config) * heads(config) * width(config)
        block = token * tokens(b) * value(v)
        return end(left(memory, weights, activations, share), block)

    return way


def wrong_fits() -> dict[str, Callable]:
    """Diagnosis → a wrong way."""
    return {
        "a block holds keys and values: twice as much": fitting(kinds=1),
        "a block counts all query heads: the cache has num_key_value_heads": fitting(
            heads=lambda c: c.num_attention_heads
        ),
        "a block is that of one layer: it holds its tokens in every layer": fitting(
            layers=lambda c: 1
        ),
        "a head was taken to be hidden_size wide: head_dim": fitting(
            width=lambda c: c.hidden_size
        ),
        "hidden_size numbers were counted for a token: num_key_value_heads ·"
        " head_dim": fitting(heads=lambda c: 1, width=lambda c: c.hidden_size),
        "the weights were taken off twice": fitting(
            left=lambda m, w, a, u: int(m * u) - 2 * w - a
        ),
        "head_dim is a setting of its own: it need not be hidden_size / heads": fitting(
            width=lambda c: c.hidden_size // c.num_attention_heads
        ),
        "these are tokens, not blocks": fitting(tokens=lambda b: 1),
        "numbers were counted as bytes: value_bytes is missing": fitting(
            value=lambda v: 1
        ),
        "value_bytes was taken to be 2: take it from the argument": fitting(
            value=lambda v: 2
        ),
        "block_size was taken to be 16: take it from the argument": fitting(
            tokens=lambda b: 16
        ),
        "the weights were not taken off": fitting(
            left=lambda m, w, a, u: int(m * u) - a
        ),
        "the activations were not taken off": fitting(
            left=lambda m, w, a, u: int(m * u) - w
        ),
        "utilisation was not used": fitting(left=lambda m, w, a, u: m - w - a),
        "utilisation is a share of the whole memory, not of what is left after weights"
        " and activations": fitting(left=lambda m, w, a, u: int((m - w - a) * u)),
        "utilisation was taken to be 0.9: take it from the argument": fitting(
            left=lambda m, w, a, u: int(m * 0.9) - w - a
        ),
        "a block must fit as a whole: round down": fitting(
            end=lambda left, block: max(0, -(-left // block))
        ),
        "below zero there is nothing: 0 blocks": fitting(
            end=lambda left, block: left // block
        ),
        "weights and activations are added to the memory: take them off": fitting(
            left=lambda m, w, a, u: int(m * u) + w + a
        ),
    }


# 4 ------------------------------------------------------------------------------------

# As they were when this file was read: no answer reaches them.
LEAST, BOUND = challenge.LEAST, challenge.BOUND


@check.exercise(
    points=6,
    minutes=45,
    difficulty=5,
    importance=4,
    hints=(
        (
            "Run `challenge.judge(schedule)` and look at `gap` and `preempted`. Long"
            " steps make the gap; what was computed for those who are sent away is"
            " lost."
        ),
        (
            "Start from `schedule(running, [], available, limits)`, which serves those"
            " who run. Then admit as it does, with a condition more, and give a new"
            " prompt only a part per step."
        ),
        (
            "Everyone who runs needs another block before long. Admit only while a few"
            " blocks for each would be left, and keep the tokens of a step far below"
            " max_tokens."
        ),
    ),
)
def winning_schedule(answer):
    """Challenge: more tokens per second, under a bound for the time between tokens."""
    found = score(answer)
    if found.gap > BOUND and found.throughput < LEAST:
        raise Mistake(
            f"{told(found)}. Both must be better. Which steps are long, and who is sent"
            " away?"
        )
    if found.gap > BOUND:
        raise Mistake(
            f"{told(found)}. The throughput is enough; the time between tokens is not:"
            f" at most {1e3 * BOUND:.0f} ms are asked. Which steps are long?"
        )
    if found.throughput < LEAST:
        raise Mistake(
            f"{told(found)}. The time between tokens is short enough; {LEAST:.0f}"
            f" tokens per second are asked, {LEAST - found.throughput:.1f} more"
        )


def seen(jobs: Sequence[Job]) -> list[tuple]:
    """What the jobs say, to be compared."""
    return list(map(attrgetter("computed", "left", "blocks", "own"), jobs))


def score(answer: Callable) -> challenge.Score:
    """What an answer reaches, or a mistake that says which plan cannot be."""

    def rule(running, waiting, available: int, limits: Limits) -> Plan:
        # lists of their own, and limits: what an answer does to them changes nothing
        before = seen(running), seen(waiting)
        plan = answer(list(running), list(waiting), available, replace(limits))
        if before != (seen(running), seen(waiting)):
            raise Mistake("a Job was changed: running and waiting are to be read only")
        if not isinstance(plan, Plan):
            expect(plan, kind=Plan, what="winning_schedule(…)", finite=False)
        kinds = set(map(type, plan.tokens.values()))
        if not all(issubclass(kind, Integral) for kind in kinds):
            raise Mistake("plan.tokens must hold whole numbers")
        return Plan(dict(plan.tokens), list(plan.admitted), list(plan.preempted))

    try:
        return challenge.judge(rule)
    except ValueError as error:
        raise Mistake(f"a plan cannot be carried out: {error}") from None
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Mistake(f"nothing happens any more: {error}") from None


def told(found: challenge.Score) -> str:
    """A score in words."""
    return (
        f"{found.throughput:.1f} tokens per second, 99% of the times between tokens"
        f" within {1e3 * found.gap:.1f} ms, {found.preempted} times a request was sent"
        " away"
    )
