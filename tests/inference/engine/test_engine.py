"""The engine writes what one-by-one generation writes, whatever it does on the way."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from llmlab.compression import kernels
from llmlab.compression import quantization_basics as qb
from llmlab.inference.engine import (
    Engine,
    EngineConfig,
    Event,
    Pieces,
    SamplingParams,
    cache_blocks,
)
from llmlab.models import course_model
from llmlab.models.accounting import kv_cache_bytes
from llmlab.models.generation import keep_top_p
from tests.inference.engine.models import VOCAB, finish, make, plain, small

MODEL = make()
DRAFT = make(1, num_hidden_layers=1)
COMMON = [random.Random(9).randrange(VOCAB) for _ in range(24)]
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


@st.composite
def prompts(draw) -> list[int]:
    """Some begin with the same tokens."""
    return COMMON[: draw(st.integers(0, 24))] + draw(tokens)


requests = st.lists(st.tuples(prompts(), st.integers(1, 12)), min_size=1, max_size=7)


@pytest.mark.parametrize("gamma", [0, 3])
def test_those_who_sample_alike_are_sampled_together(gamma):
    """In one matrix, each with its own seed; what is written is as if it were alone."""
    rows = []

    def spy(logits, p):
        rows.append(len(logits))
        return keep_top_p(logits, p)

    hot = {"max_new_tokens": 9, "temperature": 0.9}
    params = [
        SamplingParams(9),  # with gamma it has several rows
        SamplingParams(**hot, top_p=0.8, seed=1),
        SamplingParams(**hot, top_p=0.8, seed=2),
        SamplingParams(**hot, top_p=0.7, seed=1),
        SamplingParams(**hot, repetition_penalty=1.4, seed=1),
        SamplingParams(**hot, repetition_penalty=1.4, seed=2),
        SamplingParams(**hot, top_p=0.8, seed=3),
    ]
    asked = [[7, 8, 9, 7, 8, 9, 7], *(list(range(i, i + 5)) for i in range(6))]
    engine = small(MODEL, pieces=Pieces(keep_top_p=spy), gamma=gamma)
    written = engine.generate(asked, params)
    if gamma == 0:
        assert rows.count(3) == rows.count(1) == 9 == len(rows) // 2
    for prompt, each, found in zip(asked, params, written, strict=True):
        assert small(MODEL, gamma=gamma).generate([prompt], each) == [found]


def one_by_one(asked) -> list[list[int]]:
    return [plain(MODEL, prompt, count) for prompt, count in asked]


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    asked=requests,
    size=st.sampled_from([1, 3, 4, 16]),
    room=st.integers(0, 40),
    budget=st.sampled_from([1, 5, 17, 256]),
    sequences=st.sampled_from([1, 3, 16]),
    caching=st.booleans(),
    speculation=st.sampled_from([None, "text", "model"]),
    aborted=st.sets(st.integers(0, 6), max_size=2),
    when=st.integers(0, 12),
)
def test_the_same_tokens_as_one_by_one(
    asked, size, room, budget, sequences, caching, speculation, aborted, when
):
    """Chunked, shared, pre-empted, speculated, and while others are aborted."""
    longest = max(len(prompt) + count for prompt, count in asked)
    engine = small(
        MODEL,
        num_blocks=-(-longest // size) + room // size,
        block_size=size,
        max_tokens=budget,
        max_sequences=sequences,
        prefix_caching=caching,
        gamma=3 if speculation else 0,
        draft=DRAFT if speculation == "model" else None,
    )
    for prompt, count in asked:
        engine.add(prompt, SamplingParams(max_new_tokens=count))
    written = {id: [] for id in range(len(asked))}
    for step in range(2000):
        if step == when:
            for id in aborted & set(written):
                engine.abort(id)
        events = engine.step()
        for event in events:
            written[event.id].append(event.token)
        engine.check()
        if engine.idle:
            break
    assert engine.blocks_in_use == 0
    for id, wanted in enumerate(one_by_one(asked)):
        if id in aborted:
            assert written[id] == wanted[: len(written[id])]
        else:
            assert written[id] == wanted


def test_the_course_model_writes_what_it_writes_alone():
    model = course_model.load()
    text = "The people of the United States"
    ids = course_model.load_tokenizer().encode(text).ids
    asked = [ids, ids[:3], [*ids, *ids[:2]]]
    engine = Engine(model, EngineConfig(num_blocks=30, max_tokens=6))
    written = engine.generate(asked, SamplingParams(max_new_tokens=12))
    assert written == [plain(model, prompt, 12) for prompt in asked]


SHAPES = {
    "a key for each query head": {"num_key_value_heads": 6},
    "one key for all": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "an odd width": {"head_dim": 10, "intermediate_size": 37},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_of_llama(shape):
    model = make(2, **SHAPES[shape])
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    asked = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4], COMMON]
    written = small(model, max_tokens=13).generate(
        asked, SamplingParams(max_new_tokens=6)
    )
    assert written == [plain(model, prompt, 6) for prompt in asked]


def test_bfloat16():
    model = make(3).bfloat16()
    engine = small(model)
    assert engine.cache.keys[0].dtype == torch.bfloat16
    written = engine.generate([[1, 2, 3], COMMON], SamplingParams(max_new_tokens=3))
    assert [len(each) for each in written] == [3, 3]


@pytest.mark.skipif(not kernels.available(), reason="no C compiler")
def test_packed_4_bit_weights():
    model = kernels.fast(qb.apply(make(4), qb.QuantConfig(4, group_size=8)))
    asked = [[1, 2, 3], [3, 1, 4, 1, 5, 9, 2, 6], COMMON]
    written = small(model).generate(asked, SamplingParams(max_new_tokens=8))
    assert written == [plain(model, prompt, 8) for prompt in asked]


# Blocks -------------------------------------------------------------------------------


def test_preemption_recomputes_and_writes_the_same():
    asked = [(COMMON[i : i + 6], 18) for i in range(4)]
    engine = small(MODEL, num_blocks=9, prefix_caching=False)
    for prompt, count in asked:
        engine.add(prompt, SamplingParams(max_new_tokens=count))
    written = finish(engine)
    assert engine.stats.preemptions > 0
    assert [written[id] for id in range(4)] == one_by_one(asked)


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_a_shared_prefix_is_computed_once(together):
    prefix = [random.Random(1).randrange(VOCAB) for _ in range(500)]
    asked = [[*prefix, i, i + 1, i + 2] for i in range(5)]
    params = SamplingParams(max_new_tokens=2)
    engine = Engine(MODEL, EngineConfig(num_blocks=80, block_size=16, max_tokens=128))
    if together:
        engine.generate(asked, params)
    else:
        for prompt in asked:
            engine.generate([prompt], params)
    # 31 full blocks of 16 are shared: 496 tokens; the other 7 are each one's own
    stored = 496 + 5 * (503 - 496)
    assert engine.stats.found == 4 * 496
    assert engine.stats.computed == stored + 5  # and the first of two new tokens
    engine.check()


def test_a_block_is_found_as_soon_as_it_is_full():
    """Chunked prefill registers what it has stored; so does decoding."""
    engine = small(MODEL, max_tokens=8)
    engine.add(COMMON[:20], SamplingParams(max_new_tokens=1))
    engine.step()
    assert len(engine.cache.manager.pool.cached) == 2
    engine = small(MODEL)
    engine.add([1, 2], SamplingParams(max_new_tokens=8))
    finish(engine)
    assert len(engine.cache.manager.pool.cached) == (2 + 8 - 1) // 4


def test_rejected_drafts_are_not_found():
    """A full block of drafted tokens is nobody's text."""
    model = make(5)
    engine = small(model, gamma=7, draft=make(6, num_hidden_layers=1))
    for i in range(4):
        engine.add([i, i + 1], SamplingParams(max_new_tokens=12))
    written = finish(engine)
    assert engine.stats.accepted < engine.stats.drafted
    texts = [[i, i + 1, *written[i]] for i in range(4)]
    for text in texts:
        assert small(model).generate([text], None) == engine.generate([text], None)
    # whatever can be found is the beginning of one of the texts
    assert engine.stats.found > 0


