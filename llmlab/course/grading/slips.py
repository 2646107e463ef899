"""The usual slips, made in the worked answer: which of them gives this value?

A check foresees some mistakes. For the others there is the worked answer under
solutions/: it is changed in one place (another dimension, a factor left out, one for
another argument, a border moved by one, …) and called as the check calls an answer.
Where one such change gives what the learner's answer gives, in every call, its kind is
said: "a factor is missing: `keep`". Nothing of the worked answer is shown.
"""

from __future__ import annotations

import ast
import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from llmlab.course.grading.closeness import as_tensor, close
from llmlab.course.grading.diagnosis import Mistake
from llmlab.course.grading.gradients import copied
from llmlab.course.grading.state import neutral, silent

# a sentence that tells one value from another
NUMBERS = re.compile(r"differs in \d+ of \d+ places, by up to|times too|which is too")
SECONDS = 3.0  # for all slips of an exercise together
CALLS = 16  # of the check, that are looked at
CELL = re.compile(r"^# %%(.*)$", re.M)

Slip = tuple[str, ast.AST]  # what went wrong, and what stands there instead


def named(
    slug: str, exercise: str, run: Callable[[Callable], None], answer: Callable
) -> str | None:
    """The slip that leads from the worked answer to this one; None when none does.

    Args:
        run: the exercise's check, of one answer.
    """
    if not isinstance(answer, FunctionType):
        return None
    found = worked_answer(slug, exercise)
    if found is None or next(slips(found[1]), None) is None:
        return None
    known, tree = found
    end = time.monotonic() + SECONDS
    with silent():
        same = _sameness(run, known[exercise], answer)
        if same is None or time.monotonic() > end:
            return None
        for phrase, changed in slips(tree):
            if time.monotonic() > end:
                return None
            function = _compiled(changed, known)
            if function is not None and same(function):
                return phrase
    return None


def _sameness(
    run: Callable[[Callable], None], worked: Callable, answer: Callable
) -> Callable[[Callable], bool] | None:
    """Whether a function gives what the learner's does; None if that tells nothing.

    Where calls cannot be made again (answers that talk to other ranks), the check's
    sentence must be the same, with its counts and sizes.
    """
    started = time.monotonic()
    calls = plain_calls(run, worked)
    if time.monotonic() - started > SECONDS / 10:
        return None  # the check takes too long to be run often
    if not calls:
        texts = [_said(run, answer, seed) for seed in (0, 1)]
        if texts[0] is None or not NUMBERS.search(texts[0]):
            return None

        def same(function: Callable) -> bool:
            # with two draws: three digits of one may agree by chance
            return all(_said(run, function, s) == t for s, t in enumerate(texts))

        return same
    theirs = [result_of(answer, call) for call in calls]
    right = [result_of(worked, call) for call in calls]
    if not _tells_much(theirs, right):
        return None
    return lambda function: _gives(function, calls, theirs)


def _said(run: Callable[[Callable], None], function: Callable, seed: int) -> str | None:
    """The mistake that a check finds in an answer, where it was not foreseen."""
    try:
        with neutral(seed):
            run(function)
    except Mistake as mistake:
        return None if mistake.foreseen else str(mistake)
    except (Exception, SystemExit):
        return None
    return None


def worked_answer(
    slug: str, exercise: str
) -> tuple[dict[str, Any], ast.FunctionDef] | None:
    """The names of the worked answers and the code of one; None when there is none."""
    from llmlab.course.syllabus import course_root, find

    try:
        lesson = find(slug)
        path = lesson.solution(course_root()).with_suffix(".py")
        source = path.read_text(encoding="utf-8")
    except (OSError, LookupError, ValueError):
        return None
    known: dict[str, Any] = {"__name__": "__main__"}
    tree = None
    for head, cell in _cells(source):
        if "[markdown]" in head or '"check"' in head:
            continue
        with silent():
            exec(compile(cell, str(path), "exec"), known)
        for node in ast.parse(cell).body:
            if isinstance(node, ast.FunctionDef) and node.name == exercise:
                tree = node
    return None if tree is None else (known, tree)


