"""Calibration: what enters each linear while the model reads some text.

Methods that shrink a trained model ask how large the inputs of a linear are, channel by
channel, or how its channels vary together. One pass over a few thousand tokens tells:

    X       inputs of a linear, (tokens, in)
    gram    Σ_t x_t x_tᵀ = XᵀX, (in, in): GPTQ's and SparseGPT's H is 2 XᵀX
    absmax  max_t |x_t|, (in,): SmoothQuant
    absmean mean_t |x_t|, (in,): AWQ
    norm    √Σ_t x_t², (in,): Wanda

The model is told nothing of it: hooks read along, and are taken off again whatever
happens. Simplified: every position counts, so batches hold no padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass
class InputStatistics:
    """Sums over all the inputs that a linear has seen, in float32.

    `gram` is None where it was not asked for: it takes in² numbers.
    """

    tokens: int
    low: Float[Tensor, "in"]  # the smallest value of each channel, at most 0
    high: Float[Tensor, "in"]  # the largest, at least 0
    abs_sum: Float[Tensor, "in"]
    square_sum: Float[Tensor, "in"]
    gram: Float[Tensor, "in in"] | None

    @classmethod
    def empty(
        cls, width: int, gram: bool = True, dtype: torch.dtype = torch.float32
    ) -> InputStatistics:
        """Of no inputs yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        sums = (zeros(width) for _ in range(4))
        return cls(0, *sums, zeros(width, width) if gram else None)

    @property
    def absmax(self) -> Float[Tensor, "in"]:
        """The largest |x| of each channel."""
        return torch.maximum(-self.low, self.high)

    @property
    def absmean(self) -> Float[Tensor, "in"]:
        """The mean |x| of each channel."""
        return self.abs_sum / self.tokens

    @property
    def norm(self) -> Float[Tensor, "in"]:
        """The 2-norm of each channel over all tokens."""
        return self.square_sum.sqrt()

    def add(
        self,
        x: Float[Tensor, "... in"],
        product: Float[Tensor, "in in"] | None = None,
    ) -> None:
        """Count the inputs x in.

        Args:
            product: xᵀx, where it is known already.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.low)  # (tokens, in)
        self.tokens += len(rows)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.abs_sum += rows.abs().sum(0)
        self.square_sum += rows.square().sum(0)
        if self.gram is not None:
            self.gram += rows.T @ rows if product is None else product


def sample(
    tokens: Int[Tensor, "N"], length: int, count: int, seed: int = 0
) -> list[Int[Tensor, "1 length"]]:
    """`count` runs of `length` tokens, from random places of a text.

    Raises:
        ValueError: the text is shorter than one run, or nothing is asked for.
    """
    if tokens.dim() != 1:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; it must be one row, of shape (N,)"
        )
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if len(tokens) < length:
        raise ValueError(
            f"tokens holds {len(tokens)} tokens: too few for a sequence of"
            f" length={length}"
        )
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=random)
    return [tokens[None, start : start + length] for start in starts.tolist()]


def collect(
    linears: Mapping[str, nn.Module],
    run: Callable[[], object],
    gram: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, InputStatistics]:
    """What enters each of `linears` while `run()` computes.

    Linears that are given the very same tensor, as q, k and v are, share one product.

    Args:
        linears: by name; each has a `weight` of shape (out, in).
        gram: whether XᵀX is wanted.
        dtype: in which the sums are kept.
    Raises:
        ValueError: an input holds NaN or ∞, or a linear was given none; it is named.
    """
    found = {
        name: InputStatistics.empty(linear.weight.shape[1], gram, dtype)
        for name, linear in linears.items()
    }
    latest: dict[str, Tensor | None] = {"input": None, "product": None}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if x is not latest["input"]:
                check_finite(f"the input of {name}", x)
                rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
                latest["input"] = x
                latest["product"] = rows.T @ rows if gram else None
            found[name].add(x, latest["product"])

        return hook

    hooks = []
    try:
        for name, linear in linears.items():
            hooks.append(linear.register_forward_pre_hook(watch(name)))
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistics in found.items():
        if not statistics.tokens:
            raise ValueError(f"{name} was given no input: it did not run")
    return found


def inputs(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Iterable[Int[Tensor, "batch seq"]],
    gram: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, InputStatistics]:
    """What enters each of `linears` while `model` reads `batches`, in one pass.

    The model reads in eval mode, and is then in the mode that it was in.

    Raises:
        ValueError: as `collect`; or there is no batch, or one that is no rows of ids.
    """
    batches = checked(batches)

    def run() -> None:
        for batch in batches:
            read(model, batch)

    return in_eval_mode(model, lambda: collect(linears, run, gram, dtype))


# The walk from block to block ---------------------------------------------------------


Call = tuple[tuple, dict]  # the arguments of a block, by position and by name


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by name, in order: the longest list of modules of one kind.

    Raises:
        ValueError: there is no such list.
    """
    best: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= len(best):
            continue
        if len({type(child) for child in module}) == 1:
            best = {f"{name}.{i}": child for i, child in enumerate(module)}
    if not best:
        raise ValueError(
            f"{type(model).__name__} has no list of layers (an nn.ModuleList) to walk"
        )
    return best


class _Reached(Exception):
    """The first block was called: what follows it is not needed."""


def first_calls(
    model: nn.Module, batches: Iterable[Int[Tensor, "batch seq"]]
) -> list[Call]:
    """The arguments with which the first block is called, for each batch."""
    batches = checked(batches)
    first = next(iter(blocks(model).values()))
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))
        raise _Reached

    def run() -> list[Call]:
        hook = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                for batch in batches:
                    try:
                        read(model, batch)
                    except _Reached:
                        continue
        finally:
            hook.remove()
        return calls

    return in_eval_mode(model, run)


@torch.no_grad()
def next_calls(block: nn.Module, calls: list[Call]) -> list[Call]:
    """The arguments of the block after this one: its outputs, and the rest as it was.

    The hidden states are the first argument, as in our Llama and in transformers.
    """
    after = []
    for args, kwargs in calls:
        out = block(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        after.append(((hidden, *args[1:]), kwargs))
    return after


# What they share ----------------------------------------------------------------------


def checked(batches: Iterable[Tensor]) -> list[Tensor]:
    """`batches` as a list.

    Raises:
        ValueError: it is empty, or one of them is no rows of token ids.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: calibration needs text")
    for batch in batches:
        ids = isinstance(batch, Tensor) and not batch.is_floating_point()
        if not ids or batch.dim() != 2 or not batch.numel():
            raise ValueError(
                "each of batches must be rows of token ids, of shape (batch, seq), not"
                f" {getattr(batch, 'shape', type(batch).__name__)}"
            )
    return batches


def read(model: nn.Module, batch: Int[Tensor, "batch seq"]) -> None:
    """One forward pass. Models of `transformers` are told not to keep a cache."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        model(batch, use_cache=False)
    else:
        model(batch)


def in_eval_mode(model: nn.Module, run: Callable):
    """`run()` with the model in eval mode; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return run()
    finally:
        for module in training:
            module.training = True


def check_finite(name: str, x: Tensor) -> None:
    """Raises: ValueError: the tensor called `name` holds NaN or ∞."""
    bad = int((~x.detach().isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} values that are NaN or infinite")
