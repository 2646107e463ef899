"""A Llama's parameters for Paddle and MindSpore; what those do when nothing is said."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from llmlab.chips.ascend_and_other_accelerators import porting
from llmlab.models.llama import Llama, LlamaConfig
from scripts.golden import port_defaults_goldens
from tests.chips.ascend_and_other_accelerators.test_block import block, config, near

# The map ----------------------------------------------------------------------------


def state_of(**changes) -> tuple[dict, LlamaConfig]:
    torch.manual_seed(3)
    shape = config(num_hidden_layers=2, attention_bias=True, mlp_bias=True, **changes)
    model = Llama(shape)
    torch.nn.init.normal_(model.model.layers[1].self_attn.k_proj.bias)
    return dict(model.state_dict()), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("other", ["paddle", "mindspore"])
def test_there_and_back_is_exact(other, tied, dtype):
    state, shape = state_of(tie_word_embeddings=tied)
    state = {name: x.to(dtype) for name, x in state.items()}
    there = getattr(porting, f"to_{other}")(state, shape)
    assert all(x.is_contiguous() for x in there.values())  # safetensors wants it
    back = getattr(porting, f"from_{other}")(there, shape)
    if tied:
        del state["lm_head.weight"]  # the embedding again
    assert back.keys() == state.keys()
    for name, x in state.items():
        assert torch.equal(back[name], x)
        assert back[name].dtype == dtype


def test_paddle_turns_linears_and_not_the_head():
    state, shape = state_of()
    there = porting.to_paddle(state, shape)
    assert there.keys() == state.keys()
    for name, x in state.items():
        turned = "_proj.weight" in name
        assert torch.equal(there[name], x.T if turned else x), name


def test_mindformers_names():
    state, shape = state_of()
    there = porting.to_mindspore(state, shape)
    names = sorted(name for name in there if ".0." in name and "weight" in name)
    assert names == [
        "model.layers.0.attention.wk.weight",
        "model.layers.0.attention.wo.weight",
        "model.layers.0.attention.wq.weight",
        "model.layers.0.attention.wv.weight",
        "model.layers.0.attention_norm.weight",
        "model.layers.0.feed_forward.w1.weight",
        "model.layers.0.feed_forward.w2.weight",
        "model.layers.0.feed_forward.w3.weight",
        "model.layers.0.ffn_norm.weight",
    ]
    assert {"model.tok_embeddings.embedding_weight", "lm_head.weight"} < there.keys()
    assert "model.norm_out.weight" in there
    # w1 is the gate, w3 the other one
    gate = state["model.layers.0.mlp.gate_proj.weight"]
    assert there["model.layers.0.feed_forward.w1.weight"] is gate


@pytest.mark.parametrize("way", ["to_paddle", "to_mindspore"])
def test_what_does_not_fit_is_named(way):
    state, shape = state_of()
    bad = dict(state)
    bad["model.norm.weight"] = torch.ones(47)
    bad["model.layers.2.mlp.up_proj.weight"] = torch.ones(80, 48)
    del bad["lm_head.weight"]
    with pytest.raises(ValueError, match="state: missing") as error:
        getattr(porting, way)(bad, shape)
    text = str(error.value)
    assert "missing: lm_head.weight" in text
    assert "not part of this model: model.layers.2.mlp.up_proj.weight" in text
    assert "model.norm.weight is (47,), not (48,)" in text


def test_an_unturned_matrix_is_refused_on_the_way_back():
    state, shape = state_of()
    there = porting.to_paddle(state, shape)
    name = "model.layers.1.mlp.up_proj.weight"
    there[name] = state[name]
    with pytest.raises(ValueError, match=r"up_proj.weight is \(80, 48\), not \(48, 80"):
        porting.from_paddle(there, shape)


@pytest.mark.parametrize("way", ["to_paddle", "from_mindspore"])
def test_a_tied_head_must_be_the_embedding(way):
    state, shape = state_of(tie_word_embeddings=True)
    if way == "from_mindspore":
        state = porting.to_mindspore(state, shape)
    state["lm_head.weight"] = torch.ones(61, 48)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\."):
        getattr(porting, way)(state, shape)


# The order of rows ------------------------------------------------------------------


def test_interleaved_rows_give_the_same_scores():
    """Neighbours turned by the same angles: queries times keys do not change."""
    model, h, _ = block()
    attention = model.model.layers[0].self_attn
    D, T = 8, h.shape[1]
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, D, 2) / D))

    def halves(x):  # (B, n, T, D)
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def pairs(x):
        a, b = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def scores(turn, order):
        q, k = (
            turn(attention.split_heads(h @ order(p.weight).T))
            for p in (attention.q_proj, attention.k_proj)
        )
        return q[:, ::3] @ k.transpose(2, 3)

    plain = scores(halves, lambda w: w)
    assert near(scores(pairs, lambda w: porting.interleaved(w, D)), plain)
    assert not near(scores(pairs, lambda w: w), plain)


def test_the_order_of_a_heads_rows():
    rows = torch.arange(12.0)
    found = porting.interleaved(rows, 6)
    assert found.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(porting.half_split(found, 6), rows)
    matrix = torch.randn(24, 5)
    back = porting.half_split(porting.interleaved(matrix, 8), 8)
    assert torch.equal(back, matrix)


@pytest.mark.parametrize("order", [porting.interleaved, porting.half_split])
def test_rows_that_are_no_heads(order):
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        order(torch.ones(12, 2), 3)
    with pytest.raises(ValueError, match="12 rows, no multiple of head_dim=8"):
        order(torch.ones(12, 2), 8)


def test_fused_in_groups():
    """4 query heads and 2 key heads of one row each."""
    q, k, v = torch.arange(4.0), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    assert porting.fuse_qkv(q, k, v).tolist() == [0, 1, 2, 3, 10, 11, 20, 21]
    grouped = porting.fuse_qkv(q, k, v, groups=2)
    assert grouped.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for groups in (1, 2):
        parts = porting.split_qkv(porting.fuse_qkv(q, k, v, groups), 4, 2, groups)
        for part, whole in zip(parts, (q, k, v), strict=True):
            assert torch.equal(part, whole)


def test_fused_refusals():
    q, k = torch.ones(4, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="k has 2 rows, not 4 equal groups"):
        porting.fuse_qkv(q, k, k, groups=4)
    with pytest.raises(ValueError, match="fused has 7 rows"):
        porting.split_qkv(torch.ones(7, 3), 4, 2)
    with pytest.raises(ValueError, match="groups=3 must divide 4 and 2"):
        porting.split_qkv(torch.ones(8, 3), 4, 2, groups=3)


# What was measured ------------------------------------------------------------------


def test_effects_are_those_of_the_table():
    found = port_defaults_goldens.effects()
    names = {"paddle": "Paddle", "mindspore": "MindSpore"}
    stored = {
        (row.thing, row.framework.split()[0]): row.effect
        for row in porting.defaults()
        if row.effect is not None
    }
    assert len(stored) == len(found) == 10
    for (thing, whose), effect in found.items():
        # an effect of rounding's size is another on another CPU
        kept = stored[thing, names[whose]]
        assert effect == pytest.approx(kept, rel=0.05, abs=2e-6), thing


@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_pytorchs_own_answers():
    """Those that are the same on every CPU.

    An optimiser's step is left out: with it PyTorch 2.13 imports its whole compiler.
    """
    _, asked = port_defaults_goldens.in_torch()
    rows = [row for row in porting.defaults() if row.framework.startswith("PyTorch")]
    assert {row.thing for row in rows} == asked.keys()
    for row in rows:
        assert row.value == row.torch
        if "int8" not in row.thing and "step" not in row.thing:
            assert port_defaults_goldens.answer(asked[row.thing][1]) == row.value


def test_some_defaults_differ_and_some_do_not():
    rows = {(row.thing, row.framework.split()[0]): row for row in porting.defaults()}
    for thing in ("round", "argmax of 1 3 3 2", "-7 // 2, -7 % 2"):
        assert not rows[thing, "Paddle"].differs
        assert not rows[thing, "MindSpore"].differs
    mean = rows["cross entropy, labels 1, -100", "Paddle"]
    # the sum of losses over all tokens, those with label -100 too
    assert float(mean.torch) == pytest.approx(2 * float(mean.value), rel=1e-3)
    assert rows["cross entropy of 0, -1000, label 1", "Paddle"].value == "64"
    # Adam without the correction of its first steps: 0.1 / sqrt(0.001) of a step
    step = 1 - float(rows["AdamW: w = 1 after a step of 0.001", "MindSpore"].value)
    assert step == pytest.approx(0.001 * 0.1 / 0.001**0.5, rel=0.01)


def test_smollm2_by_paddleformers():
    texts = porting.smollm2()["texts"]
    for name in ("plain", "chat"):
        assert texts[name]["largest difference"] < 1e-5 * texts[name]["largest logit"]
    assert texts["plain"]["top tokens"][0] == " Paris"
    # token 0 is taken for padding, and padding has no embedding
    assert texts["after a document"]["ids"][0] == 0
    assert texts["after a document"]["largest difference"] > 10
    assert porting.smollm2()["largest embedding of token 0"] == 0


@pytest.mark.real_model
def test_smollm2_here():
    """The stored logits are those of the course's model."""
    from llmlab.models import real_model

    model = real_model.load()
    for name, same in (("plain", True), ("after a document", False)):
        text = porting.smollm2()["texts"][name]
        with torch.no_grad():
            logits = model(torch.tensor([text["ids"]]), logits_to_keep=1)[0, -1]
        kept = torch.tensor(text["top logits"])
        assert torch.allclose(logits[text["top ids"]], kept, atol=2e-3) == same
        assert (logits.topk(10).indices.tolist() == text["top ids"]) == same


