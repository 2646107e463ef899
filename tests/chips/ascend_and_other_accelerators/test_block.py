"""The table of the page: one block in three frameworks beside ours."""

from __future__ import annotations

import csv
import json
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmlab.chips.ascend_and_other_accelerators import porting
from llmlab.models.llama import Llama, LlamaConfig
from tests.chips.ascend_and_other_accelerators.test_glm import GOLDEN as BESIDE

FOLDER = BESIDE.parent
WHOSE = {
    "Paddle": ("paddle", porting.from_paddle),
    "PaddleFormers": ("paddleformers", porting.from_paddle),
    "MindSpore": ("mindspore", porting.from_mindspore),
}


@cache
def ours() -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """The logits, and the gradients by parameter and of h, of our block."""
    file = FOLDER / "port_inputs.safetensors"
    with safe_open(file, "pt") as opened:
        config = LlamaConfig(**json.loads(opened.metadata()["shape"]))
    given = {name: x.float() for name, x in load_file(file).items()}
    h = given.pop("h").requires_grad_()
    seed = given.pop("grad of logits")
    model = Llama(config)
    model.load_state_dict(given)
    logits = model(inputs_embeds=h)
    logits.backward(seed)
    found = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return config, found | {"grad h": h.grad, "logits": logits.detach()}


def compared(whose: str) -> dict[str, float]:
    """The largest difference of logits and of gradients, over the largest value."""
    config, wanted = ours()
    file, back = WHOSE[whose]
    found = load_file(FOLDER / f"port_{file}.safetensors")
    named = back_names(found, config, back)
    most = {"logits": 0.0, "gradients": 0.0}
    for name, value in named.items():
        kind = "logits" if name == "logits" else "gradients"
        far = (value - wanted[name]).abs().max() / wanted[name].abs().max()
        most[kind] = max(most[kind], float(far))
    return most


def back_names(found: dict, config: LlamaConfig, back) -> dict[str, torch.Tensor]:
    """Their gradients under our names; those that were not kept are left out."""
    rest = {name: found[name] for name in ("logits", "grad h")}
    places = (
        porting.mindspore_places(config)
        if back is porting.from_mindspore
        else porting.paddle_places(config)
    )
    grads = {}
    for place in places.values():
        theirs = found.get(f"grad {place.name}")
        if theirs is not None:
            turned = theirs.shape != torch.Size(place.shape)
            grads[place.name] = theirs.T if turned else theirs
    whole = {
        place.name: grads.get(place.name, torch.zeros(place.shape))
        for place in places.values()
    }
    ours_named = back(whole, config)
    kept = {
        f"grad {name}": ours_named[name]
        for name, place in places.items()
        if place.name in grads
    }
    return rest | kept


@cache
def stored() -> dict[str, dict[str, float]]:
    """data/block.csv."""
    with (porting.DATA / "block.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        row["framework"]: {k: float(row[k]) for k in ("logits", "gradients")}
        for row in rows
    }


@pytest.mark.parametrize("whose", WHOSE)
def test_the_table_says_how_far_they_are_apart(whose):
    """Rounding differs from CPU to CPU, so the stored figure is a bound, not a copy."""
    for kind, far in compared(whose).items():
        assert far <= 3 * stored()[whose][kind]
        assert stored()[whose][kind] < 1e-5


def test_one_layout_left_as_it_is_would_be_seen():
    config, wanted = ours()
    found = load_file(FOLDER / "port_paddle.safetensors")
    name = "grad model.layers.0.self_attn.q_proj.weight"
    assert found[name].shape == wanted[name].shape  # square: nothing else would tell
    far = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
    assert far > 0.1
    assert config.hidden_size == wanted[name].shape[0]
