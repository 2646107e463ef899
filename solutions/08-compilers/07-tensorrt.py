# %% [markdown]
# # Solutions: TensorRT
#
# Four decisions of an engine builder: how much to clip, where codes begin, what they may pass, and what two layers must have in common to take the same time. A `Node` is one operation and its value:
#
# | attribute | holds |
# |---|---|
# | `op`, `attributes` | the name, and a tuple of what it needs beside its inputs: the dimension of a sum, whether a product reads its second input transposed |
# | `inputs` | the nodes that it reads |
# | `type` | `type.shape`, `type.dtype`, `type.bytes` |
# | `number` | of a constant that is one number: that number. Else `None` |
# | `kind` | elementwise, reduction, matmul, layout, constant, input |
#
# Stuck? `check.hint("divergence_of")` shows a hint, and the next one when it is called again.

# %%
import math
from collections.abc import Hashable

from torch import Tensor

from llmlab.checks.compilers.tensorrt import check
from llmlab.compilers.front_end import Graph, Node
from llmlab.compilers.tensorrt import Layer, stored_format

# %% [markdown]
# ## Exercise 1: divergence_of
# ●●●○○ difficulty · ●●●●● importance · 20 minutes · 3 points
#
# A histogram has `counts` of $|x|$, whole numbers. A threshold keeps the first `kept` bins and clips the rest. How much is lost? Compare two distributions over the kept bins:
#
# - $P$: the counts of the kept bins; the last one gets all that is clipped on top. Divided by its sum.
# - $Q$: what `levels` levels can tell. Bin $j$ belongs to level $\lfloor j \cdot \text{levels} / \text{kept} \rfloor$. A level's count (of the kept bins as they were, so $Q$ does not know what is clipped) is divided in equal parts among those of its bins that are not empty. Divided by its own sum.
#
# Return $\sum_j P_j \ln(P_j / Q_j)$ over the bins with $P_j > 0$. If $Q_j = 0$ there, it is infinite (`math.inf`). Leave `counts` as it is.


