"""What marks the exercises of 04-peft/10-peft-library: `peft` on a toy Llama, judged by
this course's own modules.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llmlab.course.grading.checking import Checks, Mistake, close, diagnose, expect
from llmlab.peft import lora, walk
from llmlab.peft.lora import files
from llmlab.peft.prompt_and_prefix_tuning import prompt_tuning

check = Checks("04-peft/10-peft-library")
SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
)


def _base() -> nn.Module:
    """A toy Llama of transformers, with a different width for keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = LlamaConfig(
        **SHAPE,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _adapter(
    base: nn.Module, r: int, alpha: float, dropout: float = 0.0
) -> tuple[str, nn.Module]:
    """(folder, adapted model) of a LoRA whose B has learned something."""
    model = copy.deepcopy(base)
    lora.apply(model, lora.LoRAConfig(r=r, alpha=alpha, dropout=dropout))
    for layer in walk.installed(model, lora.LoRALinear).values():
        nn.init.normal_(layer.lora_B["default"], std=0.3)
    folder = tempfile.mkdtemp()
    files.save(model, folder)
    return folder, model.eval()


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@check.exercise(
    points=2,
    minutes=10,
    difficulty=2,
    importance=4,
    in_place=True,
    hints=(
        (
            "`peft.PeftModel.from_pretrained(base, folder)` puts the adapter on. What"
            " takes it off again?"
        ),
        (
            "Its result runs like `base`: `.eval()`, then `model(tokens).logits`."
            " Merging changes the weights of `base`."
        ),
        (
            "Load, `.eval()`, compute under `torch.no_grad()`, then `model.unload()`,"
            " then return the logits."
        ),
    ),
)
def with_adapter(answer):
    """Logits through an adapter, and the base given back as it was."""
    base, tokens = _base(), torch.randint(0, 61, (2, 5))
    folder, adapted = _adapter(base, r=3, alpha=12, dropout=0.5)
    before, plain = (
        {n: p.clone() for n, p in base.state_dict().items()},
        _logits(base, tokens),
    )
    right, what = _logits(adapted, tokens), "with_adapter(…)"
    got = expect(
        answer(base, folder, tokens), shape=(2, 5, 61), dtype=torch.float32, what=what
    ).detach()
    if not close(got, right, tol=1e-4):
        again = [answer(_as_before(base, before), folder, tokens) for _ in range(2)]
        if not close(again[0], again[1]):
            raise Mistake("two calls give different logits: dropout is on")
    diagnose(
        got,
        right=right,
        mistakes={
            "these are the logits of the plain base: the adapter is not used": plain,
            "these are probabilities: the logits are asked": right.softmax(-1),
            "these are log-probabilities: the logits are asked": right.log_softmax(-1),
        },
        tol=1e-4,
        what=what,
    )
    after = base.state_dict()
    if list(after) != list(before):
        raise Mistake(
            "the logits are right, but the adapter's layers are still in base: unload()"
            " takes them out"
        )
    if base.training:
        raise Mistake(
            "the logits are right, but base is left in training mode: it came in"
            " evaluation mode"
        )
    if changed := [n for n in before if not torch.equal(after[n], before[n])]:
        raise Mistake(
            f"the logits are right, but {changed[0]} of base has changed: do not merge,"
            " unload"
        )


def _as_before(base: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A new base with these weights."""
    fresh = _base()
    fresh.load_state_dict(weights)
    return fresh


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=4,
    in_place=True,
    hints=(
        (
            "`PeftModel.from_pretrained(base, folder, adapter_name=…)` for the first,"
            " `model.load_adapter(folder, adapter_name=…)` for the rest."
        ),
        (
            "The forward pass takes `adapter_names=[…]`, one name for each row, when"
            " the model is in evaluation mode."
        ),
        'Replace None by "__base__" and call `model(tokens, adapter_names=…)` once.',
    ),
)
def mixed_batch(answer):
    """A batch in which each row has its own adapter, in one forward pass."""
    base, tokens = _base(), torch.randint(0, 61, (5, 4))
    made = {
        name: _adapter(base, r, alpha)
        for name, r, alpha in [("tea", 2, 8), ("ale", 4, 4), ("rum", 3, 9)]
    }
    names: list[str | None] = ["rum", None, "tea", "ale", "rum"]
    alone = {name: _logits(model, tokens) for name, (_, model) in made.items()} | {
        None: _logits(base, tokens)
    }
    calls: list[int] = []
    base.model.register_forward_pre_hook(lambda *_: calls.append(1))
    what = "mixed_batch(…)"
    folders = {name: folder for name, (folder, _) in made.items()}
    got = expect(
        answer(base, folders, tokens, list(names)),
        shape=(5, 4, 61),
        dtype=torch.float32,
        what=what,
    ).detach()
    row = lambda pick: torch.stack([alone[pick(n)][i] for i, n in enumerate(names)])  # noqa: E731
    mistakes = {
        "every row went through the first adapter": alone["tea"],
        "every row went through the last adapter": alone["rum"],
        "every row went through the plain base": alone[None],
        "rows of None went through the first adapter: they ask for the plain base": row(
            lambda n: n or "tea"
        ),
        "rows of None went through the last adapter: they ask for the plain base": row(
            lambda n: n or "rum"
        ),
    }
    in_order = sorted(n or "__base__" for n in names)
    exchanged = [None if n == "__base__" else n for n in in_order]
    mistakes["the names are sorted: names[i] is that of row i"] = torch.stack(
        [alone[n][i] for i, n in enumerate(exchanged)]
    )
    if not any(close(got, value, tol=1e-4) for value in mistakes.values()):
        for i, name in enumerate(names):
            _own_adapter(i, name, got[i], {n: y[i] for n, y in alone.items()})
    diagnose(got, right=row(lambda n: n), mistakes=mistakes, tol=1e-4, what=what)
    if len(calls) != 1:
        raise Mistake(
            f"the logits are right, but the model ran {len(calls)} times: one forward"
            " pass is asked"
        )


def _own_adapter(
    i: int, name: str | None, got: Tensor, alone: dict[str | None, Tensor]
) -> None:
    """A Mistake when row i shows another adapter than its own, or none of them."""
    if close(got, alone[name], tol=1e-4):
        return
    asked = f"row {i} asks for {name!r}" if name else f"row {i} asks for the plain base"
    for other, logits in alone.items():
        if close(got, logits, tol=1e-4):
            raise Mistake(f"{asked}, and went through {other or 'the plain base'!r}")
    raise Mistake(
        f"{asked}, and its logits are those of none of the adapters alone: did several"
        " act together, or dropout?"
    )


@contextmanager
def _no_peft() -> Iterator[None]:
    """A Mistake where `peft` wraps a model."""
    import peft

    def refused(*_, **__) -> None:
        raise Mistake("do without `peft`: open the file, and join the rows yourself")

    with patch.object(peft.PeftModel, "__init__", refused):
        yield


@check.exercise(
    points=3,
    minutes=15,
    difficulty=3,
    importance=3,
    hints=(
        (
            "`safetensors.torch.load_file` opens the file;"
            " `base.get_input_embeddings()` turns tokens into rows of width d."
        ),
        (
            "Concatenate along the sequence: the prompt first, the same for every row."
            " `base(inputs_embeds=…)` takes the result."
        ),
        "Cut the first p positions off the logits: `[:, p:]`.",
    ),
)
def by_hand(answer):
    """A soft prompt without the library."""
    base, tokens = _base(), torch.randint(0, 61, (3, 6))
    adapted = prompt_tuning.apply(
        copy.deepcopy(base), prompt_tuning.PromptTuningConfig(4, init="random")
    )
    folder, what = tempfile.mkdtemp(), "by_hand(…)"
    prompt_tuning.save(adapted, folder)
    prompt = adapted.virtual_tokens.encoders["default"]().detach()
    embedded = base.get_input_embeddings()(tokens)

    @torch.no_grad()
    def run(parts, **more):
        return base(inputs_embeds=torch.cat(parts, 1), **more).logits

    soft = prompt.expand(3, -1, -1)
    whole, after = run([soft, embedded]), run([embedded, soft])
    with _no_peft():
        got = expect(answer(base, folder, tokens), what=what)
    if isinstance(got, Tensor) and got.shape == whole.shape:
        raise Mistake(
            "these are logits for the virtual tokens too: cut the first 4 positions off"
        )
    got = expect(got, shape=(3, 6, 61), dtype=torch.float32, what=what).detach()
    mistakes = {
        "these are the logits of the plain base: the prompt is not used, or"
        " comes after the tokens": _logits(base, tokens),
        "the prompt stands after the tokens, and the first positions are cut off": (
            after[:, 4:]
        ),
        "you cut the last positions off: the virtual tokens are the first": whole[
            :, :6
        ],
        "the prompt's rows are in reverse order": run([soft.flip(1), embedded])[:, 4:],
        "your logits begin one place too early: the first p are the prompt's": (
            whole[:, 3:-1]
        ),
        "the prompt stands in the place of the first tokens: it stands before them": (
            run([soft, embedded[:, 4:]])
        ),
        "the prompt is added to the first tokens: it stands before them": run(
            [soft + embedded[:, :4], embedded[:, 4:]]
        ),
        "the tokens' positions begin at 0 again: they go on behind the prompt": (
            run([soft, embedded], position_ids=torch.tensor([[*range(4), *range(6)]]))[
                :, 4:
            ]
        ),
        "the prompt stands there twice": run([soft, soft, embedded])[:, 8:],
        "only the last row of the prompt is used": run([soft[:, -1:], embedded])[:, 1:],
        "the prompt's rows are scaled to length 1: they come as they are": run(
            [soft / soft.norm(dim=-1, keepdim=True), embedded]
        )[:, 4:],
        "the prompt's rows are averaged to one": (
            run([soft.mean(1, keepdim=True), embedded])[:, 1:]
        ),
        "only the first row of the batch has the prompt, the others have zeros": run(
            [torch.cat([soft[:1], 0 * soft[1:]]), embedded]
        )[:, 4:],
        "these are probabilities: the logits are asked": whole[:, 4:].softmax(-1),
        "only the first row of the prompt is used": run([soft[:, :1], embedded])[:, 1:],
    }
    diagnose(
        got,
        right=_logits(adapted, tokens)[:, -6:],
        mistakes=mistakes,
        tol=1e-4,
        what=what,
    )
    if not close(got, whole[:, 4:], tol=1e-4):
        raise Mistake(
            "the logits differ from those of the base with the prompt before its input"
        )
