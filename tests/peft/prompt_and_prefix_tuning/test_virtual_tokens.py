"""What all four methods share: parity with `peft`, masks, positions, caches,
generation, files, and coming off again.
"""

import copy

import pytest
import torch

from llmlab.models.cache import KVCache
from llmlab.models.generation import generate
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.peft import walk
from llmlab.peft.lora import lora
from llmlab.peft.p_tuning import p_tuning, p_tuning_v2
from llmlab.peft.prompt_and_prefix_tuning import (
    prefix_tuning,
    prefixes,
    prompt_tuning,
    virtual_tokens,
)
from llmlab.training import pretraining
from tests.peft.conftest import make_hf, make_llama
from tests.peft.prompts import (
    CASES,
    build,
    build_peft,
    logits_of,
    loss_of,
    peft_names,
    real_tokens,
    vectors,
)

SHAPES = {
    "plain": {},
    "biases, tied": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "a head_dim of its own": {
        "hidden_size": 21,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
    "as many heads": {"num_key_value_heads": 6},
}
cases = pytest.mark.parametrize("name", CASES)
kinds = pytest.mark.parametrize("kind", ["ours", "transformers"])


# Against peft -------------------------------------------------------------------------


@kinds
@cases
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_gradients_and_counts_are_peft_s(name, kind, shape, tokens):
    ours, encoder = build(name, kind, **shape)
    theirs, their_encoder = build_peft(name, encoder, **shape)
    mine, peers = logits_of(ours, tokens), real_tokens(theirs(tokens).logits, tokens)
    assert (
        mine.shape == (3, 7, 61)
        and (mine - plain_logits(kind, shape, tokens)).abs().max() > 1e-3
    )
    torch.testing.assert_close(mine, peers, rtol=0, atol=1e-5)
    loss_of(mine, tokens).backward()
    loss_of(peers, tokens).backward()
    grads = {n: p.grad for n, p in encoder.named_parameters()}
    assert all(g is not None and g.abs().max() > 1e-7 for g in grads.values())
    for n, p in their_encoder.named_parameters():
        torch.testing.assert_close(peft_names(grads)[n], p.grad, rtol=0, atol=1e-5)
    module, config, _, _ = CASES[name]
    assert walk.trainable(ours) == theirs.get_nb_trainable_parameters()
    assert walk.trainable(ours)[0] == module.num_parameters(ours, config)


def plain_logits(kind, shape, tokens):
    return logits_of((make_llama if kind == "ours" else make_hf)(**shape), tokens)


@cases
def test_transformers_own_loss_is_peft_s(name, tokens):
    """With `labels`, the last virtual token predicts the first real one, as in peft;
    the logits stay those of T tokens.
    """
    ours, encoder = build(name, "transformers")
    theirs, _ = build_peft(name, encoder)
    labels = tokens.clone()
    labels[0, :3] = -100
    out = ours(tokens, labels=labels)
    torch.testing.assert_close(
        out.loss, theirs(tokens, labels=labels).loss, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(out.logits, ours(tokens).logits, rtol=0, atol=0)
    # the same, as a tuple
    loss, logits = ours(tokens, labels=labels, return_dict=False)[:2]
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


@cases
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_is_peft_s(name, padding, tokens):
    ours, encoder = build(name)
    theirs, _ = build_peft(name, encoder)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 3) if padding == "left" else slice(4, 7)] = 0
    peers = real_tokens(theirs(tokens, attention_mask=mask).logits, tokens)
    mine = ours(tokens, attention_mask=mask)
    torch.testing.assert_close(mine[mask.bool()], peers[mask.bool()], rtol=0, atol=1e-5)


@cases
def test_ten_steps_beside_peft(name, tokens):
    ours, encoder = build(name)
    theirs, _ = build_peft(name, encoder)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.3
        )
        for _ in range(10):
            loss = loss_of(real_tokens(logits_of(model, tokens), tokens), tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(
        torch.tensor(losses[:10]), torch.tensor(losses[10:]), rtol=0, atol=1e-5
    )
    assert losses[9] < losses[0]


@cases
def test_a_half_precision_base_keeps_its_tokens_in_fp32(name, tokens):
    module, config, _, _ = CASES[name]
    ours = module.apply(
        make_hf().bfloat16(), config, generator=torch.Generator().manual_seed(5)
    )
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    theirs, _ = build_peft(
        name, ours.virtual_tokens.encoders["default"], make_hf().bfloat16()
    )
    out = ours(tokens).logits
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out, real_tokens(theirs(tokens).logits, tokens), rtol=0, atol=1e-5
    )