def _cells(source: str) -> Iterator[tuple[str, str]]:
    """(what stands behind # %%, the text) of each cell of a percent script."""
    parts = CELL.split(source)[1:]
    yield from zip(parts[::2], parts[1::2], strict=True)


def plain_calls(run: Callable[[Callable], None], worked: Callable) -> list[list[Any]]:
    """The arguments with which the check calls a right answer."""
    calls: list[list[Any]] = []

    def recorded(*args: Any) -> Any:
        if len(calls) < CALLS and all(map(_is_plain, args)):
            calls.append(copied(list(args)))
        return worked(*args)

    try:
        run(recorded)
    except Exception:
        return []
    return calls


def _is_plain(value: Any) -> bool:
    """Whether a call with it can be made again: numbers, tensors, lists, functions."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if is_dataclass(value) and type(value).__dataclass_params__.frozen:
        return all(_is_plain(getattr(value, field.name)) for field in fields(value))
    kinds = Tensor | int | float | str | FunctionType | None
    return isinstance(value, kinds)


def result_of(function: Callable, call: list[Any]) -> Any:
    """What a call returns; the type of the error when it raises one."""
    try:
        with torch.no_grad():
            return function(*copied(call))
    except (Exception, SystemExit) as error:
        return type(error).__name__


def _gives(function: Callable, calls: list[list[Any]], theirs: list[Any]) -> bool:
    for call, wanted in zip(calls, theirs, strict=True):
        if not close(result_of(function, call), wanted):
            return False
    return True


def _tells_much(theirs: list[Any], right: list[Any]) -> bool:
    """Whether the results hold enough that is wrong to tell one slip from another."""
    different = 0
    for a, b in zip(_leaves(theirs), _leaves(right), strict=False):
        if a.shape != b.shape:
            different += a.numel()
            continue
        far = ~torch.isclose(a.double(), b.double(), rtol=1e-5, equal_nan=True)
        if far.any() and a.is_floating_point() and a[far].isfinite().any():
            different += int((a[far] != 0).sum()) * 3
        different += int(far.sum()) if not a.is_floating_point() else 0
    return different >= 3


def _leaves(values: Any) -> list[Tensor]:
    """All numbers in a result, as tensors."""
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _leaves(value)]
    if isinstance(values, dict):
        return _leaves(list(values.values()))
    tensor = as_tensor(values)
    return [] if tensor is None else [tensor]


def _compiled(tree: ast.FunctionDef, known: dict[str, Any]) -> Callable | None:
    module = ast.Module([tree], type_ignores=[])
    own = dict(known)
    try:
        exec(compile(ast.fix_missing_locations(module), "<slip>", "exec"), own)
    except (SyntaxError, ValueError, TypeError):
        return None
    return own[tree.name]


# The slips.


def slips(tree: ast.FunctionDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(what went wrong, the function with it) for each slip.

    None for a function with `while`: with a slip, it may not end any more.
    """
    if any(isinstance(node, ast.While) for node in ast.walk(tree)):
        return
    tree = copy.deepcopy(tree)
    tree.decorator_list = []
    places = _Places(tree)
    for node in places.nodes:
        for rule in RULES:
            for phrase, new in rule(node, places):
                yield phrase, places.with_change(node, new)


