"""P-Tuning and P-Tuning v2 against what their papers say; parity of the vectors with
`peft` is in test_virtual_tokens.py.
"""

import pytest
import torch

from llmlab.peft import label_head, walk
from llmlab.peft.p_tuning import p_tuning, p_tuning_v2
from llmlab.peft.p_tuning.p_tuning import PTuningConfig
from llmlab.peft.p_tuning.p_tuning_v2 import PTuningV2Config
from llmlab.peft.prompt_and_prefix_tuning import prefix_tuning
from tests.peft.conftest import SHAPE, make_hf, make_llama
from tests.peft.prompts import logits_of


def test_lstm_tokens_know_of_their_neighbours_and_mlp_tokens_do_not():
    for encoder, neighbours in (("LSTM", True), ("MLP", False)):
        dice = torch.Generator().manual_seed(0)
        net = p_tuning.PromptEncoder(
            8, PTuningConfig(4, encoder=encoder, hidden=8), dice
        )
        before = net().detach()
        with torch.no_grad():
            net.embedding[1] += 1
        moved = (net() - before).abs().amax(-1) > 1e-6
        assert moved.tolist() == (
            [True] * 4 if neighbours else [False, True, False, False]
        )


def test_v2_is_deep_and_v1_is_not(tokens):
    """The keys of the virtual tokens in layer 1: v2 sets them freely, v1's are computed
    from its input vectors.
    """
    model = p_tuning_v2.apply(make_llama(), PTuningV2Config(2))
    assert (
        model.virtual_tokens.encoder.deep
        and model.virtual_tokens.encoder().shape == (2, 2 * 2 * 2 * 4)
    )
    model = p_tuning.apply(make_llama(), PTuningConfig(2))
    assert (
        not model.virtual_tokens.encoder.deep
        and model.virtual_tokens.encoder().shape == (2, 24)
    )


def peft_classifier(per_token, cls="PrefixTuningConfig", **settings):
    """`peft` on transformers' sequence or token classifier with our base's weights."""
    import peft
    import transformers

    kind = "Token" if per_token else "Sequence"
    config = transformers.LlamaConfig(
        **SHAPE, num_labels=4, pad_token_id=0, classifier_dropout=0.0
    )
    base = getattr(transformers, f"LlamaFor{kind}Classification")(config).eval()
    state = {
        n: t for n, t in make_llama().state_dict().items() if n.startswith("model.")
    }
    assert not base.load_state_dict(state, strict=False).unexpected_keys
    task = "TOKEN_CLS" if per_token else "SEQ_CLS"
    return (
        peft.get_peft_model(
            base, getattr(peft, cls)(task_type=task, **settings)
        ).eval(),
        base,
    )


METHODS = [
    (p_tuning_v2, PTuningV2Config, "PrefixTuningConfig"),
    (p_tuning, PTuningConfig, "PromptEncoderConfig"),
]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("make", [make_llama, make_hf])
@pytest.mark.parametrize(("module", "config", "cls"), METHODS)
def test_labels_and_files_are_those_of_peft_s_classifiers(
    module, config, cls, make, per_token, tokens, tmp_path
):
    import peft

    if cls == "PromptEncoderConfig" and per_token:
        pytest.skip(
            "peft's token classifier gives labels to the virtual tokens too, and cannot"
            " be asked for its own"
        )
    theirs, _ = peft_classifier(per_token, cls, num_virtual_tokens=3)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = tokens.clamp(min=1)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    tokens = tokens * mask  # 0 is padding, by which transformers finds the last token
    peers = theirs(tokens, attention_mask=mask).logits

    model = module.load(make(), tmp_path / "theirs")
    scores = logits_of(model, tokens, attention_mask=mask)
    assert scores.shape == (3, 7, 4)
    if per_token:
        torch.testing.assert_close(
            scores[mask.bool()], peers[mask.bool()], rtol=0, atol=1e-5
        )
    # peft pads input_ids by virtual tokens it cannot count for a shallow prompt
    elif cls == "PrefixTuningConfig":
        torch.testing.assert_close(
            label_head.last_token(scores, mask), peers, rtol=0, atol=1e-5
        )

    module.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(
        peft_classifier(per_token, cls, num_virtual_tokens=3)[1], tmp_path / "ours"
    )
    torch.testing.assert_close(
        again.eval()(tokens, attention_mask=mask).logits, peers, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_a_new_head_starts_small_and_trains(per_token, tokens):
    model = make_llama()
    config = PTuningV2Config(3, num_labels=5, per_token=per_token)
    expected = p_tuning_v2.num_parameters(model, config)
    p_tuning_v2.apply(model, config, generator=torch.Generator().manual_seed(0))
    head = model.virtual_tokens.encoder.head
    assert walk.trainable(model)[0] == expected == 3 * 32 + 5 * (24 + per_token)
    assert (head.bias is not None) == per_token and 0.015 < head.weight.std() < 0.025
    target = torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(
            model(tokens).flatten(0, 1), target.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_head_goes_with_the_adapter_and_the_tied_one_stays_tied(tokens):
    for make in (make_llama, make_hf):
        model = make(tie_word_embeddings=True)
        plain, keys = logits_of(model, tokens), list(model.state_dict())
        p_tuning_v2.apply(model, PTuningV2Config(3, num_labels=5))
        assert logits_of(model, tokens).shape == (3, 7, 5)
        p_tuning_v2.fold(model)
        assert logits_of(model, tokens).shape == (3, 7, 5)
        p_tuning_v2.remove(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (
            torch.equal(logits_of(model, tokens), plain)
            and list(model.state_dict()) == keys
        )


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_real_token_is_found(padding):
    scores = torch.arange(24.0).view(2, 6, 2)
    mask = torch.ones(2, 6)
    mask[1, slice(0, 2) if padding == "left" else slice(3, 6)] = 0
    assert label_head.last_token(scores, mask)[:, 0].tolist() == [
        10,
        22 if padding == "left" else 16,
    ]
    assert torch.equal(label_head.last_token(scores), scores[:, -1])


def test_a_prefix_with_a_head_is_p_tuning_v2_s(tmp_path):
    p_tuning_v2.save(
        p_tuning_v2.apply(make_llama(), PTuningV2Config(3, num_labels=2)), tmp_path
    )
    with pytest.raises(ValueError, match=r"label head: p_tuning_v2\.load opens it"):
        prefix_tuning.load(make_llama(), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PTuningConfig(0),
            "num_virtual_tokens must be an integer of at least 1, not 0",
        ),
        (lambda: PTuningConfig(encoder="GRU"), "encoder='GRU' must be 'MLP' or 'LSTM'"),
        (lambda: PTuningConfig(hidden=-1), "hidden must be an integer"),
        (lambda: PTuningConfig(dropout=1.0), "dropout must be at least 0 and below 1"),
        (
            lambda: PTuningV2Config(num_labels=0),
            "num_labels must be an integer of at least 1, not 0",
        ),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
