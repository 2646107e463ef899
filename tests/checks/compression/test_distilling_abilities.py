"""Wrong answers to the exercises of 06-compression/13-distilling-abilities, each with
the diagnosis that it must get.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from llmlab.checks.compression.distilling_abilities import check
from tests.checks.rejecting import Wrong, rejects, verdict

# 1 ------------------------------------------------------------------------------------


def masked(
    start=lambda at, p: at >= p,
    stop=lambda at, n: at < n,
    fill=-100,
):
    """labels with one thing changed."""

    def answer(ids, prompts, lengths):
        at = torch.arange(ids.shape[1])
        learnt = start(at, prompts[:, None]) & stop(at, lengths[:, None])
        return ids.masked_fill(~learnt, fill)

    return answer


def anything(at, n):
    return (at >= 0).expand(len(n), -1)


def by_pad_token(ids, prompts, lengths):
    at = torch.arange(ids.shape[1])
    return ids.masked_fill((ids == 1) | (at < prompts[:, None]), -100)


def row_by_row(ids, prompts, lengths):
    out = torch.full_like(ids, -100)
    for row, (p, n) in enumerate(zip(prompts, lengths, strict=True)):
        out[row, p:n] = ids[row, p:n]
    return out


def by_cumsum(ids, prompts, lengths):
    ones = torch.ones_like(ids).cumsum(1) - 1
    inside = (ones - prompts[:, None] >= 0) * (lengths[:, None] - ones > 0)
    return torch.where(inside.bool(), ids, torch.tensor(-100))


def moved_labels(ids, prompts, lengths):
    out = masked()(ids, prompts, lengths)
    return torch.cat([out[:, 1:], torch.full_like(out[:, :1], -100)], dim=1)


def the_mask(ids, prompts, lengths):
    at = torch.arange(ids.shape[1])
    return ((at >= prompts[:, None]) & (at < lengths[:, None])).long()


def added(ids, prompts, lengths):
    return masked()(ids, prompts, prompts + lengths)


def first_row_for_all(ids, prompts, lengths):
    return masked()(ids, prompts[:1].expand_as(prompts), lengths)


def first_length_for_all(ids, prompts, lengths):
    return masked()(ids, prompts, lengths[:1].expand_as(lengths))


def labels_in_place(ids, prompts, lengths):
    at = torch.arange(ids.shape[1])
    ids[(at < prompts[:, None]) | (at >= lengths[:, None])] = -100
    return ids


# 2 ------------------------------------------------------------------------------------


def mean(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def tasks(
    weigh=lambda a, r, alpha: alpha * a + (1 - alpha) * r,
    of=mean,
):
    """mt_cot_loss with one thing changed."""

    def answer(answer_logits, answer_labels, rationale_logits, rationale_labels, alpha):
        a = of(answer_logits, answer_labels)
        return weigh(a, of(rationale_logits, rationale_labels), alpha)

    return answer


def token_by_token(a, of_a, r, of_r, alpha):
    total = 0.0
    for weight, logits, labels in ((alpha, a, of_a), (1 - alpha, r, of_r)):
        log_q = logits.log_softmax(-1)
        picked = [
            -log_q[b, t - 1, labels[b, t]]
            for b in range(len(labels))
            for t in range(1, labels.shape[1])
            if labels[b, t] != -100
        ]
        total = total + weight * torch.stack(picked).mean()
    return total


def by_gather(a, of_a, r, of_r, alpha):
    def mean_of(logits, labels):
        kept = labels[:, 1:] != -100
        safe = labels[:, 1:].clamp(min=0)
        picked = logits[:, :-1].gather(-1, safe[..., None]).squeeze(-1)
        loss = logits[:, :-1].logsumexp(-1) - picked
        return (loss * kept).sum() / kept.sum()

    return torch.lerp(mean_of(r, of_r), mean_of(a, of_a), alpha)


def one_mean(a, of_a, r, of_r, alpha):
    logits = torch.cat([a[:, :-1].flatten(0, 1), r[:, :-1].flatten(0, 1)])
    return F.cross_entropy(
        logits, torch.cat([x[:, 1:].flatten() for x in (of_a, of_r)])
    )


def not_moved(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def moved_back(logits, labels):
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())


def summed(logits, labels):
    flat = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum")


def over_all_places(logits, labels):
    return summed(logits, labels) / labels[:, 1:].numel()


def each_reply(logits, labels):
    rows = [mean(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    return torch.stack(rows).mean()


def ignored_as_zero(logits, labels):
    return mean(logits, labels.clamp(min=0))


def always_06(a, of_a, r, of_r, alpha):
    return tasks()(a, of_a, r, of_r, 0.6)


def one_gradient(a, of_a, r, of_r, alpha):
    return tasks()(a, of_a, r.detach(), of_r, alpha)


# 3 ------------------------------------------------------------------------------------


def last(text):
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def filtered(
    right=lambda text, answer: last(text) == answer,
    once=lambda kept: list(dict.fromkeys(kept)),
    cut=lambda kept, most: kept[:most],
):
    """keep with one thing changed."""

    def answer(sampled, answer, most):
        return cut(once([t for t in sampled if right(t, answer)]), most)

    return answer


def by_a_loop(sampled, answer, most):
    kept = []
    for text in sampled:
        if len(kept) == most:
            break
        if last(text) == answer and text not in kept:
            kept.append(text)
    return kept


def by_reverse_search(sampled, answer, most):
    seen, kept = set(), []
    for text in sampled:
        match = re.search(r"(-?\d+)\D*$", text)
        if match and int(match[1]) == answer and text not in seen:
            seen.add(text)
            kept.append(text)
    return kept[:most]


def limit_first(sampled, answer, most):
    right = [t for t in sampled if last(t) == answer][:most]
    return list(dict.fromkeys(right))


def limit_of_all(sampled, answer, most):
    return filtered()(sampled[:most], answer, most)


def number_at_the_end(text, answer):
    return bool(re.search(rf"(?<![-\d]){answer}$", text))


def no_number_stops(sampled, answer, most):
    right = [t for t in sampled if int(re.findall(r"-?\d+", t)[-1]) == answer]
    return list(dict.fromkeys(right))[:most]


def asks_after_appending(sampled, answer, most):
    kept = []
    for text in sampled:
        if last(text) == answer and text not in kept:
            kept.append(text)
            if len(kept) == most:
                break
    return kept


def without_sign(text, answer):
    found = re.findall(r"\d+", text)
    return bool(found) and int(found[-1]) == abs(answer)


def first_number(text, answer):
    found = re.findall(r"-?\d+", text)
    return bool(found) and int(found[0]) == answer


def no_number_kept(text, answer):
    return last(text) in (answer, None)


# 4 ------------------------------------------------------------------------------------


def pairs(
    change=lambda p, w, q, n: p != q,
    both=lambda p, w, q, n: (p == w) & (q == n),
    finish=lambda c, b: (c.float().mean().item(), b.float().mean().item()),
):
    """consistency with one thing changed."""

    def answer(predicted, labels, predicted_new, new):
        case = (predicted, labels, predicted_new, new)
        return finish(change(*case), both(*case))

    return answer


def pair_by_pair(predicted, labels, predicted_new, new):
    rows = list(
        zip(*(x.tolist() for x in (predicted, labels, predicted_new, new)), strict=True)
    )
    changed = sum(a != c for a, _, c, _ in rows) / len(rows)
    return changed, sum(a == b and c == d for a, b, c, d in rows) / len(rows)


def as_tensors(predicted, labels, predicted_new, new):
    both = torch.stack([predicted == labels, predicted_new == new]).all(0)
    return (predicted != predicted_new).double().mean(), both.double().mean()


def mean_of_accuracies(predicted, labels, predicted_new, new):
    a, b = (predicted == labels).float().mean(), (predicted_new == new).float().mean()
    return (predicted != predicted_new).float().mean(), (a + b) / 2


def changed_of_right(predicted, labels, predicted_new, new):
    right = predicted == labels
    changed = (predicted != predicted_new)[right].float().mean()
    return changed, (right & (predicted_new == new)).float().mean()


def product(predicted, labels, predicted_new, new):
    a, b = (predicted == labels).float().mean(), (predicted_new == new).float().mean()
    return (predicted != predicted_new).float().mean(), a * b


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("labels", row_by_row),
        ("labels", by_cumsum),
        ("mt_cot_loss", token_by_token),
        ("mt_cot_loss", by_gather),
        ("keep", by_a_loop),
        ("keep", by_reverse_search),
        ("consistency", pair_by_pair),
        ("consistency", as_tensors),
    ],
)
def test_right_answers_written_otherwise(exercise, answer):
    for seed in (0, 1, 2):
        result = verdict(check, exercise, answer, seed)
        assert result.outcome == "right", str(result)


L, M, K, C = "labels", "mt_cot_loss", "keep", "consistency"
test_wrong_answers = rejects(
    "06-compression/13-distilling-abilities",
    [
        Wrong(L, masked(start=anything), "the prompt is learnt"),
        Wrong(L, masked(stop=anything), "padding is learnt, too"),
        Wrong(L, masked(start=lambda at, p: at > p), "first token of the reply"),
        Wrong(L, masked(start=lambda at, p: at >= p - 1), "last token of the prompt"),
        Wrong(L, masked(stop=lambda at, n: at < n - 1), "the end token is missing"),
        Wrong(L, by_pad_token, "the end token is missing"),
        Wrong(L, masked(stop=lambda at, n: at <= n), "one token of padding"),
        Wrong(L, masked(fill=0), "0 is a token"),
        Wrong(L, masked(fill=-1), "what is left out is −1"),
        Wrong(L, moved_labels, "moved by one"),
        Wrong(L, the_mask, "this is the mask"),
        Wrong(L, added, "you added the prompt"),
        Wrong(L, first_row_for_all, "first example's prompt is taken for all"),
        Wrong(L, first_length_for_all, "first example's length is taken for all"),
        Wrong(L, labels_in_place, "in place"),
        Wrong(M, tasks(lambda a, r, alpha: alpha * r + (1 - alpha) * a), "α weighs"),
        Wrong(M, tasks(lambda a, r, alpha: a + r), "the weights are missing"),
        Wrong(M, tasks(lambda a, r, alpha: (a + r) / 2), "weigh the same"),
        Wrong(M, tasks(lambda a, r, alpha: alpha * a + r), "rationales' weight"),
        Wrong(M, tasks(lambda a, r, alpha: alpha * a), "only the answers"),
        Wrong(M, tasks(of=not_moved), "not moved"),
        Wrong(M, tasks(of=moved_back), "the wrong way"),
        Wrong(M, tasks(of=summed), "this is the sum"),
        Wrong(M, tasks(of=over_all_places), "−100 does not count"),
        Wrong(M, tasks(of=each_reply), "each reply weighs the same"),
        Wrong(M, tasks(of=ignored_as_zero), "learnt, as token 0"),
        Wrong(M, one_mean, "one mean over both"),
        Wrong(M, always_06, "from the arguments"),
        Wrong(M, one_gradient, "gradient"),
        Wrong(K, filtered(lambda t, a: str(a) in t), "its last number is"),
        Wrong(K, filtered(lambda t, a: t.endswith(str(a))), "was kept"),
        Wrong(K, filtered(first_number), "its last number is"),
        Wrong(K, filtered(without_sign), "with its sign"),
        Wrong(K, filtered(no_number_kept), "no number at all"),
        Wrong(K, filtered(once=lambda kept: kept), "came back twice"),
        Wrong(K, filtered(once=lambda kept: sorted(set(kept))), "in the order"),
        Wrong(K, filtered(cut=lambda kept, most: kept), "and most ="),
        Wrong(K, filtered(cut=lambda kept, most: kept[-most:]), "not the first"),
        Wrong(K, filtered(cut=lambda kept, most: kept[: most - 1]), "came back, and"),
        Wrong(K, filtered(once=lambda kept: sorted(set(kept))[::-1]), "in the order"),
        Wrong(K, limit_first, "`most` counts copies"),
        Wrong(K, limit_of_all, "filter first, and cut"),
        Wrong(K, filtered(number_at_the_end), "'#12, I think.' is missing"),
        Wrong(
            K, filtered(lambda t, a: re.findall(r"-?\d", t)[-1:] == [str(a)]), "whole"
        ),
        Wrong(K, filtered(cut=lambda kept, most: kept[:1]), "one rationale came back"),
        Wrong(K, no_number_stops, "a rationale without a number stops it"),
        Wrong(K, asks_after_appending, "most = 0"),
        Wrong(C, pairs(finish=lambda c, b: pairs_swapped(c, b)), "changed comes first"),
        Wrong(C, mean_of_accuracies, "mean of the two accuracies"),
        Wrong(C, product, "product of the two"),
        Wrong(C, pairs(both=lambda p, w, q, n: (p == w) | (q == n)), "one half right"),
        Wrong(C, pairs(both=lambda p, w, q, n: q == n), "edited questions alone"),
        Wrong(C, pairs(both=lambda p, w, q, n: p == w), "before the edit alone"),
        Wrong(
            C,
            pairs(both=lambda p, w, q, n: (p == w) & (q == w)),
            "with the old label",
        ),
        Wrong(C, pairs(change=lambda p, w, q, n: p == q), "stayed"),
        Wrong(C, pairs(change=lambda p, w, q, n: w != n), "compares labels"),
        Wrong(
            C,
            pairs(finish=lambda c, b: (c.sum().item(), b.sum().item())),
            "these are sums",
        ),
        Wrong(
            C,
            pairs(finish=lambda c, b: (100 * c.float().mean(), 100 * b.float().mean())),
            "these are percent",
        ),
        Wrong(C, changed_of_right, "pairs whose first half is right: divide"),
        Wrong(
            C,
            pairs(change=lambda p, w, q, n: (p != q) & (p == w)),
            "only pairs whose first half is right",
        ),
        Wrong(
            C,
            pairs(
                finish=lambda c, b: (
                    c.float().mean().item(),
                    (b.sum() / c.sum()).item(),
                )
            ),
            "pairs that changed",
        ),
    ],
)


def pairs_swapped(changed, both):
    return both.float().mean().item(), changed.float().mean().item()