# %% tags=["exercise"]
def divergence_of(counts: Tensor, kept: int, levels: int) -> float:
    """KL(P ‖ Q) of the threshold that keeps so many bins."""
    # BEGIN SOLUTION
    inside = [float(c) for c in counts[:kept]]
    P = list(inside)
    P[-1] += float(counts[kept:].sum())
    Q = [0.0] * kept
    for level in range(levels):
        bins = [j for j in range(kept) if j * levels // kept == level]
        filled = [j for j in bins if inside[j] > 0]
        for j in filled:
            Q[j] = sum(inside[k] for k in bins) / len(filled)
    result = 0.0
    for p, q in zip(P, Q, strict=True):
        if p > 0:
            if q == 0:
                return math.inf
            result += p / sum(P) * math.log(p / sum(P) * sum(Q) / q)
    return result
    # END SOLUTION


# %% tags=["check"]
check.divergence_of(divergence_of)

# %% [markdown] tags=["solution"]
# The levels alone would make wide ranges bad and narrow ones good; the counts that are heaped onto the last bin make narrow ones bad. But a count is a count: one value of 2,000 that is clipped to 50 adds one to the last bin, as one of 51 would. **How far** a value is moved is nowhere in the sum. This is what the
# lesson's experiment turns on. The package's `divergence` takes all candidates at once, with cumulative sums.

# %% [markdown]
# ## Exercise 2: values_to_quantise
# ●●●○○ difficulty · ●●●●○ importance · 15 minutes · 3 points
#
# Which values of a program need a scale, so that its products run in 8 bits and read codes? `weights` is a set of nodes. In the order of `graph.nodes`:
#
# 1. A product with a weight is a `"matmul"` whose second input is in `weights`. Its first input needs a scale.
# 2. An `"add"` that reads the result of such a product, on either side: the other value needs a scale if it has the shape of the sum (`other.type == node.type`; a bias has not). The layer then reads a residual in codes. If both inputs are such products, first the second of them, then the first.
#
# Each value once, at the place where it is found first. Weights are not in the list: they get their scales by themselves.


# %% tags=["exercise"]
def values_to_quantise(graph: Graph, weights: set[Node]) -> list[Node]:
    """The values at which Q and DQ must stand."""
    # BEGIN SOLUTION
    found = {}
    products = set()
    for node in graph.nodes:
        if node.op == "matmul" and node.inputs[1] in weights:
            found[node.inputs[0]] = None
            products.add(node)
        elif node.op == "add":
            a, b = node.inputs
            for one, other in ((a, b), (b, a)):
                if one in products and other.type == node.type:
                    found[other] = None
    return list(found)
    # END SOLUTION


# %% tags=["check"]
check.values_to_quantise(values_to_quantise)

# %% [markdown] tags=["solution"]
# Q stands at the *inputs* of products, not at their results. Between a product and the next Q, bias, activation and residual are computed in the accumulator's precision, inside the same layer, and rounded once. With a Q right behind each product, the activation would need a DQ before it and another Q behind it.

# %% [markdown]
# ## Exercise 3: moves_through
# ●●●○○ difficulty · ●●●●○ importance · 10 minutes · 2 points
#
# Q shall go up through an operation, and DQ down, so that codes are what is written and copied. There is one scale for a whole tensor, its codes are symmetric, and other inputs stay as they are. Return `True` if for every $x$ and every code $q$
#
# $$f(Q(x)) = Q(f(x)) \quad \text{and} \quad f(s\,q) = s\,f(q)$$
#
# The operations are `reshape`, `transpose`, `max` and `sum` (along a dimension), `maximum`, `neg`, `add`, `sub`, `mul`, `div`, `exp`, `tanh`, `sqrt`, `matmul`. Two values have two scales; a constant has none.


# %% tags=["exercise"]
def moves_through(node: Node) -> bool:
    """Whether Q and DQ can change places with this operation."""
    # BEGIN SOLUTION
    if node.kind == "layout" or node.op in ("neg", "max"):
        return True
    return node.op == "maximum" and any(each.number == 0 for each in node.inputs)
    # END SOLUTION


# %% tags=["check"]
check.moves_through(moves_through)

# %% [markdown] tags=["solution"]
# Rounding is monotone: it never exchanges two numbers. So whatever *picks* numbers commutes with it. Clipping at ±127 is monotone, too. With the codes of some libraries, −128 … 127, a change of sign would not commute.

# %% [markdown]
# ## Exercise 4: timing_key
# ●●●○○ difficulty · ●●●●○ importance · 20 minutes · 3 points
#
# A timing cache is a dict from keys to times. Two layers shall have the same key if and only if, on one machine, they take the same time: their weights may hold other numbers. A `Layer` has `reads` (values from outside), `nodes` (its operations, each after those that it reads) and `roots` (the values that it writes; here that is always the last operation, so the key can do without). A constant that an operation reads is in neither list: of it, the type counts. The key must tell apart
#
# - operations, their `attributes`, and which values they read: $a - b$ is not $b - a$;
# - types (`node.type`) of all values, those in `reads` as well, and the formats of codes (`stored_format(node)`: `"int8"`, `"e4m3"`, or `None` for floats);
# - the number of `rows` that it is timed with, and of `threads`.


# %% tags=["exercise"]
def timing_key(layer: Layer, rows: int, threads: int) -> Hashable:
    """All that its time depends on, and nothing else."""
    # BEGIN SOLUTION
    places = {}
    parts = [("rows", rows), ("threads", threads)]
    for node in layer.reads:
        places[node] = len(places)
        parts.append(("read", node.type, stored_format(node)))
    for node in layer.nodes:
        inputs = tuple(places.get(each, each.type) for each in node.inputs)
        places[node] = len(places)
        what = (node.op, inputs, node.type, stored_format(node), node.attributes)
        parts.append(what)
    return tuple(parts)
    # END SOLUTION


# %% tags=["check"]
check.timing_key(timing_key)

# %% [markdown] tags=["solution"]
# A key with too little in it gives a layer the tactic of another one, which may be slow, or may not even fit. One with too much (an `id`, a name, the weight) is never found again, and a model of thirty equal blocks is timed thirty times. What belongs to the machine stands once, in the head of the file.