@pytest.mark.real_model
def test_why_paddles_logits_differ_after_token_0():
    """Two defaults together: no embedding for padding, and a softmax that ends at e⁻⁶⁴.

    What leaks through the mask into a row of zeros grows with the norm of each layer.
    """
    from llmlab.models import real_model

    model = real_model.load()
    text = porting.smollm2()["texts"]["after a document"]
    kept = torch.tensor(text["top logits"])

    with torch.no_grad():
        embedded = model.model.embed_tokens(torch.tensor([text["ids"]]))
        embedded[:, 0] = 0
        for low, same in ((-64.0, True), (-1e9, False)):
            attention = partial(port_defaults_goldens.floored, low)
            logits = model(inputs_embeds=embedded, attention=attention)[0, -1]
            apart = (logits[text["top ids"]] - kept).abs().max()
            assert (apart < 0.1) == same


# Ascend's lowering ------------------------------------------------------------------


def ops_of(lines: list[str], dialect: str) -> list[str]:
    words = [word for line in lines for word in line.replace("(", " ").split()]
    return [word for word in words if word.startswith(f"{dialect}.")]


def lowered(whose: str, kernel: str, stage: str) -> list[str]:
    return porting.lowered()[whose]["kernels"][kernel][stage]


@pytest.mark.parametrize("kernel", ["add", "product", "second", "gather"])
def test_the_front_half_is_nearly_the_same(kernel):
    """The same operations on pointers in Triton's own dialect, for both."""
    theirs, ours = (
        ops_of(lowered(whose, kernel, "ttir"), "tt") for whose in ("ascend", "nvidia")
    )
    kinds = ("tt.load", "tt.store", "tt.dot", "tt.get_program_id")
    assert [theirs.count(k) for k in kinds] == [ours.count(k) for k in kinds]


