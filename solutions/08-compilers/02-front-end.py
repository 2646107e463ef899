# %% [markdown]
# # Solutions: Front end
#
# Four functions of a compiler's front end: throw away what nobody needs, recognise what is the same, decide what runs together, and give every value a place. A `Node` is one operation and its value:
#
# | attribute | holds |
# |---|---|
# | `op`, `attributes` | the name, and what it needs beside its inputs: the dimension of a sum, whether a product reads its second input transposed |
# | `inputs` | the nodes that it reads |
# | `type` | `type.shape`, `type.dtype`, `type.bytes` |
# | `data` | of a constant: a tensor. Else `None` |
# | `kind` | elementwise, reduction, matmul, layout, constant, input or effect |
#
# Stuck? `check.hint("remove_dead")` shows a hint, and the next one when it is called again.

# %%
from collections.abc import Hashable

from llmlab.checks.compilers.front_end import check
from llmlab.compilers.front_end import (
    OPS,
    Graph,
    Life,
    Node,
    along_rows,
    rows,
    small_inputs,
)

# %% [markdown]
# ## Exercise 1: remove_dead
# ●●○○○ difficulty · ●●●●○ importance · 12 minutes · 2 points
#
# A `Graph` has `inputs`, `nodes` (each after those that it reads), `outputs`, and `updates`: inputs that the program changes, each with its new value. `graph.results` lists all that must be computed: outputs, new
# values of inputs, and effects, such as printing. Return a new `Graph(inputs, nodes, outputs, updates)` with the nodes that a result needs, and with all inputs (they stand in `nodes`, too), which the caller gives anyway. The nodes stay in their order. The program that you were given stays as it is.


# %% tags=["exercise"]
def remove_dead(graph: Graph) -> Graph:
    """The program without what no result needs."""
    # BEGIN SOLUTION
    needed = set(graph.inputs)
    waiting = list(graph.results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.inputs
    nodes = [node for node in graph.nodes if node in needed]
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)
    # END SOLUTION


# %% tags=["check"]
check.remove_dead(remove_dead)

# %% [markdown] tags=["solution"]
# From the results back, each node is looked at once, so the time grows with the number of nodes. To remove, again and again, what has no reader would need a round for each link of a dead
# chain. An effect is a root, like an output: to print, to draw a random number and to write into an input are seen outside, though nobody inside reads them.

# %% [markdown]
# ## Exercise 2: key_of
# ●●●○○ difficulty · ●●●●● importance · 15 minutes · 3 points
#
# The pass `merge_equal` keeps a dict from keys to nodes, and a node whose key is there already is replaced by the one before. So give the same key to nodes that have the same value, and to no others:
#
# 1. Of an operation: its name, its attributes and its inputs. An input is the same only if it is the very same node (`id(each)`): equal ones have been merged before. Where `OPS[node.op].commutes`, the order of the two inputs makes no difference.
# 2. Of a constant of one number: its type, and the *bytes* of its data (`node.data.numpy().tobytes()`): as numbers, 0.0 and −0.0 would be equal, and NaN would not equal itself.
# 3. Of a constant of several numbers: it is the same if it is the same tensor, `id(node.data)`.
#
# The key must be able to stand in a dict: a tuple can, a list cannot.


# %% tags=["exercise"]
def key_of(node: Node) -> Hashable:
    """A key for what the node computes."""
    # BEGIN SOLUTION
    if node.data is not None:
        if node.data.numel() > 1:
            return ("constant", id(node.data))
        return ("constant", node.type, node.data.numpy().tobytes())
    inputs = [id(each) for each in node.inputs]
    if OPS[node.op].commutes:
        inputs.sort()
    return (node.op, node.attributes, *inputs)
    # END SOLUTION


# %% tags=["check"]
check.key_of(key_of)

# %% [markdown] tags=["solution"]
# The identity of the inputs is enough, since the pass goes through the program in its order: when a node comes, its inputs stand for themselves and for all that equal them. So whole trees are compared
# in one step. Effects have no key at all: two draws of a random number look the same and are not.

# %% [markdown]
# ## Exercise 3: joins
# ●●●●○ difficulty · ●●●●● importance · 25 minutes · 4 points
#
# Fusion goes from the last operation to the first. A kernel is named by its root, the last of its operations, whose value it writes. All `users` of a node have their kernels; `kernels` is the set of the roots of these (one or more), and `with_product` has the roots of kernels that hold a product. Shall the node be
# computed inside these kernels? The first two sentences hold for every node, and then one of the others. A kernel goes through the rows of its root:
#
# 1. Every reader must go along rows: `along_rows(user)`. (A product reads a value many times.)
# 2. The node must have the rows of every root: `rows(root) == rows(node)`.
# 3. A product (`node.kind == "matmul"`) joins if there is one kernel, and that one has no product yet.
# 4. Any other node joins a single kernel if it goes along rows itself.
# 5. With several kernels, it would be computed in each. That is worth it for an elementwise operation whose inputs are no larger than its result: `small_inputs(node)`.


# %% tags=["exercise"]
def joins(
    node: Node, users: list[Node], kernels: set[Node], with_product: set[Node]
) -> bool:
    """Whether all its readers' kernels compute the node as well."""
    # BEGIN SOLUTION
    if not all(along_rows(user) for user in users):
        return False
    if not all(rows(root) == rows(node) for root in kernels):
        return False
    if node.kind == "matmul":
        return len(kernels) == 1 and not kernels & with_product
    if len(kernels) == 1:
        return along_rows(node)
    return node.kind == "elementwise" and small_inputs(node)
    # END SOLUTION


# %% tags=["check"]
check.joins(joins)

# %% [markdown] tags=["solution"]
# Since *all* readers are inside, nothing leaves a kernel but its root's value, and no kernel can wait for another that waits for it. Writing a value of $n$ bytes for $k$ kernels costs $n + kn$;
# repeating it costs $k$ times what it reads, $ki$. With $i \le n$ that is always less, even if the input had to be written for it.

# %% [markdown]
# ## Exercise 4: plan
# ●●●●○ difficulty · ●●●●○ importance · 25 minutes · 4 points
#
# Values that are written to memory lie in one arena. Each has a `Life`: `size` in bytes, `born`, the kernel that writes it, and `dies`, the last that reads it. Return an offset for each, in whole bytes from 0, so that no two that are needed at one time
# (`life.meets(other)`) share a byte. They meet also where one is read for the last time in the kernel that writes the other. The arena ends where the last value ends; it may have at most 1.4 times the bytes that are alive at the worst moment.


# %% tags=["exercise"]
def plan(lives: dict[Node, Life]) -> dict[Node, int]:
    """Value → its offset."""
    # BEGIN SOLUTION
    offsets = {}
    for node in sorted(lives, key=lambda node: -lives[node].size):
        life = lives[node]
        in_the_way = [other for other in offsets if life.meets(lives[other])]
        offset = 0
        for other in sorted(in_the_way, key=lambda other: offsets[other]):
            if offset + life.size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + lives[other].size)
        offsets[node] = offset
    return offsets
    # END SOLUTION


# %% tags=["check"]
check.plan(plan)

# %% [markdown] tags=["solution"]
# To find the smallest arena is as hard as packing boxes; a greedy rule comes near. The largest first, since it is the hardest to place: "greedy by size"
# ([Pisarchyk and Lee 2020](https://arxiv.org/abs/2001.03288 "pisarchyk2020efficient")). It looks at all values for each, so the package's `plan` goes through the kernels in their order instead, with a list of gaps.
