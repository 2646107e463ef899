"""Reading a program in somebody's language: how much stands there, and what is decided.

Every answer comes from the text alone, by patterns that stand here as data.
"""

from __future__ import annotations

import re

from llmlab.compilers.overview.languages import TILE, Text

# A line that computes something, in each language. Constants and the making of empty
# tensors are none.
COMPUTES = {
    "FX": r"= torch\.ops\.",
    "ONNX": r" = (?!Constant)[A-Z]\w* ",
    "StableHLO": r" = stablehlo\.(?!constant|broadcast)",
    "HLO": r"= f32\[\S* (?!parameter|constant|broadcast|fusion)\w+\(",
    "Relax": r" = R\.",
    "TIR": r"^\s*with T\.sblock\(",
    "linalg": r" = (linalg|arith|math)\.(?!constant)",
    "TTIR": r" = (tt|math|scf|arith)\.(?!constant)|tt\.store",
    "TTGIR": r" = (ttg?|math|scf|arith)\.(?!constant)|tt\.store",
}
# A line that writes a whole result, if the program runs as it stands there. Where it is
# not said, that is every line that computes.
WRITES = {
    "HLO": r" fusion\(",
    "linalg": r" = linalg\.(?!fill)",
    "TTIR": r"tt\.store",
    "TTGIR": r"tt\.store",
}
RESULT = 128 * 512 * 4  # bytes of a whole result of `mlp`
# A decision → what stands in a text that has made it. All are about `mlp`.
DECISIONS = {
    "GELU in + and ×": r"0\.04471|4\.471500e-02",
    "what runs together": r" fusion\(|tt\.func",
    "how arrays lie": r"\]\{1,0\}|T\.Buffer|!tt\.ptr",
    "loops, in an order": r"for .* in T\.grid|scf\.for",
    "tile": rf"tensor<{TILE['R']}x{TILE['C']}xf32",
    "digits of the product": r"inputPrecision",
    "which thread": r"threads-per-warp",
    "shared memory": r"#smem",
}
# The shape of the whole result, 128 × 512, which a later step could still use.
WHOLE = r"128, ?512\]|\(128, 512\)|int64\(128\), T\.int64\(512\)|128x512x"
# The parts of `mlp`, by words in a line.
PARTS = ("product", "bias", "gelu")
WORDS = {
    "FX": ("aten.mm", "aten.add", "aten.gelu"),
    "ONNX": ("= MatMul", "= Add", "= Gelu"),
    "Relax": ("R.matmul", "R.add", "R.nn.gelu"),
    "TTIR": (r"%product|%[xw]_tile", r"%bias\w* =", r"%gelu"),
    "TTGIR": (r"%product|%[xw]_tile", r"%bias\w* =", r"%gelu"),
}


def operations(text: Text) -> int:
    """Lines that compute something."""
    return sum(
        bool(re.search(COMPUTES[text.language], line)) for line in text.text.split("\n")
    )


def bytes_between(text: Text) -> int:
    """What `mlp` would move between its operations: each result but the last is
    written once and read once.
    """
    pattern = WRITES.get(text.language, COMPUTES[text.language])
    written = sum(bool(re.search(pattern, line)) for line in text.lines)
    return 2 * (written - 1) * RESULT


def decided(text: Text) -> dict[str, bool]:
    """Which of the DECISIONS a text has made."""
    return {name: bool(re.search(how, text.text)) for name, how in DECISIONS.items()}


def knows_the_whole(text: Text) -> bool:
    """Whether the shape of the whole result stands there."""
    return bool(re.search(WHOLE, text.text))


def root_two_over_pi(text: Text) -> float | None:
    """The constant √(2/π) of GELU as a text has it, if it has."""
    found = re.search(r"\b(0\.797\d*|7\.97\d*e-01)", text.text)
    return float(found[1]) if found else None


def parts(text: Text) -> list[str]:
    """For each line of `mlp`, which part of it it computes: one of PARTS, or "".

    Raises:
        ValueError: a language for which nobody has said how to tell.
    """
    if text.language == "TIR":
        return parts_of_tir(text)
    if text.language == "linalg":
        return parts_of_linalg(text)
    if text.language not in WORDS:
        known = ", ".join([*WORDS, "TIR", "linalg"])
        raise ValueError(f"language {text.language!r} has no parts here: {known} have")
    found = []
    for line in text.lines:
        match = [
            part
            for part, words in zip(PARTS, WORDS[text.language], strict=True)
            if re.search(words, line)
        ]
        # `%bias_18 = arith.addf %product_13`: the name on the left says it
        found.append(match[-1] if match else "")
    return found


def parts_of_tir(text: Text) -> list[str]:
    """By the function in which a line stands."""
    names = {"matmul": "product", "add": "bias", "gelu_tanh": "gelu"}
    found, now = [], ""
    for line in text.lines:
        if "@T." in line or "@R." in line:
            now = ""
        start = re.search(r"def (\w+)\(", line)
        if start:
            now = names.get(start[1], "")
        call = re.search(r"call_tir\(cls\.(\w+)", line)
        found.append(names[call[1]] if call else now)
    return found


def parts_of_linalg(text: Text) -> list[str]:
    """By what an operation reads: the bias is the third input, GELU reads the sum."""
    found, now = [], ""
    for line in text.lines:
        if re.search(r"= linalg\.(fill|matmul)", line):
            found.append("product")
            continue
        if "linalg.generic" in line:
            now = "bias" if "%arg2" in line else "gelu"
        found.append(now)
        if line.strip().startswith("} ->"):
            now = ""
    return found
