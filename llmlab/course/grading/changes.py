"""Changes of a learner's code, of which one may make it right.

Each rule looks at one place of the code and yields (what is wrong there, what stands
there instead). The words are about what the learner wrote: "a factor is too much".
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmlab.course.grading.slips import (
    DIMENSIONS,
    LEFT_OUT,
    OTHERS,
    REVERSED,
    STRICT,
    integer,
    is_dimension,
    name_of,
    replaced,
    turned,
)

SHOWN = 60  # characters of a line of code
SHORT = 10


@dataclass(frozen=True)
class Change:
    """A place in a learner's code and what is wrong there."""

    line: int  # 1 is the line with `def`
    code: str
    kind: str

    def __str__(self) -> str:
        code = self.code if len(self.code) <= SHOWN else f"{self.code[: SHOWN - 2]} …"
        return f"line {self.line}, `{code}`: {self.kind}"


Edit = tuple[str, ast.AST]  # what is wrong there, and what stands there instead


class Code:
    """A function's code: its nodes, their parents, and the names that it knows."""

    def __init__(self, tree: ast.FunctionDef, worked: ast.FunctionDef | None) -> None:
        self.tree = tree
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
        self.nodes = [n for line in tree.body for n in ast.walk(line)]
        self.arguments = [a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)]
        own = sorted(_stored(tree) - set(self.arguments))
        self.variables = [*self.arguments, *own]
        self.worked = worked
        self.numbers = _numbers_of(worked) | _numbers_of(tree) | {0, 1, 2}

    def line(self, node: ast.AST) -> int:
        """The line where a node stands."""
        while not hasattr(node, "lineno"):
            node = self.parents[node]
        return node.lineno

    def around(self, node: ast.AST) -> str:
        """The text of a node; of what stands around it, where it is short."""
        text = _text(node)
        while len(text) < SHORT and not isinstance(self.parents[node], ast.stmt):
            node = self.parents[node]
            if not isinstance(node, ast.Slice):
                text = _text(node)
        return text

    @contextmanager
    def with_change(self, node: ast.AST, new: ast.AST) -> Iterator[None]:
        """For a while, `new` stands in the place of `node`."""
        parent = self.parents[node]
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, new)
                yield
                setattr(parent, name, node)
                return
            if isinstance(value, list) and any(item is node for item in value):
                changed = [new if item is node else item for item in value]
                setattr(parent, name, changed)
                yield
                setattr(parent, name, value)
                return

    def callee(self, node: ast.AST) -> bool:
        """Whether a node is a function that is called, or a module."""
        parent = self.parents.get(node)
        return (isinstance(parent, ast.Call) and parent.func is node) or (
            isinstance(parent, ast.Attribute) and not isinstance(node, ast.Call)
        )


def _numbers_of(tree: ast.AST | None) -> set[float]:
    if tree is None:
        return set()
    values = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return {v for v in values if type(v) in (int, float)}


def changes(
    tree: ast.FunctionDef,
    worked: ast.FunctionDef | None = None,
    rounds: int | None = None,
) -> Iterator[Change]:
    """Makes one change after the other in `tree`, the likely ones first.

    Each is undone when the next is asked for; after the last, all is as it was.

    Args:
        worked: a right answer, whose numbers and parts may belong there.
        rounds: how many of the `ROUNDS` are made; None for all.
    """
    code = Code(tree, worked)
    for rules in ROUNDS[:rounds]:
        for node in code.nodes:
            for rule in rules:
                for kind, new in [*rule(node, code)]:
                    change = Change(code.line(node), code.around(node), kind)
                    with code.with_change(node, new):
                        yield change
        if rules is ROUNDS[0]:
            body = tree.body
            for change, tree.body in blocks(code):
                yield change
            tree.body = body


def _text(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0]


def _is_read(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load)


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.parse(name, mode="eval").body, [*args], [])