def test_the_memory_is_what_the_planner_says():
    for changes in ({}, {"num_key_value_heads": 1, "head_dim": 10}):
        model = make(0, **changes)
        engine = small(model, num_blocks=7, block_size=5)
        stores = (*engine.cache.keys, *engine.cache.values)
        planned = kv_cache_bytes(model.config, 1, 7 * 5, torch.float32)
        assert sum(store.nbytes for store in stores) == planned
        assert cache_blocks(model, planned, 5) == 7
        assert cache_blocks(model, planned - 1, 5) == 6
    with pytest.raises(ValueError, match="memory=100 is less than one block"):
        cache_blocks(MODEL, 100)


def test_at_most_the_last_block_of_a_request_has_empty_slots():
    engine = small(MODEL, block_size=4)
    engine.add(COMMON[:5], SamplingParams(max_new_tokens=1))
    engine.step()
    assert (engine.stats.stored, engine.stats.room) == (5, 8)
    assert engine.stats.waste == pytest.approx(3 / 8)


def test_a_thousand_requests_with_random_aborts_leave_no_block():
    draw = random.Random(3)
    model = make(0, num_hidden_layers=1)
    engine = small(model, num_blocks=30, max_tokens=48, max_sequences=12, gamma=2)
    added = ended = 0
    while added < 1000 or not engine.idle:
        for _ in range(draw.randint(0, 8)):
            if added < 1000:
                prompt = [*COMMON[: draw.randint(0, 8)], draw.randrange(VOCAB)]
                engine.add(prompt, SamplingParams(max_new_tokens=draw.randint(1, 5)))
                added += 1
        ended += sum(event.finished is not None for event in engine.step())
        if draw.random() < 0.5 and added:
            ended += engine.abort(draw.randrange(added)) is not None
        if draw.random() < 0.1:
            engine.check()
    engine.check()
    assert ended == 1000
    assert engine.blocks_in_use == 0


