"""A block of a GLM: who sees whom, by changing one token after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.chips.ascend_and_other_accelerators import glm

GOLDEN = Path(__file__).parents[1] / "golden/glm.json"
SMALL = glm.GLMConfig(layers=3, hidden=24, heads=3, inner=40, vocab=50)


def run(x, prompt, places=None):
    length = len(x)
    if places is None:
        places = glm.positions(length, prompt, prompt - 1)
    mask = glm.prefix_mask(length, prompt)
    return glm.block(x, glm.weights(SMALL), SMALL, mask, places)


@settings(max_examples=15)
@given(length=st.integers(2, 7), data=st.data())
def test_a_token_changes_those_that_see_it_and_no_other(length, data):
    prompt = data.draw(st.integers(1, length))
    token = data.draw(st.integers(0, length - 1))
    x = torch.randn(length, 24, generator=torch.Generator().manual_seed(length))
    changed = x.clone()
    changed[token, ::2] += 1  # a norm would take away what all channels share
    differs = (run(x, prompt) - run(changed, prompt)).abs().amax(-1) > 1e-6
    wanted = [token <= i or token < prompt for i in range(length)]
    assert differs.tolist() == wanted


def test_without_a_prompt_it_is_causal_and_with_all_of_it_nothing_is_hidden():
    assert torch.equal(glm.prefix_mask(5, 0), torch.ones(5, 5).tril().bool())
    assert glm.prefix_mask(5, 5).all()


def test_positions_of_the_paper():
    """GLM, figure 2: x₁ x₂ [M] x₄ [M] x₆ with spans after it, one span here."""
    assert glm.positions(7, 4, 2).tolist() == [
        [0, 1, 2, 3, 2, 2, 2],
        [0, 0, 0, 0, 1, 2, 3],
    ]


def test_scores_depend_on_distances_of_both_positions():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, generator=draw)

    def score(a, b):
        place = [torch.tensor(each)[:, None] for each in (a, b)]
        return (glm.turn_twice(q, place[0]) * glm.turn_twice(k, place[1])).sum()

    same = score([3, 1], [1, 0])
    torch.testing.assert_close(score([13, 6], [11, 5]), same)
    assert (score([4, 1], [1, 0]) - same).abs() > 1e-3
    assert (score([3, 2], [1, 0]) - same).abs() > 1e-3


def test_the_residual_comes_from_behind_the_norm():
    """With nothing added, y = α LN(α LN(x)): scale and shift of x do not matter."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    w = glm.weights(SMALL)
    for name in w:
        if name.startswith("dense") and not name.startswith("dense_h"):
            w[name] = torch.zeros_like(w[name])
    mask, places = glm.prefix_mask(4, 2), glm.positions(4, 2, 1)
    y = glm.block(x, w, SMALL, mask, places)
    torch.testing.assert_close(
        glm.block(3 * x + 1, w, SMALL, mask, places), y, rtol=1e-3, atol=1e-3
    )
    assert SMALL.alpha == pytest.approx(6**0.5)


def test_parameters_by_counting_and_as_published():
    counted = sum(weight.numel() for weight in glm.weights(SMALL).values())
    rest = 50 * 24 + 2 * 24
    assert glm.parameters(SMALL) == 3 * counted + rest
    assert glm.parameters(glm.GLMConfig()) == pytest.approx(6.2e9, rel=0.01)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: glm.GLMConfig(hidden=20, heads=3), "hidden=20"),
        (lambda: glm.GLMConfig(hidden=6, heads=3), "a multiple of 4"),
        (lambda: glm.prefix_mask(3, 4), "prompt=4"),
        (lambda: glm.positions(5, 3, 3), "mask=3"),
    ],
)
def test_nonsense_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_published_block_computes_the_same():
    """scripts/golden/asc_glm_goldens.py ran `modeling_chatglm.py`."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    x, y = torch.tensor(golden["x"]), torch.tensor(golden["y"])
    places = glm.positions(len(x), golden["prompt"], golden["mask"])
    torch.testing.assert_close(run(x, golden["prompt"], places), y)
