"""One Llama block in three frameworks beside ours: what the page's table says of it.

Their files are those of scripts/golden/port_block_goldens.py.
"""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmlab.chips.ascend_and_other_accelerators import porting
from llmlab.models.llama import Llama, LlamaConfig

FOLDER = Path(__file__).parents[1] / "golden"
INPUTS = FOLDER / "port_inputs.safetensors"
WHOSE = {
    "Paddle": (porting.paddle_places, porting.from_paddle),
    "PaddleFormers": (porting.paddle_places, porting.from_paddle),
    "MindSpore": (porting.mindspore_places, porting.from_mindspore),
}
TURNED = "grad model.layers.0.self_attn.q_proj.weight"


def config(**changes) -> LlamaConfig:
    with safe_open(INPUTS, "pt") as file:
        shape = json.loads(file.metadata()["shape"])
    return LlamaConfig(**shape | changes)


def block() -> tuple[Llama, torch.Tensor, torch.Tensor]:
    """Our model, the input, the gradient of the logits."""
    given = {name: x.float() for name, x in load_file(INPUTS).items()}
    h, seed = given.pop("h"), given.pop("grad of logits")
    model = Llama(config())
    model.load_state_dict(given)
    return model, h, seed


@cache
def ours() -> dict[str, torch.Tensor]:
    """Our logits, and the gradients of h and of all weights but the embeddings."""
    model, h, seed = block()
    logits = model(inputs_embeds=h.requires_grad_())
    logits.backward(seed)
    found = {"logits": logits.detach(), "grad h": h.grad}
    for name, p in model.named_parameters():
        if name != porting.EMBEDDING:  # h was given: no gradient reaches the table
            found[f"grad {name}"] = p.grad
    return found


def stored(whose: str) -> dict[str, torch.Tensor]:
    """A framework's file."""
    return load_file(FOLDER / f"port_{whose.lower()}.safetensors")


@cache
def theirs(whose: str) -> dict[str, torch.Tensor]:
    """The same of a framework; our map brings its gradients home."""
    places, back = WHOSE[whose]
    found = stored(whose)
    kept = {name: found.pop(name) for name in ("logits", "grad h")}
    grads = {name.removeprefix("grad "): x for name, x in found.items()}
    if whose == "Paddle":  # a head of nn.Linear, which PaddleFormers has not
        grads[porting.HEAD] = grads[porting.HEAD].T.contiguous()
    table = places(config())[porting.EMBEDDING]
    home = back(grads | {table.name: torch.zeros(table.shape)}, config())
    del home[porting.EMBEDDING]
    return kept | {f"grad {name}": x for name, x in home.items()}


def apart(there: torch.Tensor, here: torch.Tensor) -> float:
    """The largest difference, beside the largest number."""
    with torch.no_grad():
        return float((there - here).abs().max() / here.abs().max())


def near(there: torch.Tensor, here: torch.Tensor) -> bool:
    """Within rounding of fp32."""
    return apart(there, here) < 3e-6


@pytest.mark.parametrize("whose", WHOSE)
def test_logits_and_gradients(whose):
    """Of the input and of all weights."""
    found = theirs(whose)
    assert found.keys() == ours().keys()
    for name, here in ours().items():
        assert near(found[name], here), name


@pytest.mark.parametrize("whose", WHOSE)
def test_the_table_says_how_far_they_are_apart(whose):
    """Rounding differs from CPU to CPU, so the stored figure is a bound, not a copy."""
    with (porting.DATA / "block.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["framework"]: row for row in csv.DictReader(file)}
    assert rows.keys() == WHOSE.keys()
    far = {name: apart(x, ours()[name]) for name, x in theirs(whose).items()}
    most = {"logits": far.pop("logits"), "gradients": max(far.values())}
    for kind, value in most.items():
        said = float(rows[whose][kind])
        assert value <= 3 * said
        assert said < 1e-5


@pytest.mark.parametrize("whose", ["Paddle", "PaddleFormers"])
def test_a_wrong_layout_would_show(whose):
    """W_q is square: only the numbers tell that it lies the wrong way round."""
    found, here = stored(whose)[TURNED], ours()[TURNED]
    assert found.shape == here.shape
    assert here.shape[0] == config().hidden_size
    assert apart(found, here) > 0.1