# Masks, positions, caches -------------------------------------------------------------


@kinds
@cases
def test_left_padding_with_positions_changes_nothing(name, kind, tokens):
    model, _ = build(name, kind)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits_of(model, tokens, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(
        padded[1:2, 3:], logits_of(model, tokens[1:2, 3:]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        padded[0], logits_of(model, tokens)[0], rtol=0, atol=1e-5
    )


@kinds
@cases
def test_embeddings_instead_of_tokens(name, kind, tokens):
    model, _ = build(name, kind)
    embeds = model.model.embed_tokens(tokens)
    torch.testing.assert_close(
        logits_of(model, inputs_embeds=embeds),
        logits_of(model, tokens),
        rtol=0,
        atol=1e-6,
    )


@cases
@pytest.mark.parametrize("keep", [1, 3, 7, 20])
def test_logits_to_keep_counts_real_tokens(name, keep, tokens):
    model, _ = build(name)
    expected = model(tokens)[:, -keep:]
    torch.testing.assert_close(
        model(tokens, logits_to_keep=keep), expected, rtol=0, atol=1e-6
    )


def test_logits_at_given_places(tokens):
    model, _ = build("prompt", "transformers")
    at = torch.tensor([1, 4])
    torch.testing.assert_close(
        model(tokens, logits_to_keep=at).logits,
        model(tokens).logits[:, at],
        rtol=0,
        atol=1e-6,
    )


@cases
def test_token_by_token_through_a_cache_is_the_whole_pass(name, tokens):
    model, _ = build(name)
    cache = KVCache(2)
    steps = [
        model(tokens[:, :3], cache=cache),
        *(model(tokens[:, i : i + 1], cache=cache) for i in range(3, 7)),
    ]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=0, atol=1e-5)
    assert cache.length == 7 + CASES[name][1].num_virtual_tokens


@pytest.mark.parametrize("padded", [False, True])
@cases
def test_generation_is_the_same_on_ours_transformers_and_alone(name, padded, tokens):
    ours, encoder = build(name)
    theirs, their_encoder = build(name, "transformers")
    their_encoder.load_state_dict(encoder.state_dict())
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    mine = generate(ours, tokens, 6, attention_mask=mask)
    peers = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(mine, peers)
    assert torch.equal(
        mine[1, 7:], generate(ours, tokens[1:2][:, mask[1].bool()], 6)[0, -6:]
    )


@cases
def test_generation_is_peft_s(name, tokens):
    ours, encoder = build(name)
    theirs, _ = build_peft(name, encoder)
    options = {"max_new_tokens": 6, "do_sample": False}
    peers = theirs.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), **options
    )
    assert torch.equal(generate(ours, tokens, 6), peers)


def test_beams(tokens):
    model, _ = build("prefix", "transformers")
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        num_beams=3,
        max_new_tokens=4,
        do_sample=False,
    )
    assert out.shape == (3, 11)


def test_a_four_dimensional_mask_is_refused(tokens):
    model, _ = build("prompt", "transformers")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 7, 7\)"):
        model(tokens, attention_mask=torch.ones(3, 1, 7, 7))


def test_what_is_no_llama_is_named():
    for module, config, _, _ in CASES.values():
        with pytest.raises(
            ValueError, match=r"model is a Linear without .*: only a Llama is supported"
        ):
            module.apply(torch.nn.Linear(2, 2), config)


# Training, folding, removing ----------------------------------------------------------


@cases
def test_recomputed_layers_have_no_cache_for_a_prefix(name, tokens):
    """transformers drops the cache where it recomputes layers: soft prompts need none,
    a prefix must not vanish.
    """
    model, encoder = build(name, "transformers")
    before = loss_of(logits_of(model, tokens), tokens)
    before.backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    model.zero_grad()
    model.train().activation_checkpointing_enable()
    if encoder.deep:
        with pytest.raises(ValueError, match="model has gradient_checkpointing=True"):
            model(tokens)
        return
    after = loss_of(logits_of(model, tokens), tokens)
    after.backward()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        [p.grad for p in encoder.parameters()], gradients, rtol=0, atol=1e-6
    )