class _Places:
    """The nodes of a function that may be changed, with what stands around them."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        self.tree = tree
        self.arguments = [a.arg for a in tree.args.args]
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        self.nodes = [n for statement in tree.body for n in ast.walk(statement)]

    def above(self, node: ast.AST, kind: type | tuple[type, ...]) -> ast.AST | None:
        """The node of that kind around `node` within its statement, if any."""
        while node in self.parents and not isinstance(node, ast.stmt):
            node = self.parents[node]
            if isinstance(node, kind):
                return node
        return None

    def of(self, node: ast.AST) -> str:
        """': `a` and `b`', the arguments that stand in an expression, or nothing."""
        inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        own = [f"`{a}`" for a in self.arguments if a in inside]
        return f" ({' and '.join(own)})" if 1 <= len(own) <= 2 else ""

    def with_change(self, node: ast.AST, new: ast.AST) -> ast.FunctionDef:
        """A copy of the function with `new` in the place of `node`."""
        return replaced(self.tree, node, new)


def replaced(tree: Any, node: ast.AST, new: ast.AST) -> Any:
    """A tree with `new` for `node`; what lies beside the way to it is shared."""
    if tree is node:
        return new
    if isinstance(tree, list):
        return [replaced(item, node, new) for item in tree]
    if not isinstance(tree, ast.AST):
        return tree
    fields = {name: replaced(value, node, new) for name, value in ast.iter_fields(tree)}
    out = type(tree)(**fields)
    return ast.copy_location(out, tree)


def _operation(left: ast.AST, op: ast.operator, right: ast.AST) -> ast.BinOp:
    return ast.BinOp(left, op, right)


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant)


def sums(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """A term that is missing, or has the wrong sign."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub):
        return
    left = node.left
    right = node.right
    number = "a number is off by one"
    plus = isinstance(node.op, ast.Add)
    name = "a term is missing" if plus else "nothing is taken away"
    yield number if _is_one(right) else f"{name}{at.of(right)}", left
    if plus:
        yield number if _is_one(left) else f"{name}{at.of(left)}", right
    other = ast.Sub() if plus else ast.Add()
    phrase = f"a term has the wrong sign{at.of(right)}"
    yield phrase, _operation(left, other, right)
    if not plus:
        yield (
            f"a difference is the wrong way round{at.of(node)}",
            _operation(right, ast.Sub(), left),
        )


