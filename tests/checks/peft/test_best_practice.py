"""Wrong answers to the exercises of 04-peft/11-best-practice, each with the diagnosis
that it must get.
"""

import copy

import pytest
import torch

from llmlab.checks.peft.best_practice import check
from llmlab.peft import bitfit, ia3
from llmlab.peft.lora import lora
from llmlab.peft.prompt_and_prefix_tuning import prompt_tuning
from llmlab.training import tasks
from tests.checks.rejecting import Wrong, rejects, verdict


def bytes_of(formula):
    def training_bytes(total, trained, base_bits):
        return float(formula(total, trained, base_bits))

    return training_bytes


BYTES = [
    Wrong("training_bytes", bytes_of(lambda n, t, b: n * b + 16 * t), "divide by 8"),
    Wrong("training_bytes", bytes_of(lambda n, t, b: 16 * (n + t)), "as if it trained"),
    Wrong("training_bytes", bytes_of(lambda n, t, b: 2 * n + 16 * t), "at 2 bytes"),
    Wrong(
        "training_bytes",
        bytes_of(lambda n, t, b: (n - t) * b / 8 + 16 * t),
        "subtracted",
    ),
    Wrong("training_bytes", bytes_of(lambda n, t, b: 16 * t), "base is missing"),
    Wrong(
        "training_bytes", bytes_of(lambda n, t, b: n * b / 8), "what trains is missing"
    ),
    Wrong(
        "training_bytes",
        bytes_of(lambda n, t, b: n * b / 8 + 12 * t),
        "16 bytes, not 12",
    ),
    Wrong(
        "training_bytes", bytes_of(lambda n, t, b: n * b / 8 + 8 * t), "8 bytes of each"
    ),
    Wrong(
        "training_bytes",
        bytes_of(lambda n, t, b: n * int(b) / 8 + 16 * t),
        "do not round",
    ),
]


def pairs(rule, axis=0):
    """front with another rule for who dominates whom, given (cost_j, cost_i, loss_j,
    loss_i).
    """

    def front(cost, loss):
        return ~rule(cost[:, None], cost, loss[:, None], loss).any(axis)

    return front


def dominates(a, b, x, y):
    return (a <= b) & (x <= y) & ((a < b) | (x < y))


def only_the_best(cost, loss):
    return loss == loss.min()


def the_dominated(cost, loss):
    return ~pairs(dominates)(cost, loss)


def without_duplicates(cost, loss):
    """A sweep in the order of cost that keeps the first of equals only."""
    keep, best = torch.zeros(len(cost), dtype=torch.bool), float("inf")
    for i in sorted(range(len(cost)), key=lambda i: (cost[i].item(), loss[i].item())):
        if loss[i] < best:
            keep[i], best = True, loss[i].item()
    return keep


def as_numbers(cost, loss):
    return pairs(dominates)(cost, loss).nonzero().flatten()


FRONT = [
    Wrong(
        "front", pairs(lambda a, b, x, y: (a <= b) & (x <= y)), "dominated by itself"
    ),
    Wrong(
        "front",
        pairs(lambda a, b, x, y: (a < b) & (x < y)),
        "one strict comparison is enough",
    ),
    Wrong("front", pairs(lambda a, b, x, y: (a < b) | (x < y)), "not enough"),
    Wrong("front", pairs(dominates, axis=1), "axes are swapped"),
    Wrong("front", the_dominated, "return the others"),
    Wrong("front", only_the_best, "smallest loss"),
    Wrong("front", without_duplicates, "equal in both, one is lost"),
    Wrong("front", as_numbers, "these are places"),
]


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_everywhere(model, batches):
    lora.apply(model, lora.LoRAConfig(r=1, alpha=2, target_modules="all-linear"))
    tasks.fit(model, batches[:3], lr=1e-2)
    return trained(model)


def biases_everywhere(model, batches):
    bitfit.apply(model, bitfit.BitFitConfig("all-linear"))
    tasks.fit(model, batches[:3], lr=3e-2)
    return trained(model)


