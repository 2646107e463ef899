"""What the held-out tests do with a method of `held_out_methods.py`, on our side and on
`peft`'s, under the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmlab.models.language_model import next_token_loss
from llmlab.peft import walk
from llmlab.peft.adalora import adalora
from llmlab.peft.adalora.budget import RankAllocator
from tests.peft.conftest import SHAPE, make_llama
from tests.peft.held_out_methods import FOUR_BIT, GQA, METHODS


def ours_on(name: str, model: nn.Module) -> nn.Module:
    """Our method on `model`, by its one call."""
    return METHODS[name].module.apply(model, METHODS[name].config)


def theirs_on(name: str, model: nn.Module) -> nn.Module:
    """`peft`'s method on transformers' `model`."""
    import peft

    method = METHODS[name]
    config = getattr(peft, method.cls)(task_type="CAUSAL_LM", **method.settings)
    model = peft.get_peft_model(method.base(model), config).eval()
    for n, p in model.named_parameters():
        # AdaLoRA's r0, a number: on a half-precision base peft 0.21.2 lets it train
        if "ranknum" in n:
            p.requires_grad_(False)
    return model


def open_theirs(name: str, model: nn.Module, folder) -> nn.Module:
    """The adapter in `folder` on transformers' `model`, by `peft`."""
    import peft

    return peft.PeftModel.from_pretrained(METHODS[name].base(model), folder).eval()


def open_ours(name: str, model: nn.Module, folder) -> nn.Module:
    """The adapter in `folder` on `model`, by us."""
    module = METHODS[name].files or METHODS[name].module
    extra = (METHODS[name].config,) if name == "QLoRA" else ()
    return module.load(model, folder, *extra)


def save_ours(name: str, model: nn.Module, folder) -> None:
    """Our adapter into `folder`."""
    (METHODS[name].files or METHODS[name].module).save(model, folder)


def trained(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """What trains, ours or `peft`'s, under names that both sides share."""
    encoders = getattr(
        getattr(model, "virtual_tokens", None), "encoders", None
    ) or getattr(model, "prompt_encoder", ())
    if len(encoders):
        return {
            _short(n, adapter): p
            for n, p in encoders[adapter].named_parameters()
            if p.requires_grad
        }
    return {
        _short(n, adapter): p for n, p in model.named_parameters() if p.requires_grad
    }


def _short(name: str, adapter: str) -> str:
    """`….q_proj.lora_A`, `….k_proj`, `mlp_head.0.bias`: a parameter without what only
    one side has in its name.
    """
    for part in (f".{adapter}", ".weight", ".ia3_l", ".beft_bias", ".vectors"):
        name = (
            name.replace(part, "")
            if part.startswith(f".{adapter}")
            else name.removesuffix(part)
        )
    return name.removeprefix("base_model.model.")


def move(model: nn.Module, seed: int = 1, adapter: str = "default") -> nn.Module:
    """Away from the start, by noise on all that trains: else B, Λ and the biases are
    0.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(trained(model, adapter).items()):
            p.add_(0.1 * torch.randn(p.shape, generator=dice))
    return model


def copy(source: nn.Module, target: nn.Module, adapter: str = "default") -> None:
    """All that trains in `source`, into `target`."""
    values, places = trained(source, adapter), trained(target, adapter)
    assert values.keys() == places.keys() and len(values) > 0
    with torch.no_grad():
        for name, p in places.items():
            p.copy_(values[name].view_as(p))


def classifier(per_token: bool, shape: dict, **settings) -> tuple[nn.Module, nn.Module]:
    """`peft`'s prefix on transformers' sequence or token classifier with the weights of
    `make_llama`, and that base.
    """
    import peft
    import transformers

    kind, task = ("Token", "TOKEN_CLS") if per_token else ("Sequence", "SEQ_CLS")
    config = transformers.LlamaConfig(
        **{**SHAPE, **shape}, num_labels=3, pad_token_id=0, classifier_dropout=0.0
    )
    base = getattr(transformers, f"LlamaFor{kind}Classification")(config).eval()
    state = {
        n: t
        for n, t in make_llama(**shape).state_dict().items()
        if n.startswith("model.")
    }
    assert not base.load_state_dict(state, strict=False).unexpected_keys
    return (
        peft.get_peft_model(
            base, peft.PrefixTuningConfig(task_type=task, **settings)
        ).eval(),
        base,
    )


def logits(model: nn.Module, tokens: Tensor, **kwargs) -> Tensor:
    """Logits of the real tokens, ours or theirs."""
    out = model(tokens, **kwargs)
    return getattr(out, "logits", out)[:, -tokens.shape[1] :]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The next-token loss, with AdaLoRA's regulariser on both sides."""
    if type(getattr(model, "base_model", None)).__name__ == "AdaLoraModel":
        # peft adds the regulariser to a loss that it is given
        return model(tokens, labels=tokens).loss
    extra = (
        adalora.regularizer(model) if walk.installed(model, adalora.SVDLinear) else 0.0
    )
    return next_token_loss(logits(model, tokens).float(), tokens) + extra


def train(model: nn.Module, tokens: Tensor, steps: int = 3) -> list[float]:
    """A few steps of SGD, and AdaLoRA's budget where there is one. Returns the losses.

    Not Adam: it would make a whole step of a gradient that is 0 but for rounding, as
        that of k's bias is.
    """
    optimizer, losses = (
        torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9),
        [],
    )
    allocator = (
        RankAllocator(model) if walk.installed(model, adalora.SVDLinear) else None
    )
    for t in range(steps):
        value = loss(model, tokens)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if allocator:
            allocator.step(t)
        elif hasattr(model, "base_model") and hasattr(
            model.base_model, "update_and_allocate"
        ):
            model.base_model.update_and_allocate(t)
        losses.append(value.item())
    return losses


def close(mine: Tensor, peers: Tensor, tol: float = 1e-5, what: str = "") -> None:
    """Equal to within `tol`, absolute; `what` says what was compared."""
    torch.testing.assert_close(
        mine, peers, rtol=0, atol=tol, msg=lambda m: f"{what}: {m}"
    )


def base_of(name: str) -> dict:
    """The shape for tests that use one base."""
    return FOUR_BIT if name == "QLoRA" else GQA | dict(attention_bias=True)


def snapshot(model: nn.Module) -> tuple[dict, dict, tuple]:
    """What must be the same once per adapter has come and gone: modules, tensors,
    hooks.
    """
    kinds = {n: type(m) for n, m in model.named_modules()}
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    return kinds, {n: t.clone() for n, t in model.state_dict().items()}, hooks


def assert_as_before(model: nn.Module, before: tuple[dict, dict, tuple]) -> None:
    """The same modules, the same bits, the same number of hooks."""
    kinds, tensors, hooks = snapshot(model)
    assert kinds == before[0], "modules"
    assert hooks == before[2], "hooks"
    assert tensors.keys() == before[1].keys(), "names"
    assert all(torch.equal(t, before[1][n]) for n, t in tensors.items()), "bits"
