"""Texts that the lesson 08-compilers/01-overview shows and does not make itself.

    python scripts/golden/overview_goldens.py xla      in an environment with jax
    python scripts/golden/overview_goldens.py triton   in the course's, on Linux

`xla` writes what JAX hands to XLA (StableHLO) and what XLA's passes leave (HLO), with
JAX's version in the first line. `triton` writes Triton's text, for machines without it.
A file lies in llmlab/compilers/overview/data.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DATA = Path(__file__).parents[2] / "llmlab" / "compilers" / "overview" / "data"


def xla() -> None:
    """Both functions by JAX, for the same shapes as everywhere in the part."""
    import jax
    import jax.numpy as jnp

    def mlp(x, w, b):
        return jax.nn.gelu(x @ w + b, approximate=True)

    def attention_row(q, k, v):
        return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1) @ v

    shapes = {
        mlp: [(128, 256), (256, 512), (512,)],
        attention_row: [(1, 256), (128, 256), (128, 256)],
    }
    for function, sizes in shapes.items():
        inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
        lowered = jax.jit(function).lower(*inputs)
        write(f"{function.__name__}.stablehlo", lowered.as_text())
        hlo = lowered.compile().as_text()
        # Where a line came from, and which kernel of the CPU was chosen.
        hlo = re.sub(r"(?s)\nFileNames\n.*?(?=\n%)", "\n", hlo)
        hlo = re.sub(r", (metadata|backend_config)=\{.*", "", hlo)
        write(f"{function.__name__}.hlo", re.sub(r"\n{3,}", "\n\n", hlo))


def write(name: str, text: str) -> None:
    """A file that begins with JAX's version."""
    import jax

    text = f"// JAX {jax.__version__}\n{text.strip()}\n"
    (DATA / name).write_text(text, encoding="utf-8")


def triton() -> None:
    """Both functions, TTIR and TTGIR."""
    from llmlab.compilers.overview import FUNCTIONS, in_language

    for function in FUNCTIONS:
        for language in ("TTIR", "TTGIR"):
            text = in_language(function, language).text
            path = DATA / f"{function}.{language.lower()}"
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    {"xla": xla, "triton": triton}[sys.argv[1]]()
