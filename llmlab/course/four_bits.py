"""bitsandbytes' 4-bit weights on this CPU against their definition.

A weight is book[code] · scale of its block: two codes a byte, the first in the high
half. What bitsandbytes quantizes is decoded so, and compared with what it decodes
itself and with what a Linear4bit computes. `python -m llmlab.course.four_bits` prints
the result as JSON: a native library that ends its process ends that one, not the
doctor's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

BLOCK = 64
ROWS = 64
COLUMNS = 256
INPUTS = 5
UNEVEN = 96  # columns of a row that a block of 64 does not divide
CLOSE = 1e-4  # relative: sums of 256 products in fp32 are exact to about 1e-6
ROUNDED = 0.05  # relative: sums of products of numbers of 8 bits (bf16)


@dataclass(frozen=True)
class Result:
    """Largest errors, each as a part of the largest right value.

    Attributes:
        decoded: weights that bitsandbytes decodes, rows of whole blocks.
        uneven: the same where the block size does not divide a row.
        trained: a product of Linear4bit in train mode.
        evaluated: a product in eval mode.
        has_gradient: whether a gradient passes through it afterwards.
        failure: what stopped the examination, or ''.
    """

    decoded: float = 0.0
    uneven: float = 0.0
    trained: float = 0.0
    evaluated: float = 0.0
    has_gradient: bool = True
    failure: str = ""

    @property
    def is_broken(self) -> bool:
        """Wrong where lessons rely on it: even rows, and either mode's product."""
        wrong = max(self.decoded, self.trained) > CLOSE or self.evaluated > ROUNDED
        return bool(self.failure) or wrong

    @property
    def advice(self) -> str:
        """What a learner should know, or ''."""
        said = []
        if self.uneven > CLOSE:
            said.append("take block sizes that divide a row")
        if self.evaluated > CLOSE:
            said.append(
                "eval mode computes in bf16: results differ from the definition"
            )
        if not self.has_gradient:
            said.append("call model.train() before the first forward if you will train")
        return "; ".join(said)

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        parts = [
            f"weights {agreement(self.decoded)}",
            f"uneven rows {agreement(self.uneven)}",
            f"product in train mode {agreement(self.trained)}",
            f"in eval mode {agreement(self.evaluated)}",
            "gradient passes" if self.has_gradient else "then NO gradient passes",
        ]
        return ", ".join(parts)


def agreement(error: float) -> str:
    """'as defined', or how far off."""
    return "as defined" if error <= CLOSE else f"off by {error:.2%}"


def examine() -> Result:
    """Quantize, decode and multiply here, in this process."""
    import torch

    with without_compiler():
        from bitsandbytes import functional, nn

    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    uneven = torch.randn(ROWS, UNEVEN)
    layer = nn.Linear4bit(
        COLUMNS,
        ROWS,
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.weight = nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        module=layer,
    )
    layer.to("cpu")
    x = torch.randn(INPUTS, COLUMNS)

    def decode(matrix):
        """(the weights by definition, what bitsandbytes decodes)."""
        packed, state = functional.quantize_4bit(
            matrix, blocksize=BLOCK, quant_type="nf4"
        )
        defined = by_definition(packed, state.absmax, state.code, matrix.shape)
        return defined, functional.dequantize_4bit(packed, state)

    defined, decoded = decode(weight)
    uneven_defined, uneven_decoded = decode(uneven)
    right = x @ defined.T
    return Result(
        decoded=relative(decoded, defined),
        uneven=relative(uneven_decoded, uneven_defined),
        trained=relative(layer.train()(x), right),
        evaluated=relative(layer.eval()(x), right),
        has_gradient=passes_gradient(layer.train(), x),
    )


@contextmanager
def without_compiler() -> Iterator[None]:
    """`torch.compile` leaves functions as they are.

    bitsandbytes hands it four functions when it is imported, which loads torch's whole
    compiler: longer than all the rest takes. None of them is called here.
    """
    import torch

    def unchanged(function=None, **options):
        if function is None:
            return lambda function: function
        return function

    compiling = torch.compile
    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = compiling


def passes_gradient(layer, x) -> bool:
    """Whether the layer's input gets a gradient from its output."""
    asked = x.clone().requires_grad_()
    try:
        layer(asked).sum().backward()
    except RuntimeError:  # the output was made without autograd
        return False
    return asked.grad is not None and bool(asked.grad.any())


def by_definition(packed, scales, book, shape):
    """The weights that codes and scales mean, in fp32."""
    import torch

    packed = packed.flatten()
    # two codes per byte, the first in the high half
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    scale_of_each = scales.repeat_interleave(BLOCK)[: len(codes)]
    return (book[codes] * scale_of_each).view(shape)


def relative(found, right) -> float:
    """The largest error divided by the largest right value; infinite for NaN."""
    import math

    error = ((found - right).abs().max() / right.abs().max()).item()
    return error if math.isfinite(error) else math.inf


def in_a_process_of_its_own(timeout: float = 300.0) -> Result:
    """`examine`, where a crash is a finding."""
    command = [sys.executable, "-m", "llmlab.course.four_bits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result(failure=f"bitsandbytes gave no answer in {timeout:g} s")
    if done.returncode < 0:
        failure = f"bitsandbytes ended its process: signal {-done.returncode}"
        return Result(failure=failure)
    if done.returncode:
        reason = done.stderr.strip() or "no reason given"
        return Result(failure=reason.splitlines()[-1])
    return Result(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(asdict(examine())))
