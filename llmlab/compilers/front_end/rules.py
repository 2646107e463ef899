"""Rules of algebra, as data: what is matched, what takes its place, and whether it is
exact.

    ("mul", "x", 1.0)                 a product with the constant 1
    ("neg", ("neg", "x"))             a sign that is changed twice
    ("transpose:p", ("transpose:q", "x"))    two operations with attributes p and q

A letter stands for any value, the same letter for the same value. `exact` rules change
no bit for any number, infinities and NaN included (0 and −0 count as the same). The
others are what compilers call fast math: right for real numbers, not for floats.

    x − x = 0      not exact: ∞ − ∞ is NaN
    x · 0 = 0      not exact: ∞ · 0 is NaN
    x / 4 = x · ¼  exact, for ¼ is a power of two;  x / 3 = x · ⅓ is not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmlab.compilers.front_end.ir import OPS, Node, constant, made

Pattern = str | float | tuple
Bindings = dict[str, object]


@dataclass(frozen=True)
class Rule:
    """What to look for, and what to put there.

    Attributes:
        make: bindings → pattern of the replacement, or None if the rule does not apply.
    """

    name: str
    pattern: tuple
    make: Callable[[Bindings], Pattern | None]
    exact: bool = True


def power_of_two(x: float) -> bool:
    """Whether dividing by x is multiplying by 1/x, bit by bit."""
    return x != 0 and math.isfinite(x) and abs(math.frexp(x)[0]) == 0.5


def inverse(found: Bindings) -> Pattern | None:
    """x / c as x · 1/c, where that is the same number."""
    c = found["c"].number
    if c is None or not power_of_two(c) or not 2**-60 < abs(c) < 2**60:
        return None
    return ("mul", "x", 1 / c)


def product(found: Bindings) -> Pattern | None:
    """(x · c) · d: exact if d only moves the exponent."""
    c, d = found["c"].number, found["d"].number
    if c is None or d is None or not (power_of_two(c) and power_of_two(d)):
        return None
    if not 2**-60 < abs(c * d) < 2**60:
        return None
    return ("mul", "x", c * d)


def one_order(found: Bindings) -> Pattern | None:
    """Two transposes in one; none at all if they undo each other."""
    outer, inner = found["p"][0], found["q"][0]
    order = tuple(inner[dim] for dim in outer)
    return "x" if order == tuple(range(len(order))) else ("transpose", "x", (order,))


def same_shape(found: Bindings) -> Pattern | None:
    """A reshape to the shape that it has."""
    return "x" if found["x"].type.shape == found["p"][0] else None


def same_order(found: Bindings) -> Pattern | None:
    """A transpose that leaves every dimension in its place."""
    order = found["p"][0]
    return "x" if order == tuple(range(len(order))) else None


def kept(pattern: Pattern) -> Callable[[Bindings], Pattern]:
    """A replacement that is always the same."""
    return lambda found: pattern


RULES = (
    Rule("x · 1 = x", ("mul", "x", 1.0), kept("x")),
    Rule("x / 1 = x", ("div", "x", 1.0), kept("x")),
    Rule("x + (−0) = x", ("add", "x", -0.0), kept("x")),
    Rule("x − 0 = x", ("sub", "x", 0.0), kept("x")),
    Rule("−(−x) = x", ("neg", ("neg", "x")), kept("x")),
    Rule("x + (−y) = x − y", ("add", "x", ("neg", "y")), kept(("sub", "x", "y"))),
    Rule("x − (−y) = x + y", ("sub", "x", ("neg", "y")), kept(("add", "x", "y"))),
    Rule("max(x, x) = x", ("maximum", "x", "x"), kept("x")),
    Rule("x / 2ⁿ = x · 2⁻ⁿ", ("div", "x", "c"), inverse),
    Rule("(x · 2ᵐ) · 2ⁿ", ("mul", ("mul", "x", "c"), "d"), product),
    Rule("two transposes", ("transpose:p", ("transpose:q", "x")), one_order),
    Rule("no transpose", ("transpose:p", "x"), same_order),
    Rule(
        "two reshapes",
        ("reshape:p", ("reshape:q", "x")),
        lambda found: ("reshape", "x", found["p"]),
    ),
    Rule("no reshape", ("reshape:p", "x"), same_shape),
)

FAST_MATH = (
    *RULES,
    # not of −0, whose sum with 0 is 0
    Rule("x + 0 = x", ("add", "x", 0.0), kept("x"), exact=False),
    Rule("x − x = 0", ("sub", "x", "x"), kept(0.0), exact=False),
    Rule("x · 0 = 0", ("mul", "x", 0.0), kept(0.0), exact=False),
    Rule("x / x = 1", ("div", "x", "x"), kept(1.0), exact=False),
)


def same_sign(a: float, b: float) -> bool:
    """Tells 0 from −0."""
    return math.copysign(1, a) == math.copysign(1, b)


def match(pattern: Pattern, node: Node, found: Bindings) -> bool:
    """Whether a value has the form of a pattern; `found` gets what its letters are."""
    if isinstance(pattern, str):
        return found.setdefault(pattern, node) is node
    if isinstance(pattern, float):
        return node.number == pattern and same_sign(node.number, pattern)
    op, _, name = pattern[0].partition(":")
    if node.op != op:
        return False
    if name and found.setdefault(name, node.attributes) != node.attributes:
        return False
    before = dict(found)
    if all(map(match, pattern[1:], node.inputs, [found] * len(node.inputs))):
        return True
    found.clear()
    found.update(before)
    if not OPS[op].commutes:
        return False
    swapped = reversed(node.inputs)
    return all(map(match, pattern[1:], swapped, [found] * len(node.inputs)))


def by_operation(rules: Sequence[Rule]) -> dict[str, list[Rule]]:
    """Rules by the operation that their pattern begins with."""
    found: dict[str, list[Rule]] = {}
    for rule in rules:
        found.setdefault(rule.pattern[0].partition(":")[0], []).append(rule)
    return found


def apply_rules(node: Node, program: list[Node], rules: dict[str, list[Rule]]) -> Node:
    """What stands in a node's place after the first rule that fits, and so on.

    It is appended to the program, unless it stands there already.
    """
    node = numbers_last(node)
    while True:
        new = by_first_rule(node, program, rules.get(node.op, ()))
        if new is None:
            program.append(node)
            return node
        if new in node.inputs or any(new in each.inputs for each in node.inputs):
            return new  # an older value of the program
        node = new


def by_first_rule(
    node: Node, program: list[Node], rules: Sequence[Rule]
) -> Node | None:
    """What the first rule that fits puts in a node's place; None if none does."""
    for rule in rules:
        found: Bindings = {}
        if not match(rule.pattern, node, found):
            continue
        pattern = rule.make(found)
        if pattern is None:
            continue
        new = build(pattern, found, node, program)
        # x · 1, where the 1 has a larger shape: the result is larger than x
        if new.type == node.type:
            return new
    return None


def numbers_last(node: Node) -> Node:
    """2 · x as x · 2, so that a rule need not be written twice."""
    if not OPS[node.op].commutes:
        return node
    a, b = node.inputs
    if a.number is None or b.number is not None:
        return node
    return Node(node.op, (b, a), node.type, node.attributes)


def build(pattern: Pattern, found: Bindings, like: Node, program: list[Node]) -> Node:
    """The value that a pattern describes. Its constants are appended to the program."""
    if isinstance(pattern, str):
        return found[pattern]
    dtype = like.type.dtype
    if isinstance(pattern, float):
        return constant(torch.full(like.type.shape, pattern), dtype)
    op, *parts = pattern
    attributes = parts.pop() if isinstance(parts[-1], tuple) else ()
    nodes = []
    for part in parts:
        if isinstance(part, float):
            nodes.append(constant(part, dtype))
            program.append(nodes[-1])
        else:
            nodes.append(found[part])
    return made(op, nodes, attributes)
