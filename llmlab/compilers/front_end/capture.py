"""From a Python function to a graph: run it once on values that only write down.

A `Traced` stands where a tensor would. It has a type and no numbers; every torch
function that is given one adds a node to the program. What the function does in plain
Python (loops over layers, `if` on a setting) happens now, once, and leaves no trace.

What tracing cannot see it must refuse, or the program would be wrong in silence:

    if x.sum() > 0        which way? that depends on numbers which are not there
    y = x.view(…); x += 1     y changes as well, and the program would not know

A change of an input is kept: the new value is one more result, which is stored into the
input at the end (torch.export calls this functionalisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor

from llmlab.compilers.front_end.ir import (
    OPS,
    SHORT,
    Graph,
    Node,
    Type,
    constant,
    made,
)


class CannotCapture(TypeError):
    """The function does something that a trace cannot hold."""


class Trace:
    """The program as far as it has been written."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[int, Node] = {}
        # tensors from outside, so that an id is not given away again, and how often
        # each had been changed
        self.kept: list[tuple[Tensor, int]] = []
        self.changed_outside = False

    def add(self, node: Node, storage: Storage | None = None) -> Traced:
        self.nodes.append(node)
        return Traced(self, node, storage or Storage())

    def node_of(self, x: object, dtype: torch.dtype) -> Node:
        """The node of an operand: a traced value, a number, or a tensor from outside.

        Raises:
            CannotCapture: it is none of these.
        """
        if isinstance(x, Traced) and x.trace is not self:
            raise CannotCapture(
                "a value of another capture: it has no place in this one"
            )
        if isinstance(x, Traced):
            return x.node
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            node = constant(x, dtype)
            self.nodes.append(node)
            return node
        if not isinstance(x, Tensor):
            raise CannotCapture(
                f"{type(x).__name__} is no operand: tensors and numbers"
            )
        if id(x) not in self.constants:
            self.constants[id(x)] = constant(x.detach(), x.dtype)
            self.nodes.append(self.constants[id(x)])
            self.kept.append((x, changes(x)))
        return self.constants[id(x)]


def changes(x: Tensor) -> int:
    """How often a tensor has been changed in place."""
    return 0 if x.is_inference() else x._version


@dataclass
class Storage:
    """Where the numbers of a tensor would lie: it and its views have the same.

    A view that the function has let go of is not seen changing, and does not count.
    """

    tensors: WeakSet[Traced] = field(default_factory=WeakSet)


def operator(name: str) -> Callable:
    """The method behind x + y: a function of the table below."""
    return lambda self, other: FUNCTIONS[name](self, other)


def reflected(name: str) -> Callable:
    """The method behind 2 + x."""
    return lambda self, other: FUNCTIONS[name](other, self)


def in_place(name: str) -> Callable:
    """The method behind x += y."""
    return lambda self, other: self.become(FUNCTIONS[name](self, other), f"x.{name}_")


class Traced:
    """What a captured function sees instead of a tensor."""

    def __init__(self, trace: Trace, node: Node, storage: Storage) -> None:
        self.trace = trace
        self.node = node
        self.storage = storage
        storage.tensors.add(self)

    # what it tells about itself, without numbers

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.node.type.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.node.type.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    # what it cannot tell

    def _no_number(self, what: str) -> CannotCapture:
        return CannotCapture(
            f"{what} asks for the numbers of a value, and while a function is captured"
            " there are none: a trace has one way through the program"
        )

    def __bool__(self) -> bool:
        raise self._no_number("if, while, and, or: bool(x)")

    def _compared(self, other: object) -> bool:
        raise self._no_number("x < y and its like")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compared
    __hash__ = object.__hash__

    def __float__(self) -> float:
        raise self._no_number("float(x)")

    def __int__(self) -> int:
        raise self._no_number("int(x)")

    def item(self) -> float:
        raise self._no_number("x.item()")

    def tolist(self) -> list:
        raise self._no_number("x.tolist()")

    def __getitem__(self, key: object) -> Traced:
        raise CannotCapture("x[…] reads a part of a tensor: only whole ones are known")

    def __setitem__(self, key: object, value: object) -> None:
        raise CannotCapture(
            "x[…] = y writes into a part of a tensor: make a new one instead"
        )

    # operations

    def emit(self, op: str, *operands: object, attributes: tuple = ()) -> Traced:
        """One more line of the program."""
        nodes = [self.trace.node_of(x, self.dtype) for x in operands]
        return self.trace.add(made(op, nodes, attributes))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name.removesuffix("_") in FUNCTIONS and name.endswith("_"):
            # Python takes a refusal of c += x for the wish to try c = c + x
            traced(*args).trace.changed_outside = True
        if name not in FUNCTIONS:
            raise CannotCapture(
                f"torch's {name} is not known here: {', '.join(sorted(FUNCTIONS))}"
            )
        # what is off by default is not asked for
        given = {
            k: v
            for k, v in (kwargs or {}).items()
            if v is not None and v is not False and k[0] != "_"
        }
        return called(name, args, given)

    def __getattr__(self, name: str):
        """Methods: x.exp() is torch.exp(x), x.exp_() changes x."""
        base = name.removesuffix("_")
        if name.startswith("_"):
            raise AttributeError(name)
        if base not in FUNCTIONS:
            raise CannotCapture(
                f"x.{name} is not known here: {', '.join(sorted(FUNCTIONS))}"
            )
        if base == name:
            return lambda *args, **kwargs: called(base, (self, *args), kwargs)
        return lambda *args, **kwargs: self.become(
            called(base, (self, *args), kwargs), f"x.{name}"
        )

    def become(self, new: Traced, what: str) -> Traced:
        """A change in place: from here on, x means the new value.

        Raises:
            CannotCapture: there is a view of x, which would change with it.
        """
        if new.shape != self.shape:
            raise CannotCapture(f"{what} would change the shape of x")
        if len(self.storage.tensors) > 1:
            raise CannotCapture(
                f"{what} changes a tensor that has a view (reshape, transpose):"
                " the view changes with it, and a trace does not know that"
            )
        self.node = new.node
        return self

    __add__ = operator("add")
    __sub__ = operator("sub")
    __mul__ = operator("mul")
    __truediv__ = operator("div")
    __matmul__ = operator("matmul")
    __pow__ = operator("pow")
    __radd__ = reflected("add")
    __rsub__ = reflected("sub")
    __rmul__ = reflected("mul")
    __rtruediv__ = reflected("div")
    __rmatmul__ = reflected("matmul")
    __iadd__ = in_place("add")
    __isub__ = in_place("sub")
    __imul__ = in_place("mul")
    __itruediv__ = in_place("div")
    __ipow__ = in_place("pow")

    def __neg__(self) -> Traced:
        return negative(self)

    @property
    def mT(self) -> Traced:
        return transpose(self, -2, -1)

    @property
    def T(self) -> Traced:
        return permute(self, *reversed(range(self.ndim)))