def operators(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Another operation, the other way round, or a part too many."""
    if not isinstance(node, ast.BinOp):
        return
    left, op, right = node.left, node.op, node.right
    parts = {
        ast.Add: "a term",
        ast.Sub: "a term",
        ast.Mult: "a factor",
        ast.Div: "a division",
        ast.FloorDiv: "a division",
        ast.MatMult: "a matrix product",
        ast.Mod: "a remainder",
        ast.Pow: "a power",
    }
    part = parts.get(type(op), "a part")
    yield f"{part} is too much, `{ast.unparse(right)}`", left
    if isinstance(op, ast.Add | ast.Mult | ast.Sub | ast.Div | ast.MatMult):
        yield f"{part} is too much, `{ast.unparse(left)}`", right
    for other, kind in OPERATIONS.get(type(op), []):
        yield kind, ast.BinOp(left, other(), right)
    if isinstance(op, ast.Sub | ast.Div | ast.FloorDiv | ast.MatMult):
        yield "it is the wrong way round", ast.BinOp(right, op, left)
    if isinstance(op, ast.Div | ast.FloorDiv):
        up = ast.BinOp(ast.UnaryOp(ast.USub(), left), ast.FloorDiv(), right)
        yield "it is not rounded up", ast.UnaryOp(ast.USub(), up)


WRONG = "another operation belongs there"
OPERATIONS: dict[type, list[tuple[type, str]]] = {
    ast.Add: [(ast.Sub, "a sign is wrong"), (ast.Mult, WRONG)],
    ast.Sub: [(ast.Add, "a sign is wrong"), (ast.Div, WRONG)],
    ast.Mult: [
        (ast.Div, "it is multiplied where it is to be divided"),
        (ast.Add, WRONG),
    ],
    ast.Div: [
        (ast.Mult, "it is divided where it is to be multiplied"),
        (ast.FloorDiv, "it is to be rounded down"),
    ],
    ast.FloorDiv: [
        (ast.Div, "the division cuts off what is behind the point"),
        (ast.Mod, "the remainder belongs there"),
        (ast.Mult, WRONG),
    ],
    ast.Mod: [(ast.FloorDiv, "the quotient belongs there, not the remainder")],
    ast.Pow: [(ast.Mult, "a power stands where a product belongs")],
    ast.BitAnd: [(ast.BitOr, "`and` and `or` are exchanged")],
    ast.BitOr: [(ast.BitAnd, "`and` and `or` are exchanged")],
}


def comparisons(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Equality on the wrong side, or all the wrong way round."""
    if not isinstance(node, ast.Compare):
        return
    for new in turned(node, STRICT):
        yield "equality falls on the wrong side", new
    for new in turned(node, REVERSED):
        yield "the condition is the wrong way round", new
    if len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        for other in (ast.LtE, ast.GtE):
            kind = "the condition holds in too few cases"
            yield kind, ast.Compare(node.left, [other()], node.comparators)


def signs(node: ast.AST, at: Code) -> Iterator[Edit]:
    """A minus or a `not` too many."""
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield "a sign is too much", node.operand


def numbers(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Another dimension, border or number."""
    value = integer(node)
    parent = at.parents.get(node)
    if value is None and isinstance(node, ast.Constant) and type(node.value) is float:
        value = node.value
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "it is the other way round", ast.Constant(not node.value)
    if value is None or integer(parent) is not None:
        return
    above = parent
    while above in at.parents and not isinstance(
        above, ast.Call | ast.Subscript | ast.stmt | ast.BinOp
    ):
        above = at.parents[above]
    is_dim = isinstance(above, ast.Call) and is_dimension(node, above, at.parents)
    if is_dim or (isinstance(above, ast.Subscript) and _is_shape(above.value)):
        for other in DIMENSIONS:
            if other != value:
                yield f"another dimension than {value} is meant", ast.Constant(other)
        return
    near = [value + 1, value - 1] if isinstance(value, int) else []
    others = [n for n in sorted(at.numbers) if n != value and n not in near]
    for other in near:
        yield f"the number {value} is off by one", ast.Constant(other)
    for other in others:
        yield f"{value} is not the right number", ast.Constant(other)


def _is_shape(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "shape"


MAKERS = frozenset(("zeros", "ones", "empty", "full", "arange", "rand", "randn", "eye"))


def names(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Another variable."""
    if not isinstance(node, ast.Name) or not _is_read(node):
        return
    if node.id not in at.variables:
        return
    above: ast.AST | None = node
    while above is not None and not isinstance(above, ast.stmt):
        if isinstance(above, ast.Call) and name_of(above) in MAKERS:
            return  # the size of something: it may become too large
        above = at.parents.get(above)
    for other in at.variables:
        if other != node.id:
            kind = f"another variable belongs in the place of `{node.id}`"
            yield kind, ast.Name(other, ast.Load())


TOO_MUCH = {
    **dict.fromkeys(LEFT_OUT, ""),
    **dict.fromkeys(
        ("detach", "clone", "item", "tolist", "list", "set", "tuple", "abs", "T"), ""
    ),
    **dict.fromkeys(("contiguous", "bfloat16", "half", "long", "unsqueeze"), ""),
}


def calls(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Another function, one too many, or an option that is."""
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "data"):
        yield f"`.{node.attr}` is too much", node.value
    if not isinstance(node, ast.Call):
        return
    name = name_of(node)
    for other, _ in OTHERS.get(name, []):
        changed = copy.deepcopy(node)
        if isinstance(changed.func, ast.Attribute):
            changed.func.attr = other
        elif isinstance(changed.func, ast.Name):
            changed.func.id = other
        yield f"another function than `{name}` belongs there", changed
    function = node.func
    inner = [*node.args]
    if isinstance(function, ast.Attribute):
        inner.append(function.value)
    if name in TOO_MUCH or len(inner) == 1:
        for kept in inner:
            yield f"`{name}` is too much", kept
    for i, keyword in enumerate(node.keywords):
        changed = copy.copy(node)
        changed.keywords = [*node.keywords[:i], *node.keywords[i + 1 :]]
        given = f"{keyword.arg}=" if keyword.arg else f"**{ast.unparse(keyword.value)}"
        yield f"`{given}` is too much", changed
    for i in range(len(node.args) - 1):
        changed = copy.copy(node)
        first, second = node.args[i : i + 2]
        changed.args = [*node.args[:i], second, first, *node.args[i + 2 :]]
        yield "two arguments are exchanged", changed
    if len(node.args) > 1:
        changed = copy.copy(node)
        changed.args = node.args[:-1]
        yield f"`{ast.unparse(node.args[-1])}` is too much", changed
    for other in COLLECTIVES:
        if name in COLLECTIVES and other != name:
            changed = copy.copy(node)
            changed.func = ast.Attribute(function.value, other, ast.Load())
            yield "another collective belongs there", changed
    if name in ("mean", "sum", "amax", "amin", "max", "softmax", "norm") and inner:
        for other in DIMENSIONS:
            if not any(k.arg == "dim" for k in node.keywords) and len(inner) == 1:
                changed = copy.copy(node)
                dim = ast.keyword("dim", ast.Constant(other))
                changed.keywords = [*node.keywords, dim]
                yield "it runs over all numbers, not over one dimension", changed


COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


def slices(node: ast.AST, at: Code) -> Iterator[Edit]:
    """A border more or less, by one."""
    if isinstance(node, ast.Slice):
        low, high, step = node.lower, node.upper, node.step
        if low is not None:
            yield "the first ones belong to it", ast.Slice(None, high, step)
        if high is not None:
            yield "the last ones belong to it", ast.Slice(low, None, step)
        if low is not None and high is None and step is None:
            yield "the other part is meant", ast.Slice(None, low)
        if high is not None and low is None and step is None:
            yield "the other part is meant", ast.Slice(high, None)
        if low is None:
            yield "the first one does not belong to it", _sliced(1, high, step)
        if high is None:
            yield "the last one does not belong to it", _sliced(low, -1, step)
        if step is None and low is None and high is None:
            yield "the order is the wrong way round", _sliced(None, None, -1)
        if step is not None:
            yield "every one of them is meant", ast.Slice(low, high)
    parent = at.parents.get(node)
    is_border = isinstance(parent, ast.Slice) or (
        isinstance(parent, ast.Call) and name_of(parent) in ("range", "arange")
    )
    is_index = isinstance(parent, ast.Subscript) and parent.slice is node
    is_number = isinstance(node, ast.Constant | ast.Slice)
    if (is_border or is_index) and not is_number and _is_read(node):
        for op in (ast.Add(), ast.Sub()):
            kind = "a border is off by one" if is_border else "it is one off"
            yield kind, ast.BinOp(node, op, ast.Constant(1))
    if isinstance(node, ast.Call) and name_of(node) == "range" and len(node.args) == 1:
        changed = copy.copy(node)
        changed.args = [ast.Constant(1), *node.args]
        yield "it begins one too early", changed
    if isinstance(parent, ast.For | ast.comprehension) and node is parent.iter:
        yield "the order is the wrong way round", _call("reversed", _call("list", node))


def _sliced(low: Any, high: Any, step: Any) -> ast.Slice:
    low, high, step = (
        ast.Constant(v) if isinstance(v, int) else v for v in (low, high, step)
    )
    return ast.Slice(low, high, step)


def cases(node: ast.AST, at: Code) -> Iterator[Edit]:
    """A condition that is too much, or the wrong one."""
    if isinstance(node, ast.IfExp):
        for kept in (node.body, node.orelse):
            yield "there is a case too many", kept
        yield (
            "the two cases are exchanged",
            ast.IfExp(node.test, node.orelse, node.body),
        )
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield "a condition is too much", value
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "`and` and `or` are exchanged", ast.BoolOp(other, node.values)
    if isinstance(node, ast.If | ast.While):
        kind = "the condition is the wrong way round"
        test = ast.UnaryOp(ast.Not(), node.test)
        yield kind, type(node)(test, node.body, node.orelse)
    parent = at.parents.get(node)
    is_tested = (
        isinstance(parent, ast.If | ast.IfExp | ast.While) and node is parent.test
    ) or isinstance(parent, ast.BoolOp)
    if is_tested and isinstance(node, ast.Name):
        given = ast.Compare(node, [ast.IsNot()], [ast.Constant(None)])
        yield f"`{node.id}` counts as false where it is 0 or empty", given
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        missing = ast.Compare(node.operand, [ast.Is()], [ast.Constant(None)])
        yield "0 and what is empty count as false, too", missing
    if isinstance(node, ast.comprehension) and node.ifs:
        kind = "a condition is too much"
        yield kind, ast.comprehension(node.target, node.iter, [], node.is_async)
    if isinstance(node, ast.Tuple | ast.List) and _is_read(node):
        for i, j in itertools.combinations(range(min(4, len(node.elts))), 2):
            elts = [*node.elts]
            elts[i], elts[j] = elts[j], elts[i]
            yield "they are in the wrong order", type(node)(elts, ast.Load())


HERE = {
    "-(HERE)": "a sign is missing",
    "abs(HERE)": "an absolute value is missing",
    "(HERE) ** 0.5": "a square root is missing",
    "(HERE) ** 2": "a square is missing",
    "(HERE) + 1": "it is one too small",
    "(HERE) - 1": "it is one too large",
    "(HERE) * 2": "a factor is missing",
    "(HERE) / 2": "a factor is too much",
    "max(HERE, 0)": "a lower bound is missing",
    "max(HERE, 1)": "a lower bound is missing",
    "min(HERE, 1)": "an upper bound is missing",
    "math.ceil(HERE)": "it is not rounded up",
    "int(HERE)": "it is not cut off to a whole number",
    "(HERE).T": "a matrix is not transposed",
    "(HERE).mT": "a matrix is not transposed",
    "(HERE).exp()": "an exponential is missing",
    "(HERE).log()": "a logarithm is missing",
    "(HERE).flip(0)": "the order is the wrong way round",
    "(HERE).flip(-1)": "the order is the wrong way round",
    "(HERE).float()": "it is not in float32",
    "(HERE).clone()": "it is not a copy",
    "(HERE).sum()": "a sum is missing",
    "(HERE).sum(-1)": "a sum is missing",
    "(HERE).sum(0)": "a sum is missing",
    "(HERE).mean()": "a mean is missing",
    "(HERE)[..., None]": "it is spread over another dimension",
    "(HERE)[:, None]": "it is spread over another dimension",
    "(HERE).cumsum(-1)": "a running sum is missing",
    "(HERE).round()": "it is not rounded",
    "(HERE).clamp(min=0)": "a lower bound is missing",
    "(HERE).transpose(1, 2)": "dimensions are not exchanged",
    "(HERE).softmax(-1)": "a softmax is missing",
    "(HERE).relu()": "an activation is missing",
    "(HERE) > 0": "only its sign is to be looked at",
    "(HERE).square()": "a square is missing",
    "(HERE).sqrt()": "a square root is missing",
    "(HERE).detach()": "a gradient flows here, and is not to",
    "(HERE).contiguous()": "it is not contiguous",
    "sorted(HERE)": "they are not sorted",
    "list(HERE)": "a list is asked for",
    "tuple(HERE)": "a tuple is asked for",
    "list(reversed(HERE))": "the order is the wrong way round",
}
COMMUNICATED = {
    "comm.all_reduce(HERE)": "the ranks' parts are not added up",
    "comm.all_reduce(torch.tensor(float(HERE))).item()": "every rank has its own",
    "comm.all_gather(HERE)": "the ranks' parts are not gathered",
    "comm.reduce_scatter(HERE)": "the ranks' parts are not added up and cut",
}
FORMS = [(ast.parse(f, mode="eval").body, kind) for f, kind in HERE.items()]
TALKS = [(ast.parse(f, mode="eval").body, kind) for f, kind in COMMUNICATED.items()]


def missing_steps(node: ast.AST, at: Code) -> Iterator[Edit]:
    """Something that is to be done to a part, and is not."""
    if not _is_value(node, at):
        return
    for form, kind in [*FORMS, *(TALKS if "comm" in at.arguments else [])]:
        yield kind, _filled(form, node)


def _is_value(node: ast.AST, at: Code) -> bool:
    """Whether a node is an expression that something may be done to."""
    kinds = ast.Name | ast.BinOp | ast.Call | ast.Attribute | ast.Subscript
    kinds |= ast.ListComp | ast.List
    if isinstance(node, ast.Name) and node.id not in at.variables:
        return False
    return isinstance(node, kinds) and _is_read(node) and not at.callee(node)


def _filled(form: ast.expr, node: ast.AST) -> ast.AST:
    """The form with `node` in the place of the name HERE."""
    for inner in ast.walk(form):
        if isinstance(inner, ast.Name) and inner.id == "HERE":
            return replaced(form, inner, node)
    return form


def missing_parts(node: ast.AST, at: Code) -> Iterator[Edit]:
    """A factor or a term that is missing: a variable."""
    if not _is_value(node, at) or isinstance(node, ast.List | ast.ListComp):
        return
    for name in at.variables:
        other = ast.Name(name, ast.Load())
        yield f"a factor is missing (`{name}`)", ast.BinOp(node, ast.Mult(), other)
        yield f"a division is missing (`{name}`)", ast.BinOp(node, ast.Div(), other)
        yield f"a term is missing (`{name}`)", ast.BinOp(node, ast.Add(), other)
        yield f"a term is missing (`{name}`)", ast.BinOp(node, ast.Sub(), other)


def worked_parts(node: ast.AST, at: Code) -> Iterator[Edit]:
    """A part that the worked answer has in another form, of the arguments alone.

    The most of an answer is no part: "all of it is wrong" helps nobody.
    """
    is_part = _is_value(node, at) or isinstance(node, ast.Compare)
    if not is_part or len([*ast.walk(node)]) > len(at.nodes) / 2:
        return
    own = ast.dump(node)
    for part in _parts_of(at.worked, at.arguments):
        same_kind = isinstance(part, ast.Compare) == isinstance(node, ast.Compare)
        if ast.dump(part) != own and same_kind:
            yield "this part is not what belongs there", part


def _parts_of(
    worked: ast.FunctionDef | None, arguments: Iterable[str]
) -> list[ast.AST]:
    """The expressions of the worked answer that need no variable of its own."""
    own = _stored(worked)
    out: dict[str, ast.AST] = {}
    for node in ast.walk(worked) if worked else []:
        if isinstance(node, ast.BinOp | ast.Call | ast.Subscript | ast.Compare):
            used = _used(node)
            if not used & own and used & set(arguments):
                out.setdefault(ast.dump(node), node)
    return list(out.values())


ROUNDS: list[list[Callable[[ast.AST, Code], Iterator[Edit]]]] = [
    [comparisons, signs, operators, cases, slices, calls],
    [numbers],
    [names],
    [missing_steps],
    [missing_parts],
    [worked_parts],
]


Body = list[ast.stmt]


def blocks(code: Code) -> Iterator[tuple[Change, Body]]:
    """Whole lines: too many, in another order, in or out of a loop, a case missing."""
    yield from _lines(code.tree.body)
    worked = code.worked.body if code.worked else []
    own = _stored(code.worked)
    first = code.tree.body[0]
    for statement in worked:
        used = _used(statement)
        if isinstance(statement, ast.If) and not used & own:
            tested = [f"`{a}`" for a in code.arguments if a in used]
            kind = f"before it, a special case is missing ({' and '.join(tested[:2])})"
            change = Change(first.lineno, _text(first), kind)
            yield change, [statement, *code.tree.body]


def _lines(body: Body) -> Iterator[tuple[Change, Body]]:
    """The changed bodies of all lines, also of those within others."""
    for i, line in enumerate(body):
        before, after = body[:i], body[i + 1 :]
        for kind, new, rest in _of_line(line, after):
            for made in new:
                made.lineno = getattr(made, "lineno", line.lineno)
            place = after[0] if kind == INTO else line
            place = line.body[-1] if kind == BEHIND else place
            yield Change(place.lineno, _text(place), kind), [*before, *new, *rest]
        for field in ("body", "orelse"):
            for change, inside in _lines(getattr(line, field, [])):
                changed = copy.copy(line)
                setattr(changed, field, inside)
                yield change, [*before, changed, *after]


INTO = "it belongs into the loop"
BEHIND = "it belongs after the loop"


def _of_line(line: ast.stmt, after: Body) -> Iterator[tuple[str, Body, Body]]:
    """(what is wrong, what stands for the line, what follows) for each change of it."""
    if isinstance(line, ast.Return):
        return
    yield "this is too much", [] if after else [ast.Pass()], after
    if after:
        kind = "this and the next line are in the wrong order"
        yield kind, [after[0], line], after[1:]
    if isinstance(line, ast.AugAssign):
        anew = ast.Assign([line.target], line.value)
        yield "this is to begin anew, not to be added up", [anew], after
        value = ast.BinOp(_read(line.target), line.op, line.value)
        yield "this changes a value in place", [ast.Assign([line.target], value)], after
    if isinstance(line, ast.Assign) and isinstance(
        line.targets[0], ast.Name | ast.Subscript
    ):
        more = ast.AugAssign(line.targets[0], ast.Add(), line.value)
        yield "this is to be added up, not to begin anew", [more], after
    if isinstance(line, ast.With):
        yield "this is too much", line.body, after
    if isinstance(line, ast.For | ast.While):
        if len(line.body) > 1:
            yield BEHIND, [_with_body(line, line.body[:-1]), line.body[-1]], after
        if after:
            yield INTO, [_with_body(line, [*line.body, after[0]])], after[1:]


def _with_body(line: ast.stmt, body: Body) -> ast.stmt:
    changed = copy.copy(line)
    changed.body = body  # type: ignore[attr-defined]
    return changed


def _read(target: ast.expr) -> ast.expr:
    """A target of an assignment, as it is read."""
    out = copy.deepcopy(target)
    for node in ast.walk(out):
        if hasattr(node, "ctx"):
            node.ctx = ast.Load()
    return out


def _used(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def _stored(tree: ast.AST | None) -> set[str]:
    """The variables that code makes."""
    if tree is None:
        return set()
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    return {n.id for n in nodes if isinstance(n.ctx, ast.Store)}
