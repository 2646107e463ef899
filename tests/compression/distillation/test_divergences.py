"""The divergences and Hinton's loss: closed forms, PyTorch, limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmlab.compression.distillation import divergences as d
from llmlab.compression.distillation import gkd, hinton
from llmlab.models.language_model import next_token_loss


def logits(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=random, dtype=dtype)


def pair(*shape):
    return logits(*shape, seed=1), logits(*shape, seed=2)


def some_mask(B=3, T=6):
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 1:] = True
    mask[1, 3:5] = True
    return mask


def test_kl_of_four_numbers():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([0.9, 0.1], dtype=torch.float64)
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert d.kl(p.log(), q.log()).item() == pytest.approx(forward, rel=1e-12)
    assert d.kl(q.log(), p.log()).item() == pytest.approx(reverse, rel=1e-12)


def test_kl_div_takes_its_arguments_the_other_way_round():
    log_p, log_q = (z.log_softmax(-1) for z in pair(4, 9))
    ours = d.kl(log_p, log_q).mean()
    torch.testing.assert_close(
        ours, F.kl_div(log_q, log_p.exp(), reduction="batchmean")
    )
    torch.testing.assert_close(
        ours, F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    )
    other_way = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert abs(float(ours - other_way)) > 0.05


def test_a_token_that_the_teacher_never_writes_costs_nothing_and_has_no_nan():
    v, z = pair(2, 3, 6)
    v[..., 4] = -torch.inf  # as in logits of which only the best k were stored
    z.requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = hinton.soft_loss(v, z, mask)
    loss.backward()
    p = v.softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - z.log_softmax(-1)), 0).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(z.grad, (z.softmax(-1) - p).detach() / 6)
    for beta in (0.3, 0.7):
        z.grad = None
        gkd.loss(v, z, mask, beta).backward()
        assert z.grad.isfinite().all()
    # in reverse it is forbidden
    assert gkd.loss(v, z, mask, beta=1).item() == math.inf


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_definition(beta):
    v, z = pair(3, 6, 11)
    p, q = v.softmax(-1), z.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    torch.testing.assert_close(d.jsd(v, z, beta), expected.sum(-1))


def test_jsd_of_a_half_is_bounded_and_symmetric():
    v, z = pair(3, 6, 11)
    torch.testing.assert_close(d.jsd(v, z, 0.5), d.jsd(z, v, 0.5))
    torch.testing.assert_close(d.jsd(v, z, 0.2), d.jsd(z, v, 0.8))
    apart = torch.eye(2, dtype=torch.float64) * 1e3
    assert d.jsd(apart[0], apart[1], 0.5).item() == pytest.approx(math.log(2))


def test_the_ends_are_the_two_kls_and_the_limits_point_there():
    v, z = pair(2, 3, 8)
    z.requires_grad_()
    ends = {0: d.kl(v.log_softmax(-1), z.log_softmax(-1))}
    ends[1] = d.kl(z.log_softmax(-1), v.log_softmax(-1))
    for end, near, share in ((0, 1e-6, 1e-6), (1, 1 - 1e-6, 1e-6)):
        at = d.jsd(v, z, end)
        torch.testing.assert_close(at, ends[end])
        (grad,) = torch.autograd.grad(at.sum(), z)
        close_by = d.jsd(v, z, near)
        (grad_near,) = torch.autograd.grad(close_by.sum(), z)
        assert close_by.max() < 1e-4  # the value jumps …
        torch.testing.assert_close(close_by / share, at, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grad_near / share, grad, rtol=1e-3, atol=1e-3)


def test_the_mean_is_over_tokens_of_replies_and_masked_ones_have_no_say():
    v, z = pair(3, 6, 5)
    mask = some_mask()
    z.requires_grad_()
    loss = gkd.loss(v, z, mask, 0.5)
    each = d.jsd(v, z, 0.5)
    expected = sum(each[b, t] for b, t in mask.nonzero().tolist()) / 7
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (z.grad[~mask] == 0).all()
    assert (z.grad[mask].abs().sum(-1) > 0).all()
    other = v.clone()
    other[~mask] = torch.nan
    torch.testing.assert_close(gkd.loss(other, z, mask.long(), 0.5), loss)


def test_no_gradient_reaches_the_teacher():
    v, z = pair(3, 6, 5)
    v.requires_grad_()
    z.requires_grad_()
    losses = (
        gkd.loss(v, z, some_mask(), 0.5),
        gkd.loss(v, z, some_mask(), 1),
        hinton.soft_loss(v, z, some_mask(), 3.0),
    )
    sum(losses).backward()
    assert v.grad is None
    assert z.grad.abs().sum() > 0


def test_bf16_logits_are_compared_in_float32():
    v, z = (x.bfloat16() for x in pair(3, 6, 5))
    loss = gkd.loss(v, z, some_mask(), 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, gkd.loss(v.float(), z.float(), some_mask(), 0.5))


# Hinton -------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_the_gradient_is_that_of_the_paper(T):
    v, z = pair(3, 6, 5)
    z.requires_grad_()
    mask = some_mask()
    hinton.soft_loss(v, z, mask, T).backward()
    # equation 2: (q − p) / T, here times T² and over the 7 tokens
    expected = T * ((z / T).softmax(-1) - (v / T).softmax(-1)).detach()
    torch.testing.assert_close(z.grad[mask], expected[mask] / 7)


def test_at_high_temperature_it_matches_centred_logits():
    v, z = pair(1, 1, 8)
    z.requires_grad_()
    hinton.soft_loss(v, z, torch.ones(1, 1), 1e4).backward()
    centred = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    torch.testing.assert_close(z.grad, centred.detach() / 8, rtol=1e-3, atol=1e-3)


def test_soft_and_hard_are_weighed_and_the_hard_part_is_at_temperature_one():
    v, z = pair(3, 6, 5)
    mask = some_mask()
    labels = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    labels[~mask] = -100
    hard = F.cross_entropy(z.transpose(1, 2), labels)  # −100 is left out
    torch.testing.assert_close(hinton.hard_loss(z, labels, mask), hard)
    soft = hinton.soft_loss(v, z, mask, 3.0)
    found = hinton.loss(v, z, labels, mask, temperature=3.0, alpha=0.7)
    torch.testing.assert_close(found, 0.7 * soft + 0.3 * hard)


def test_hard_labels_are_the_limit_of_a_teacher_who_is_sure():
    z = logits(2, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    sure = 1e4 * F.one_hot(labels, 5).double()
    mask = torch.ones(2, 4)
    soft = hinton.soft_loss(sure, z, mask)
    torch.testing.assert_close(soft, hinton.hard_loss(z, labels, mask))


def test_hard_loss_on_shifted_tokens_is_next_token_loss():
    z = logits(2, 5, 7)
    ids = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(3))
    ours = hinton.hard_loss(z[:, :-1], ids[:, 1:], torch.ones(2, 4))
    torch.testing.assert_close(
        ours, next_token_loss(z, ids).double(), rtol=1e-5, atol=0
    )


# Refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v, z, m: gkd.loss(v, z, m, 1.2), r"beta=1.2 must be 0 … 1"),
        (lambda v, z, m: gkd.loss(v, z, m, 0.5, 0.0), r"temperature=0.0 must be"),
        (lambda v, z, m: gkd.loss(v, z, m * 0), "mask is all zeros"),
        (lambda v, z, m: gkd.loss(v, z, m[:, :3]), r"mask has shape \(3, 3\)"),
        (lambda v, z, m: gkd.loss(v[..., :4], z, m), "vocabularies differ"),
        (lambda v, z, m: gkd.loss(v[:1], z, m), "have shapes"),
        (lambda v, z, m: hinton.soft_loss(v, z, m, -1.0), "temperature=-1.0"),
        (lambda v, z, m: hinton.hard_loss(z, m[:1].long(), m), "labels have shape"),
        (
            lambda v, z, m: hinton.loss(v, z, m.long(), m, alpha=1.1),
            r"alpha=1.1 must be 0 … 1",
        ),
    ],
)
def test_refusals(call, says):
    v, z = pair(3, 6, 5)
    with pytest.raises(ValueError, match=says):
        call(v, z, some_mask())