# torch's functions in terms of ours ---------------------------------------------------


def called(name: str, args: tuple, kwargs: dict) -> Traced:
    """A function of the table below.

    Raises:
        CannotCapture: arguments that it does not take.
    """
    try:
        return FUNCTIONS[name](*args, **kwargs)
    except TypeError as problem:
        if isinstance(problem, CannotCapture):
            raise
        raise CannotCapture(f"torch's {name}: {problem}") from None


def dim_of(x: Traced, dim: object) -> int:
    """A dimension, counted from the front.

    Raises:
        CannotCapture: there is none of this number.
    """
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise CannotCapture(f"dim={dim}: no dimension of the shape {tuple(x.shape)}")
    return dim % x.ndim


def traced(*operands: object) -> Traced:
    """The first operand that is traced: it knows the program."""
    return next(x for x in operands if isinstance(x, Traced))


def binary(op: str) -> Callable:
    """A function of two operands that is one operation."""
    return lambda x, y: traced(x, y).emit(op, x, y)


def unary(op: str) -> Callable:
    """A function of one value that is one operation."""
    return lambda x: x.emit(op, x)


add, subtract, multiply, divide = map(binary, ("add", "sub", "mul", "div"))
maximum = binary("maximum")
negative, exp, tanh, sqrt, draw = map(unary, ("neg", "exp", "tanh", "sqrt", "draw"))


def matmul(x, y):
    """x @ y, or a batch of them."""
    return traced(x, y).emit("matmul", x, y, attributes=(False,))


def power(x, exponent):
    """Whole exponents from 1, as products.

    Raises:
        CannotCapture: another one.
    """
    if not isinstance(exponent, (int, float)) or exponent not in (1, 2, 3, 4):
        raise CannotCapture(f"x ** {exponent}: only 1, 2, 3 and 4 are known")
    result = Traced(x.trace, x.node, Storage())  # x ** 1 is another tensor than x
    for _ in range(int(exponent) - 1):
        result = multiply(result, x)
    return result


def relu(x, inplace=False):
    """max(x, 0)."""
    new = maximum(x, 0.0)
    return x.become(new, "relu(inplace=True)") if inplace else new


def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return 1.0 / (1.0 + exp(-x))