def products(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """A factor that is missing, twice there, upside down or one too large."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult | ast.Div):
        return
    left = node.left
    right = node.right
    if isinstance(node.op, ast.Mult):
        for kept, gone in ((left, right), (right, left)):
            yield f"a factor is missing{at.of(gone)}", kept
            twice = _operation(node, ast.Mult(), gone)
            yield f"a factor is applied twice{at.of(gone)}", twice
            divided = _operation(kept, ast.Div(), gone)
            yield f"it is divided where it is to be multiplied{at.of(gone)}", divided
            more = _operation(kept, ast.Mult(), _one_more(gone))
            yield f"a factor is one too large, 1 + … for …{at.of(gone)}", more
        yield (
            f"it is added where it is to be multiplied{at.of(node)}",
            _operation(left, ast.Add(), right),
        )
        return
    yield f"a division is missing{at.of(right)}", left
    yield f"it is divided twice{at.of(right)}", _operation(node, ast.Div(), right)
    yield (
        f"it is multiplied where it is to be divided{at.of(right)}",
        _operation(left, ast.Mult(), right),
    )
    yield (
        "the division cuts off what is behind the point",
        _operation(left, ast.FloorDiv(), right),
    )
    yield f"a fraction is upside down{at.of(node)}", _operation(right, ast.Div(), left)


def _one_more(node: ast.AST) -> ast.BinOp:
    return _operation(ast.Constant(1), ast.Add(), node)


def other_operators(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Powers, matrix products, remainders and masks."""
    if not isinstance(node, ast.BinOp):
        return
    left = node.left
    right = node.right
    if isinstance(node.op, ast.Pow):
        yield "a power is missing", left
        yield (
            "a product stands where a power belongs",
            _operation(left, ast.Mult(), right),
        )
    if isinstance(node.op, ast.MatMult):
        yield f"a matrix product is missing{at.of(right)}", left
        yield f"a matrix product is missing{at.of(left)}", right
    if isinstance(node.op, ast.Mod):
        yield "a remainder (%) is missing", left
    if isinstance(node.op, ast.FloorDiv):
        yield "the division does not cut off", _operation(left, ast.Div(), right)
        up = ast.UnaryOp(
            ast.USub(),
            _operation(ast.UnaryOp(ast.USub(), left), ast.FloorDiv(), right),
        )
        yield "it is rounded up where it is to be rounded down", up
    if isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield f"one of two conditions is missing{at.of(right)}", left
        yield f"one of two conditions is missing{at.of(left)}", right
        both = isinstance(node.op, ast.BitAnd)
        other = ast.BitOr() if both else ast.BitAnd()
        yield "`and` and `or` are exchanged", _operation(left, other, right)


STRICT = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
REVERSED = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def comparisons(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Equality on the wrong side, or all the wrong way round."""
    if not isinstance(node, ast.Compare):
        return
    for new in turned(node, STRICT):
        yield f"equality falls on the wrong side of a comparison{at.of(node)}", new
    for new in turned(node, REVERSED):
        yield f"a condition is the wrong way round{at.of(node)}", new


def turned(node: ast.Compare, table: dict[type, type]) -> Iterator[ast.Compare]:
    """A comparison with one of its operators replaced by the table's."""
    for i, op in enumerate(node.ops):
        if type(op) in table:
            ops = [*node.ops]
            ops[i] = table[type(op)]()
            yield ast.Compare(node.left, ops, node.comparators)


def signs(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """A minus or a `not` that is missing."""
    if not isinstance(node, ast.UnaryOp) or isinstance(node.operand, ast.Constant):
        return
    if isinstance(node.op, ast.USub):
        yield f"a sign is wrong{at.of(node)}", node.operand
    else:
        yield f"a condition is the wrong way round{at.of(node)}", node.operand


DIMENSIONS = (0, 1, 2, -1, -2)
ALONG = frozenset(
    (
        *("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any"),
        *("all", "softmax", "log_softmax", "logsumexp", "cumsum", "prod", "norm"),
        *("cat", "stack", "flip", "roll", "sort", "argsort", "topk", "gather"),
        *("repeat_interleave", "chunk", "split", "unflatten", "std", "var"),
        *("flatten", "squeeze", "unsqueeze", "select", "index_select", "diff"),
    )
)


def numbers(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Another dimension, a border moved by one, or a number that is one off."""
    value = integer(node)
    if value is None or integer(at.parents[node]) is not None:
        return
    call = at.above(node, (ast.Call, ast.Subscript, ast.BinOp, ast.Compare))
    if isinstance(call, ast.Call) and is_dimension(node, call, at.parents):
        for other in DIMENSIONS:
            if other != value:
                phrase = f"the {name_of(call)} runs over another dimension"
                yield f"{phrase}{at.of(call)}", ast.Constant(other)
        return
    if isinstance(call, ast.Subscript) and _is_shape(call.value):
        for other in DIMENSIONS:
            if other != value:
                phrase = f"a size is taken along another dimension{at.of(call)}"
                yield phrase, ast.Constant(other)
        return
    inside = at.above(node, (ast.Subscript, ast.Call))
    is_border = isinstance(inside, ast.Subscript) or (
        isinstance(inside, ast.Call) and name_of(inside) in ("range", "arange")
    )
    for step, word in ((1, "large"), (-1, "small")):
        border = f"a border is off by one{at.of(inside)}" if is_border else ""
        yield border or f"a number is one too {word}", ast.Constant(value + step)


def integer(node: ast.AST) -> int | None:
    """The value of an integer, minus sign included."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = integer(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return None


def is_dimension(
    node: ast.AST, call: ast.Call, parents: dict[ast.AST, ast.AST]
) -> bool:
    """Whether a number in a call says along which dimension it works."""
    if name_of(call) not in ALONG:
        return False
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        return parent.arg in ("dim", "dims")
    return node in (*call.args[:1], *call.args[-1:])


def _is_shape(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "shape"


def name_of(call: ast.Call) -> str:
    """'sum' of x.sum(0) and torch.sum(x)."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


# method or function → (another one, what then went wrong)
OTHERS = {
    "sum": [("mean", "a mean is taken where a sum belongs")],
    "mean": [("sum", "a sum is taken where a mean belongs")],
    "amax": [("amin", "the smallest is taken where the largest belongs")],
    "amin": [("amax", "the largest is taken where the smallest belongs")],
    "argmax": [("argmin", "the smallest is looked for, not the largest")],
    "argmin": [("argmax", "the largest is looked for, not the smallest")],
    "max": [("min", "the smaller is taken where the larger belongs")],
    "min": [("max", "the larger is taken where the smaller belongs")],
    "ceil": [
        ("floor", "it is rounded down where it is to be rounded up"),
        ("round", "it is rounded to the nearest where it is to be rounded up"),
    ],
    "floor": [("ceil", "it is rounded up where it is to be rounded down")],
    "round": [
        ("floor", "it is rounded down, not to the nearest"),
        ("ceil", "it is rounded up, not to the nearest"),
        ("trunc", "it is cut off, not rounded to the nearest"),
    ],
    "log2": [("log", "the logarithm has another base")],
    "log": [("log2", "the logarithm has another base")],
    "tril": [("triu", "the other side of the diagonal is taken")],
    "triu": [("tril", "the other side of the diagonal is taken")],
    "abs": [("square", "a square stands where a size belongs")],
    "square": [("abs", "a size stands where a square belongs")],
    "tanh": [("sigmoid", "another activation is used")],
    "sigmoid": [("tanh", "another activation is used")],
    "relu": [("gelu", "another activation is used")],
    "softmax": [("log_softmax", "these are logarithms of probabilities")],
    "log_softmax": [("softmax", "the logarithm of the probabilities is missing")],
    "repeat_interleave": [("repeat", "copies come one series after another")],
    "any": [("all", "`all` stands where `any` belongs")],
    "all": [("any", "`any` stands where `all` belongs")],
}
# what is missing when a call is left out
LEFT_OUT = {
    "abs": "an absolute value is missing",
    "exp": "an exponential is missing",
    "log": "a logarithm is missing",
    "sqrt": "a square root is missing",
    "square": "a square is missing",
    "clamp": "a bound is missing (clamp)",
    "round": "nothing is rounded",
    "ceil": "nothing is rounded",
    "floor": "nothing is rounded",
    "int": "nothing is rounded",
    "softmax": "a softmax is missing",
    "log_softmax": "a softmax is missing",
    "relu": "the activation is missing",
    "tanh": "the activation is missing",
    "sigmoid": "the activation is missing",
    "silu": "the activation is missing",
    "sum": "a sum is missing",
    "mean": "a mean is missing",
    "cumsum": "a running sum is missing",
    "flip": "an order is not turned round",
    "sort": "nothing is sorted",
    "reversed": "an order is not turned round",
    "float": "what is in between is not in float32",
    "double": "what is in between is not in float64",
    "max": "an upper or lower bound is missing",
    "min": "an upper or lower bound is missing",
    "masked_fill": "the mask is missing",
    "where": "one case is missing",
    "tril": "the mask has no diagonal",
    "encode": "characters are counted, not bytes",
    "cat": "one of two parts is missing",
    "permute": "dimensions are not exchanged",
    "transpose": "dimensions are not exchanged",
    "repeat_interleave": "heads are not repeated",
}
MODULES = ("torch", "F", "math", "nn", "special")


def calls(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Another function, or none."""
    if not isinstance(node, ast.Call):
        return
    name = name_of(node)
    function = node.func
    base = function.value if isinstance(function, ast.Attribute) else None
    is_method = base is not None and not _is_module(base)
    for other, phrase in OTHERS.get(name, []):
        changed = copy.deepcopy(node)
        if isinstance(changed.func, ast.Attribute):
            changed.func.attr = other
        elif isinstance(changed.func, ast.Name):
            changed.func.id = other
        yield f"{phrase}{at.of(node)}", changed
    if name in LEFT_OUT:
        inner = [base] if is_method else node.args
        if name == "cat" and node.args and isinstance(node.args[0], ast.List):
            inner = node.args[0].elts
        for kept in inner:
            yield f"{LEFT_OUT[name]}{at.of(node)}", kept
    for i, keyword in enumerate(node.keywords):
        phrase = KEYWORDS.get(keyword.arg or "")
        if phrase:
            changed = copy.deepcopy(node)
            del changed.keywords[i]
            yield f"{phrase}{at.of(node)}", changed


KEYWORDS = {
    "keepdim": "a dimension is lost (keepdim=True), and then another one is meant",
    "min": "a lower bound is missing",
    "max": "an upper bound is missing",
    "dim": "it runs over all numbers, not over one dimension",
    "descending": "it is sorted the other way round",
    "key": "things are compared by another measure",
}


def _is_module(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in MODULES


def names(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """One argument in the place of another."""
    if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
        return
    if node.id not in at.arguments:
        return
    for other in at.arguments:
        if other != node.id:
            phrase = f"`{other}` stands where `{node.id}` belongs"
            if _is_size(node, at):
                phrase = f"a size is not taken from `{node.id}`, but from elsewhere"
            yield phrase, ast.Name(other, ast.Load())


def _is_size(node: ast.AST, at: _Places) -> bool:
    """Whether a name stands in `x.shape` or `len(x)`."""
    parent = at.parents[node]
    return _is_shape(parent) or (
        isinstance(parent, ast.Call) and name_of(parent) == "len"
    )


def shapes(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """A matrix that is not transposed, a border that is missing."""
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield f"a matrix is not transposed{at.of(node)}", node.value
    if isinstance(node, ast.Slice):
        owner = at.of(at.above(node, ast.Subscript) or node)
        if node.lower is not None:
            yield f"the first ones are not left out{owner}", ast.Slice(None, node.upper)
        if node.upper is not None:
            yield f"the last ones are not left out{owner}", ast.Slice(node.lower, None)


def cases(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """A special case that is missing."""
    if isinstance(node, ast.IfExp):
        phrase = f"one of two cases is missing{at.of(node.test)}"
        yield phrase, node.body
        yield phrase, node.orelse
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield f"one of two conditions is missing{at.of(node)}", value
    if isinstance(node, ast.If):
        phrase = f"a special case is missing{at.of(node.test)}"
        yield phrase, ast.If(ast.Constant(False), node.body, node.orelse)
        yield phrase, ast.If(ast.Constant(True), node.body, node.orelse)


def statements(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Something that is not carried along, or returned in another order."""
    if isinstance(node, ast.AugAssign):
        yield "something is not carried from one round to the next", ast.Pass()
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in at.arguments:
            yield f"`{target.id}` stays as it came in", ast.Pass()
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        order = ast.Tuple(node.value.elts[::-1], ast.Load())
        if len(order.elts) == 2:
            yield "the two results are in the wrong order", ast.Return(order)


# what is done to a part of the answer -> what then went wrong
TOO_MANY = {
    "{} ** 0.5": "there is a square root too many",
    "{} ** 2": "there is a square too many",
    "2 * {}": "something is counted twice",
    "{}.relu()": "there is an activation too many",
    "{}.abs()": "there is an absolute value too many",
    "-{}": "something has the wrong sign",
    "{}.exp()": "there is an exponential too many",
    "{}.log()": "there is a logarithm too many",
    "{}.flip(0)": "something is in reverse order",
    "{}.mean()": "one number, the mean, stands for all of them",
    "{}.sum()": "one number, the sum, stands for all of them",
}


def too_many(node: ast.AST, at: _Places) -> Iterator[Slip]:
    """Something done to a part of the answer that is not asked for."""
    is_argument = isinstance(node, ast.Name) and node.id in at.arguments
    is_result = isinstance(node, ast.BinOp | ast.Call)
    if not (is_argument or is_result) or not _is_read(node):
        return
    for form, phrase in TOO_MANY.items():
        tree = ast.parse(form.format("(HERE)"), mode="eval").body
        yield f"{phrase}{at.of(node)}", _Filled(node).visit(tree)


def _is_read(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


class _Filled(ast.NodeTransformer):
    """Puts an expression in the place of the name HERE."""

    def __init__(self, node: ast.AST) -> None:
        self.node = node

    def visit_Name(self, name: ast.Name) -> ast.AST:
        return self.node if name.id == "HERE" else name


RULES: list[Callable[[ast.AST, _Places], Iterator[Slip]]] = [
    names,
    products,
    sums,
    other_operators,
    comparisons,
    signs,
    numbers,
    calls,
    shapes,
    cases,
    statements,
    too_many,
]