@pytest.mark.parametrize("kernel", ["add", "product", "second", "gather"])
def test_then_threads_or_memory(kernel):
    """NVIDIA's next stage says which thread holds what; Ascend's has no threads."""
    ttgir = "\n".join(lowered("nvidia", kernel, "ttgir"))
    linalg = "\n".join(lowered("ascend", kernel, "ttadapter"))
    assert "threadsPerWarp" in ttgir
    assert "threadsPerWarp" not in linalg
    assert "tt.load" in ttgir
    assert "tt.load" not in linalg
    assert "memref.copy" in linalg
    # it ends where CANN's own compiler would be called
    kept = porting.lowered()["ascend"]["kernels"][kernel]
    assert "ASCEND_HOME_PATH is not set" in kept["npubin refused"]


def test_a_dot_is_for_the_cube():
    linalg = lowered("ascend", "product", "ttadapter")
    assert ops_of(linalg, "linalg").count("linalg.matmul") == 1
    modes = {
        n: k["mix_mode"] for n, k in porting.lowered()["ascend"]["kernels"].items()
    }
    assert modes == {"add": "aiv", "product": "mix", "second": "aiv", "gather": "aiv"}


def test_every_second_number_is_read_with_its_neighbour():
    """A strided load becomes one of twice the length, and a cut."""
    linalg = "\n".join(lowered("ascend", "second", "ttadapter"))
    assert "memref.alloc() : memref<256xf32>" in linalg
    assert "tensor.extract_slice %0[0] [128] [2]" in linalg


def test_a_gather_is_a_loop_over_numbers():
    linalg = lowered("ascend", "gather", "ttadapter")
    assert ops_of(linalg, "scf").count("scf.for") == 1
    assert ops_of(linalg, "memref").count("memref.load") == 1
    assert len(ops_of(lowered("nvidia", "gather", "ttgir"), "scf")) == 0
    # as in every kernel without one, a load that is masked is a shorter copy
    add = "\n".join(lowered("ascend", "add", "ttadapter"))
    assert "memref.subview" in add
    assert "scf.for" not in add