def silu(x):
    """x · sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x, approximate="none"):
    """The tanh form.

    Raises:
        CannotCapture: the exact form was asked for.
    """
    if approximate != "tanh":
        raise CannotCapture('gelu: only approximate="tanh" is known')
    return 0.5 * x * (1.0 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reduced(op: str, x: Traced, dim: int, keepdim: bool) -> Traced:
    """A reduction keeps its dimension; where it shall not, a reshape follows."""
    dim = dim_of(x, dim)
    result = x.emit(op, x, attributes=(dim,))
    if keepdim:
        return result
    return reshape(result, (*x.shape[:dim], *x.shape[dim + 1 :]))


def sum_(x, dim=None, keepdim=False):
    """A sum along one dimension, or of all numbers."""
    if dim is None:
        return reduced("sum", reshape(x, -1), 0, keepdim=False)
    return reduced("sum", x, dim, keepdim)


def amax(x, dim, keepdim=False):
    """The largest along one dimension.

    Raises:
        CannotCapture: there are no numbers.
    """
    if x.shape[dim_of(x, dim)] == 0:
        raise CannotCapture(f"amax of the shape {tuple(x.shape)}: dim={dim} is empty")
    return reduced("max", x, dim, keepdim)


def mean(x, dim=None, keepdim=False):
    """The sum, divided by the number of its terms."""
    terms = math.prod(x.shape) if dim is None else x.shape[dim_of(x, dim)]
    return sum_(x, dim, keepdim) / terms


def softmax(x, dim):
    """With the largest subtracted first, so that no exponential overflows."""
    e = exp(x - amax(x, dim, keepdim=True))
    return e / sum_(e, dim, keepdim=True)


def linear(x, weight, bias=None):
    """x Wᵀ + b."""
    y = matmul(x, transpose(of(traced(x, weight), weight), 0, 1))
    return y if bias is None else y + bias


def of(other: Traced, x: Traced | Tensor) -> Traced:
    """A tensor from outside as a traced value of the same program."""
    if isinstance(x, Traced):
        return x
    return Traced(other.trace, other.trace.node_of(x, other.dtype), Storage())


def transpose(x, dim0, dim1):
    """Two dimensions exchanged."""
    dim0, dim1 = dim_of(x, dim0), dim_of(x, dim1)
    order = list(range(x.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(x, order)


def permute(x, *order):
    """Dimensions in another order."""
    order = one_by_one(order)
    order = tuple(dim_of(x, dim) for dim in order)
    node = made("transpose", [x.node], (order,))
    return x.trace.add(node, x.storage)


def one_by_one(numbers: tuple) -> tuple:
    """(2, 3), however it was written: f(2, 3) or f((2, 3))."""
    if len(numbers) == 1 and not isinstance(numbers[0], int):
        return tuple(numbers[0])
    return numbers


def reshape(x, *shape):
    """The same numbers in another shape; one size may be −1.

    Raises:
        CannotCapture: sizes that do not say which shape it is.
    """
    shape = one_by_one(shape)
    rest = math.prod(size for size in shape if size != -1)
    if min(shape, default=0) < -1 or shape.count(-1) > (rest != 0):
        raise CannotCapture(f"reshape to {shape}: sizes from 0, and one −1 at most")
    shape = tuple(math.prod(x.shape) // rest if s == -1 else s for s in shape)
    node = made("reshape", [x.node], (shape,))
    return x.trace.add(node, x.storage)


def report(x, label: str):
    """Write the mean of a value to the log when the program runs: an effect."""
    if isinstance(x, Traced):
        return x.emit("report", x, attributes=(label,))
    return OPS["report"].run([x], (label,))


FUNCTIONS: dict[str, Callable] = {
    "add": add,
    "sub": subtract,
    "subtract": subtract,
    "mul": multiply,
    "multiply": multiply,
    "div": divide,
    "divide": divide,
    "true_divide": divide,
    "maximum": maximum,
    "neg": negative,
    "negative": negative,
    "exp": exp,
    "tanh": tanh,
    "sqrt": sqrt,
    "pow": power,
    "matmul": matmul,
    "mm": matmul,
    "bmm": matmul,
    "linear": linear,
    "relu": relu,
    "sigmoid": sigmoid,
    "silu": silu,
    "gelu": gelu,
    "sum": sum_,
    "amax": amax,
    "mean": mean,
    "softmax": softmax,
    "transpose": transpose,
    "permute": permute,
    "reshape": reshape,
    "view": reshape,
    "rand_like": draw,
}


def capture(function: Callable, *examples: Tensor) -> Graph:
    """The program that `function` runs on inputs of these types.

    Args:
        examples: tensors whose shapes and dtypes count; their numbers do not.
    Returns:
        A graph whose constants are the tensors that the function took from outside.
    Raises:
        CannotCapture: control flow on numbers, a change of a tensor that has a view, or
            a function that is not known.
        TypeMismatch: shapes that do not fit.
    """
    trace = Trace()
    inputs = []
    for x in examples:
        if getattr(x, "dtype", None) not in SHORT:
            kind = getattr(x, "dtype", type(x).__name__)
            raise CannotCapture(f"an example is of {kind}: float32 or float64")
        inputs.append(trace.add(Node("input", (), Type(tuple(x.shape), x.dtype))))
    first = [value.node for value in inputs]
    returned = function(*inputs)
    results = returned if isinstance(returned, (tuple, list)) else [returned]
    outputs = []
    for x in results:
        if not isinstance(x, (Traced, Tensor)):
            raise CannotCapture(
                f"the function returned a {type(x).__name__}: return tensors"
            )
        outputs.append(trace.node_of(x, torch.float32))
    if trace.changed_outside or any(changes(x) != n for x, n in trace.kept):
        raise CannotCapture(
            "a tensor that is no argument was changed in place: write c = c + x, not"
            " c += x, or hand it over"
        )
    updates = {
        old: value.node
        for old, value in zip(first, inputs, strict=True)
        if value.node is not old
    }
    return Graph(first, trace.nodes, outputs, updates)
