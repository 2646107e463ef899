"""Wrong answers to the exercises of 04-peft/10-peft-library, each with the diagnosis
that it must get.
"""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

from llmlab.checks.peft.peft_library import check
from tests.checks.rejecting import Wrong, rejects, verdict


@torch.no_grad()
def run(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def plain(base, folder, tokens):
    return run(base, tokens)


def left_on(base, folder, tokens):
    return run(peft.PeftModel.from_pretrained(base, folder).eval(), tokens)


def merged(base, folder, tokens):
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    logits = run(model, tokens)
    model.merge_and_unload()
    return logits


def dropout_on(base, folder, tokens):
    model = peft.PeftModel.from_pretrained(base, folder).train()
    logits = run(model, tokens)
    model.unload()
    return logits


def the_output(base, folder, tokens):
    return peft.PeftModel.from_pretrained(base, folder).eval()(tokens)


WITH = [
    Wrong("with_adapter", plain, "plain base"),
    Wrong("with_adapter", left_on, "still in base"),
    Wrong("with_adapter", merged, "has changed"),
    Wrong("with_adapter", dropout_on, "dropout is on"),
    Wrong("with_adapter", the_output, "ensor"),
]


def loaded(base, folders):
    first, *others = folders
    model = peft.PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    return model.eval()


def first_for_all(base, folders, tokens, names):
    return run(loaded(base, folders), tokens)


def last_for_all(base, folders, tokens, names):
    model = loaded(base, folders)
    model.set_adapter(list(folders)[-1])
    return run(model, tokens)


def none_is_first(base, folders, tokens, names):
    return run(
        loaded(base, folders),
        tokens,
        adapter_names=[n or next(iter(folders)) for n in names],
    )


def base_for_all(base, folders, tokens, names):
    return run(base, tokens)


def row_by_row(base, folders, tokens, names):
    model = loaded(base, folders)
    return torch.cat(
        [
            run(model, t[None], adapter_names=[n or "__base__"])
            for t, n in zip(tokens, names, strict=True)
        ]
    )


MIXED = [
    Wrong("mixed_batch", first_for_all, "first adapter"),
    Wrong("mixed_batch", last_for_all, "last adapter"),
    Wrong("mixed_batch", none_is_first, "rows of None"),
    Wrong("mixed_batch", base_for_all, "plain base"),
    Wrong("mixed_batch", row_by_row, "5 times"),
]


def soft(order, cut):
    """by_hand with another order of the parts or another cut of the logits."""

    def by_hand(base, folder, tokens):
        prompt = load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"]
        parts = order(
            prompt.expand(len(tokens), -1, -1), base.get_input_embeddings()(tokens)
        )
        return cut(run(base, inputs_embeds=torch.cat(parts, 1)), len(prompt))

    return by_hand


BY_HAND = [
    Wrong("by_hand", plain, "the prompt is not used"),
    Wrong("by_hand", soft(lambda p, x: (p, x), lambda y, n: y), "virtual tokens too"),
    Wrong("by_hand", soft(lambda p, x: (x, p), lambda y, n: y[:, n:]), "stands after"),
    Wrong("by_hand", soft(lambda p, x: (x, p), lambda y, n: y[:, :-n]), "plain base"),
    Wrong(
        "by_hand",
        soft(lambda p, x: (p, x), lambda y, n: y[:, :-n]),
        "the virtual tokens are the first",
    ),
    Wrong(
        "by_hand",
        soft(lambda p, x: (p.flip(1), x), lambda y, n: y[:, n:]),
        "reverse order",
    ),
]

# Kinds of mistake that once had no sentence, or got through.


def adapted(base, folder, tokens, end=lambda base, y: y):
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    y = run(model, tokens)
    return end(model.unload(), y)


def left_training(base, folder, tokens):
    return adapted(base, folder, tokens, lambda base, y: (base.train(), y)[1])


def as_probabilities(base, folder, tokens):
    return adapted(base, folder, tokens, lambda base, y: y.softmax(-1))


def named(change):
    def mixed_batch(base, folders, tokens, names):
        return run(loaded(base, folders), tokens, adapter_names=change(names))

    return mixed_batch


def next_name(names):
    return [n or "__base__" for n in names[1:] + names[:1]]


def by_peft(base, folder, tokens):
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    return run(model, tokens)[:, -tokens.shape[1] :]


def from_zero_again(base, folder, tokens):
    rows = prompt_of(folder).expand(len(tokens), -1, -1)
    p, n = rows.shape[1], tokens.shape[1]
    places = torch.tensor([[*range(p), *range(n)]])
    both = torch.cat([rows, base.get_input_embeddings()(tokens)], 1)
    return run(base, inputs_embeds=both, position_ids=places)[:, p:]


def prompt_of(folder):
    return load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"]


MORE = [
    Wrong("with_adapter", left_training, "left in training mode"),
    Wrong("with_adapter", as_probabilities, "these are probabilities"),
    Wrong("mixed_batch", named(next_name), "row 0 asks for 'rum', and went through"),
    Wrong(
        "mixed_batch",
        named(lambda names: sorted(n or "__base__" for n in names)),
        "the names are sorted",
    ),
    Wrong("by_hand", by_peft, "do without `peft`"),
    Wrong("by_hand", from_zero_again, "positions begin at 0 again"),
    Wrong(
        "by_hand",
        soft(lambda p, x: (p, x), lambda y, n: y[:, n - 1 : -1]),
        "one place too early",
    ),
    Wrong(
        "by_hand",
        soft(lambda p, x: (p, x[:, p.shape[1] :]), lambda y, n: y),
        "in the place of the first tokens",
    ),
]


def of_a_copy(base, folder, tokens):
    return run(
        peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), tokens
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("with_adapter", of_a_copy),
        ("mixed_batch", named(lambda names: [n or "__base__" for n in names])),
        ("by_hand", soft(lambda p, x: (p, x), lambda y, n: y[:, n:])),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects("04-peft/10-peft-library", WITH + MIXED + BY_HAND + MORE)