@kinds
@cases
def test_only_the_encoder_trains_and_the_base_comes_back_bit_for_bit(
    name, kind, tokens
):
    plain = (make_llama if kind == "ours" else make_hf)()
    before, logits = (
        {n: t.clone() for n, t in plain.state_dict().items()},
        logits_of(plain, tokens),
    )
    module, config, _, _ = CASES[name]
    module.apply(plain, config)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    loss_of(logits_of(plain, tokens), tokens).backward()
    optimizer.step()
    trained = {n for n, p in plain.named_parameters() if p.grad is not None}
    assert trained == {
        n for n, _ in plain.named_parameters() if n.startswith("virtual_tokens.")
    }
    module.remove(plain)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in plain.state_dict().items())
    assert torch.equal(logits_of(plain, tokens), logits) and not any(
        p.requires_grad for p in plain.parameters()
    )
    assert (
        not plain._forward_pre_hooks
        and not plain._forward_hooks
        and not hasattr(plain, "virtual_tokens")
    )
    module.apply(plain, config)  # and on again
    assert not torch.equal(logits_of(plain, tokens), logits)


@cases
def test_folding_drops_the_network_and_keeps_the_output(name, tokens):
    model, encoder = build(name)
    before = model(tokens)
    CASES[name][0].fold(model)
    # PyTorch runs an LSTM by another kernel where no gradient is asked
    bits = 1e-5 if "LSTM" in name else 0
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=bits)
    folded = model.virtual_tokens.encoders["default"]
    assert [n for n, _ in folded.named_parameters()] == ["embedding"]
    assert folded.embedding.shape == encoder().shape and folded.embedding.requires_grad


def test_dropout_is_off_in_what_is_folded_and_saved():
    model = make_llama().train()
    p_tuning.apply(
        model, p_tuning.PTuningConfig(4, encoder="LSTM", hidden=8, dropout=0.5)
    )
    encoder = model.virtual_tokens.encoders["default"]
    assert encoder.training and not torch.equal(encoder(), encoder())
    assert torch.equal(vectors(model), vectors(model)) and encoder.training


def test_the_course_s_training_step_needs_no_change(tokens):
    model, _ = build("prefix without a network")
    recipe = pretraining.Recipe(steps=5, peak_lr=0.1, warmup=0, weight_decay=0.0)
    optimizer = pretraining.make_optimizer(model, recipe)
    losses = [
        pretraining.training_step(model, optimizer, tokens, 1.0) for _ in range(5)
    ]
    assert losses[-1] < losses[0]


# Several adapters ---------------------------------------------------------------------


def test_adapters_of_different_methods_take_turns(tokens):
    model = make_llama()
    plain = model(tokens)
    prompt_tuning.apply(
        model, prompt_tuning.PromptTuningConfig(4, init="random"), "shallow"
    )
    shallow = model(tokens)
    p_tuning_v2.apply(model, p_tuning_v2.PTuningV2Config(2, num_labels=3), "labels")
    assert model(tokens).shape == (3, 7, 3) and virtual_tokens.adapters(model) == [
        "shallow",
        "labels",
    ]
    assert all(".labels." in n for n, p in model.named_parameters() if p.requires_grad)
    virtual_tokens.set_adapter(model, "shallow")
    assert torch.equal(model(tokens), shallow)
    virtual_tokens.set_adapter(model, None)
    assert torch.equal(model(tokens), plain) and not any(
        p.requires_grad for p in model.parameters()
    )
    virtual_tokens.remove(model, "labels")
    assert isinstance(model.lm_head, torch.nn.Linear) and virtual_tokens.adapters(
        model
    ) == ["shallow"]
    virtual_tokens.remove(model, "shallow")
    assert model.state_dict().keys() == make_llama().state_dict().keys()


def test_lora_beside_a_prefix(tokens):
    """The walk finds the model's linears and none of the encoder's, and both changes
    are felt.
    """
    model, _ = build("prefix")
    before = model(tokens)
    lora.apply(model, lora.LoRAConfig(target_modules="all-linear"))
    assert len(lora.adapters(model)) == 1 and torch.equal(model(tokens), before)
    assert all(
        "virtual_tokens" not in n for n in walk.installed(model, lora.LoRALinear)
    )


def test_a_deep_copy_is_a_model_of_its_own(tokens):
    model, _ = build("prefix")
    twin, before = copy.deepcopy(model), model(tokens)
    assert torch.equal(twin(tokens), before)
    with torch.no_grad():
        twin.virtual_tokens.encoders["default"].embedding.zero_()
    assert torch.equal(model(tokens), before) and not torch.equal(twin(tokens), before)
    virtual_tokens.remove(twin)
    assert torch.equal(twin(tokens), make_llama()(tokens)) and torch.equal(
        model(tokens), before
    )