# Events -------------------------------------------------------------------------------


def test_events_come_as_tokens_are_written():
    engine = small(MODEL, max_tokens=8)
    first = engine.add(COMMON[:3], SamplingParams(max_new_tokens=3))
    long = engine.add(COMMON, SamplingParams(max_new_tokens=1))
    wanted = plain(MODEL, COMMON[:3], 3)
    assert engine.step() == [Event(first, wanted[0])]
    # the one that decodes goes on while the long prompt is computed in parts
    assert engine.step() == [Event(first, wanted[1])]
    assert engine.step() == [Event(first, wanted[2], "length")]
    assert engine.step() == [Event(long, plain(MODEL, COMMON, 1)[0], "length")]
    assert engine.idle
    assert engine.step() == []


@pytest.mark.parametrize("gamma", [0, 4])
def test_a_stop_token_ends_the_text(gamma):
    wanted = plain(MODEL, COMMON, 12)
    stop = wanted[5]
    params = SamplingParams(max_new_tokens=12, stop_tokens=(stop,))
    engine = small(MODEL, gamma=gamma, draft=MODEL if gamma else None)
    engine.add(COMMON, params)
    events = []
    while not engine.idle:
        events += engine.step()
    assert [event.token for event in events] == wanted[: wanted.index(stop) + 1]
    assert [event.finished for event in events][-2:] == [None, "stop"]
    engine.check()


def test_abort_frees_everything_at_once():
    engine = small(MODEL, max_sequences=1)
    running = engine.add(COMMON, SamplingParams(max_new_tokens=9))
    waiting = engine.add(COMMON, SamplingParams(max_new_tokens=9))
    engine.step()
    assert engine.blocks_in_use > 0
    assert engine.abort(running) == Event(running, None, "abort")
    assert engine.blocks_in_use == 0
    engine.check()
    assert engine.abort(waiting) == Event(waiting, None, "abort")
    assert engine.idle
    assert engine.abort(running) is None
    with pytest.raises(ValueError, match="id=2 is not known"):
        engine.abort(2)


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], {}, "tokens is empty"),
        ([VOCAB], {}, "tokens has 31: tokens are 0 to 30"),
        ([-1], {}, "tokens has -1"),
        (["a"], {}, "tokens has 'a'"),
        ([1] * 200, {"max_new_tokens": 42}, "too many for a cache of 240 tokens"),
        ([1], {"max_new_tokens": 3000}, "too many for a model of 2048 positions"),
    ],
)
def test_what_cannot_be_served_is_refused(prompt, params, said):
    engine = small(MODEL)
    with pytest.raises(ValueError, match=said):
        engine.add(prompt, SamplingParams(**params))
    assert engine.idle
    engine.add([1] * 200, SamplingParams(max_new_tokens=41))  # just fits


def test_without_chunks_a_text_must_fit_a_step():
    engine = small(MODEL, max_tokens=8, chunked=False)
    with pytest.raises(ValueError, match="too many for max_tokens=8"):
        engine.add([1] * 5, SamplingParams(max_new_tokens=5))
    asked = [([1] * 5, 4), ([2] * 3, 6)]
    for prompt, count in asked:
        engine.add(prompt, SamplingParams(max_new_tokens=count))
    assert list(finish(engine).values()) == one_by_one(asked)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"stop_tokens": 3}, "stop_tokens=3"),
        ({"order": "x"}, "order='x'"),
    ],
)
def test_params_out_of_range(params, said):
    with pytest.raises(ValueError, match=said):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"gamma": -1}, "gamma=-1"),
        ({"longest": 0}, "longest=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_sizes_out_of_range(sizes, said):
    with pytest.raises(ValueError, match=said):
        EngineConfig(**sizes)


def test_a_draft_that_does_not_fit():
    with pytest.raises(ValueError, match="draft has a vocabulary of 30"):
        small(MODEL, gamma=2, draft=make(0, vocab_size=30))
    with pytest.raises(ValueError, match="draft has 16 positions"):
        small(MODEL, gamma=2, draft=make(0, max_position_embeddings=16))
    with pytest.raises(ValueError, match="gamma=0"):
        small(MODEL, draft=DRAFT)


def test_generate_leaves_nobody_behind_when_it_raises():
    engine = small(MODEL)
    with pytest.raises(ValueError, match="tokens is empty"):
        engine.generate([[1], []], SamplingParams())
    assert engine.idle