def a_soft_prompt(model, batches):
    prompt_tuning.apply(model, prompt_tuning.PromptTuningConfig(4))
    tasks.fit(model, batches[:8], lr=0.3)
    return trained(model)


def at_the_rate_of_lora(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches[:10], lr=1e-2)
    return trained(model)


def twice_over_the_data(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(
        model,
        [
            b._replace(
                input_ids=b.input_ids[:1],
                labels=b.labels[:1],
                attention_mask=b.attention_mask[:1],
            )
            for b in batches + batches
        ],
        lr=0.3,
    )
    return trained(model)


def by_hand(model, batches):
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    return 128


def beside_the_optimizer(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches[:2], lr=0.1)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    return trained(model)


def merged(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches[:2], lr=0.1)
    ia3.merge_and_unload(model)
    return 2048


def a_wrong_count(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches[:2], lr=0.1)
    return 100


REACH = [
    Wrong("reach", lora_everywhere, "9,728 parameters"),
    Wrong("reach", biases_everywhere, "5,120 parameters"),
    Wrong("reach", a_soft_prompt, "held-out loss is"),
    Wrong("reach", at_the_rate_of_lora, "another rate"),
    Wrong("reach", twice_over_the_data, "80 optimizer steps"),
    Wrong("reach", by_hand, "no optimizer"),
    Wrong("reach", beside_the_optimizer, "model.norm.weight changed"),
    Wrong("reach", merged, "merged"),
    Wrong("reach", a_wrong_count, "you returned 100"),
]

# Kinds of mistake that once had no sentence, or a misleading one.


def by_cost(cost, loss):
    kept = torch.zeros(len(cost), dtype=torch.bool)
    least = torch.inf
    for i in cost.argsort(stable=True).tolist():
        if loss[i] < least:
            kept[i] = True
            least = loss[i]
    return kept


def the_ends(cost, loss):
    return (cost == cost.min()) | (loss == loss.min())


def a_copy(model, batches):
    other = copy.deepcopy(model)
    ia3.apply(other, ia3.IA3Config())
    tasks.fit(other, batches[:1], lr=0.1)
    return trained(other)


def taken_out_again(model, batches):
    ia3.apply(model, ia3.IA3Config())
    tasks.fit(model, batches[:1], lr=0.1)
    ia3.remove(model)
    return 2048


MORE = [
    Wrong("training_bytes", bytes_of(lambda n, t, b: n * b / 8 + 14 * t), "or its"),
    Wrong("training_bytes", bytes_of(lambda n, t, b: n * b / 8 + 18 * t), "too many"),
    Wrong(
        "training_bytes",
        bytes_of(lambda n, t, b: (n + t) * b / 8 + 14 * t),
        "the base's alone",
    ),
    Wrong(
        "training_bytes",
        bytes_of(lambda n, t, b: n * b / 8 + 2 * n + 16 * t),
        "no gradient",
    ),
    Wrong("front", by_cost, "with a loss below all before"),
    Wrong("front", the_ends, "the two ends"),
    Wrong(
        "front",
        pairs(lambda a, b, x, y: (a < b) & (x <= y)),
        "smaller loss at the same cost",
    ),
    Wrong(
        "front",
        pairs(lambda a, b, x, y: (a <= b) & (x < y)),
        "smaller cost at the same loss",
    ),
    Wrong("front", lambda cost, loss: cost + loss == (cost + loss).min(), "sum"),
    Wrong("reach", a_copy, "not a copy"),
    Wrong("reach", taken_out_again, "leave the method in it"),
]


def in_bits(total, trained, base_bits):
    return (total * base_bits + trained * 128) / 8


def by_transposing(cost, loss):
    no_worse = (cost <= cost[:, None]) & (loss <= loss[:, None])
    return ~(no_worse & ~no_worse.T).any(1)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("training_bytes", in_bits),
        ("front", by_transposing),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    result = verdict(check, exercise, answer)
    assert result.outcome == "right", str(result)


test_wrong_answers = rejects("04-peft/11-best-practice", BYTES + FRONT + REACH + MORE)