@pytest.mark.parametrize("bad", ["", "a.b", "keys"])
@cases
def test_bad_names_are_refused_before_anything_changes(name, bad, tokens):
    module, config, _, _ = CASES[name]
    model = make_llama()
    with pytest.raises(ValueError, match="adapter="):
        module.apply(model, config, bad)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(
        model, "virtual_tokens"
    )
    module.apply(model, config)
    with pytest.raises(ValueError, match="'default' exists already"):
        module.apply(model, config)
    with pytest.raises(
        ValueError, match="'other' is not on the model; it has \\['default'\\]"
    ):
        module.remove(model, "other")


# Files --------------------------------------------------------------------------------


@kinds
@cases
def test_peft_opens_ours(name, kind, tokens, tmp_path):
    import peft

    model, _ = build(name, kind)
    CASES[name][0].save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_hf(), tmp_path)
    torch.testing.assert_close(
        real_tokens(theirs(tokens).logits, tokens),
        logits_of(model, tokens),
        rtol=0,
        atol=1e-5,
    )


@kinds
@cases
def test_we_open_peft_s(name, kind, tokens, tmp_path):
    _, encoder = build(name)
    theirs, _ = build_peft(name, encoder)
    theirs.save_pretrained(tmp_path)
    module, config, _, _ = CASES[name]
    model = module.load(
        (make_llama if kind == "ours" else make_hf)(), tmp_path, "theirs"
    )
    peers = real_tokens(theirs(tokens).logits, tokens)
    torch.testing.assert_close(logits_of(model, tokens), peers, rtol=0, atol=1e-5)
    assert (
        virtual_tokens.get(model, "theirs")[1].num_virtual_tokens
        == config.num_virtual_tokens
    )
    module.save(model, tmp_path / "again", "theirs")
    assert torch.equal(
        vectors(module.load(make_llama(), tmp_path / "again")), vectors(model, "theirs")
    )


@cases
def test_a_file_of_another_width_is_refused_and_the_model_left_alone(name, tmp_path):
    model, _ = build(name, hidden_size=36, head_dim=6)
    module = CASES[name][0]
    module.save(model, tmp_path)
    other = make_llama()
    with pytest.raises(
        ValueError, match=r"'prompt_embeddings' has shape .* this model needs"
    ):
        module.load(other, tmp_path)
    assert not hasattr(other, "virtual_tokens") and all(
        p.requires_grad for p in other.parameters()
    )


def test_another_method_s_file_is_refused(tmp_path):
    model, _ = build("prompt")
    prompt_tuning.save(model, tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, not PREFIX_TUNING"):
        prefix_tuning.load(make_llama(), tmp_path)


# Large shapes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("prompt", 5 * 4096), ("p-tuning v2", 6 * 2 * 32 * 4096)]
)
def test_counts_on_a_7b_without_its_memory(name, expected):
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    module, config, _, _ = CASES[name]
    assert module.num_parameters(model, config) == expected
    module.apply(model, config)
    assert walk.trainable(model) == (expected, 6_738_415_616 + expected)


@pytest.mark.parametrize(
    ("L", "K", "D", "p"), [(2, 2, 4, 5), (3, 1, 2, 1), (1, 4, 6, 7)]
)
def test_split_and_join_undo_each_other_and_rows_are_tokens(L, K, D, p):
    prefix = torch.arange(p * 2 * L * K * D, dtype=torch.float32).view(p, -1)
    pairs = prefixes.split(prefix, L, K)
    assert len(pairs) == L and pairs[0][0].shape == (1, K, p, D)
    assert torch.equal(prefixes.join(pairs), prefix)
    assert torch.equal(
        torch.cat([t[0, :, 0].flatten() for pair in pairs for t in pair]), prefix[0]
    )


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"prefix is 7 wide.*2 · layers=2 · heads=1"):
        prefixes.split(torch.zeros(3, 7), 2, 1)


def test_a_gate_scales_keys_and_values_of_the_prefix_alone():
    pair = (torch.ones(1, 2, 3, 4), 2 * torch.ones(1, 2, 3, 4))
    k = v = torch.full((5, 2, 6, 4), 7.0)
    gate = torch.arange(5.0).view(5, 1, 1, 1)
    K, V = prefixes.prefix_attention_inputs(pair, k, v, gate)
    assert K.shape == V.shape == (5, 2, 9, 4)
    assert torch.equal(K[:, 0, 0, 0], torch.arange(5.0)) and torch.equal(
        V[:, 1, 2, 3], 2 * torch.arange(5.0)
    )
    assert torch.equal(K[:, :, 3:], k) and torch.equal(V[:, :, 3:], v)
