"""Packed documents and masks of every shape, against transformers and against the
documents one at a time: logits and gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmlab.models.attention import (
    attention_mask_for,
    document_mask,
    documents_of,
    sdpa,
)
from llmlab.models.cache import KVCache
from tests.models.hugging_face import make, theirs

LENGTHS = [[3, 4, 2], [5, 1, 3]]  # of the documents in each row
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
BLOCKS = document_mask(documents_of(POSITIONS))  # (2, 1, 9, 9)
KEPT = {
    "boolean (B, 1, T, T)": BLOCKS,
    "boolean (B, T, T)": BLOCKS[:, 0],
    "boolean, a head each": BLOCKS.expand(-1, 4, -1, -1),
    "added to scores": torch.where(BLOCKS, 0.0, torch.finfo(torch.float32).min),
    "added, (B, T, T)": torch.where(BLOCKS, 0.0, -torch.inf)[:, 0],
    "added, in fp64": torch.where(BLOCKS, 0.0, -1e30).double(),
}
GQA = {"num_key_value_heads": 2}


def near(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol


def alone(model, ids=IDS, lengths=LENGTHS):
    """The documents one at a time, put back into rows."""
    rows = []
    for row, sizes in zip(ids, lengths, strict=True):
        rows.append(torch.cat([model(part[None]) for part in row.split(sizes)], 1))
    return torch.cat(rows)


def gradients(model, logits):
    model.zero_grad()
    target = IDS.roll(-1, 1)
    F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    return {name: w.grad.clone() for name, w in model.named_parameters()}


def all_near(a, b):
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        near(gradient, b[name])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [{}, GQA, {**GQA, "head_dim": 6}])
def test_positions_that_start_anew_keep_documents_apart(shape, kernel):
    model = make(**shape)
    hf = theirs(model)
    hf.set_attn_implementation(kernel)
    logits = model(IDS, position_ids=POSITIONS)
    their_logits = hf(IDS, position_ids=POSITIONS, use_cache=False).logits
    near(logits, their_logits)
    near(logits, alone(model))
    assert (logits - model(IDS)).abs().max() > 1, "it matters"
    expected = gradients(model, alone(model))
    all_near(gradients(model, logits), expected)
    all_near(gradients(hf, their_logits), expected)


@pytest.mark.parametrize("mask", KEPT.values(), ids=KEPT)
def test_a_mask_for_each_pair(mask):
    model = make(**GQA)
    expected = gradients(model, alone(model))
    logits = model(IDS, position_ids=POSITIONS, attention_mask=mask)
    near(logits, alone(model))
    all_near(gradients(model, logits), expected)
    if mask.dim() == 4 and mask.dtype != torch.float64:  # transformers takes these
        hf = theirs(model)
        near(hf(IDS, position_ids=POSITIONS, attention_mask=mask).logits, logits)


def test_one_row_of_positions_for_all():
    model = make(**GQA)
    hf = theirs(model)
    expected = hf(IDS, position_ids=POSITIONS[:1], use_cache=False).logits
    near(model(IDS, position_ids=POSITIONS[:1]), expected)
    near(model(IDS, position_ids=POSITIONS[:1]), alone(model, lengths=LENGTHS[:1] * 2))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_with_a_mask_of_tokens_or_a_cache_documents_see_each_other_as_there(kernel):
    """The rule of transformers 5.23: positions separate only where neither is given."""
    from transformers import DynamicCache

    model = make(**GQA)
    hf = theirs(model)
    hf.set_attn_implementation(kernel)
    ones = torch.ones(2, 9, dtype=torch.long)
    left = ones.clone()
    left[0, :2] = 0
    for mask in (ones, left):
        call = {"position_ids": POSITIONS, "attention_mask": mask}
        near(
            model(IDS, **call)[mask.bool()],
            hf(IDS, **call, use_cache=False).logits[mask.bool()],
        )
    across = hf(IDS, position_ids=POSITIONS, past_key_values=DynamicCache()).logits
    near(model(IDS, position_ids=POSITIONS, cache=KVCache(2)), across)
    near(hf(IDS, position_ids=POSITIONS).logits, across)  # use_cache=True by default


@torch.no_grad()
def test_left_padding_before_packed_documents():
    """Padding, then two documents: as each alone."""
    model = make(**GQA)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [1] * 5 + [2] * 4])
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :2] = False
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    mask = document_mask(documents, padding)
    logits = model(IDS, position_ids=positions, attention_mask=mask)
    near(logits, alone(model, lengths=[[1, 1, 3, 4], [5, 4]]))
    hf = theirs(model)
    near(hf(IDS, position_ids=positions, attention_mask=mask).logits, logits)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_with_a_cache_a_mask_covers_what_is_in_it(kind):
    """Two documents are read into a cache, then each row goes on with its second."""
    from transformers import DynamicCache

    model = make(**GQA)
    hf = theirs(model)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 4 + [1] * 5])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    mask = document_mask(documents)
    if kind == "added":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    cache, pieces, hf_cache, hf_pieces = KVCache(2), [], DynamicCache(), []
    for a, b in ((0, 5), (5, 6), (6, 9)):
        call = {
            "position_ids": positions[:, a:b],
            "attention_mask": mask[:, :, a:b, :b],
        }
        pieces.append(model(IDS[:, a:b], **call, cache=cache))
        out = hf(IDS[:, a:b], **call, past_key_values=hf_cache)
        hf_pieces.append(out.logits)
    near(torch.cat(pieces, 1), alone(model, lengths=[[3, 6], [4, 5]]))
    near(torch.cat(pieces, 1), torch.cat(hf_pieces, 1))


@torch.no_grad()
def test_a_query_that_may_see_nothing():
    """transformers' kernel and ours give the same, and it is finite."""
    model = make(**GQA)
    mask = BLOCKS.clone()
    mask[0, :, 4] = False
    logits = model(IDS, position_ids=POSITIONS, attention_mask=mask)
    near(logits, theirs(model)(IDS, position_ids=POSITIONS, attention_mask=mask).logits)
    assert logits.isfinite().all()


@torch.no_grad()
def test_in_half_precision():
    model = make(**GQA).bfloat16()
    expected = alone(model)
    for mask in (None, KEPT["added to scores"]):
        logits = model(IDS, position_ids=POSITIONS, attention_mask=mask)
        near(logits, expected, 0.05 * expected.abs().max().item())


def test_documents():
    assert documents_of(torch.arange(5)[None]) is None
    assert documents_of(torch.arange(3, 8)[None]) is None, "a later piece of one"
    assert documents_of(torch.tensor([[0], [7]])) is None
    assert documents_of(POSITIONS).tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 1, 2, 2, 2],
    ]
    assert attention_mask_for(9, 0, None) is None
    assert sdpa(*torch.randn(3, 1, 2, 9, 4), None).shape == (1, 2, 9, 4)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (BLOCKS.long(), r"is torch.int64: it must be boolean"),
        (BLOCKS[:, 0].int(), r"is torch.int32: it must be boolean"),
        (BLOCKS[..., :8], r"has shape \(2, 1, 9, 8\): .*T=9 new tokens, S=9"),
        (torch.ones(9), r"has shape \(9,\)"),
        (BLOCKS.expand(-1, 2, -1, -1), "for 2 heads, and here are 4 query heads"),
        (torch.full((2, 9), -torch.inf), "negative numbers"),
    ],
)
def test_masks_that_could_mean_anything_are_named(mask, says):
    with pytest.raises(ValueError, match=says):
        make(**GQA)(IDS, attention_mask=mask)
