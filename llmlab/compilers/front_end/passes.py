"""Passes: a program goes in, a program that computes the same comes out.

    remove_dead      what nobody reads is not computed
    fold_constants   what is known is computed now
    merge_equal      what is computed twice is computed once (CSE)
    simplify         rules of algebra, as data (see `rules`)
    choose_layout    transposes wander to a product, which reads them as they are

Each walks through the program once, inputs before those who read them, and writes a new
one; so its time grows with the number of nodes. An effect (`draw`, `report`) is never
removed, never merged, and keeps its place among the effects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmlab.compilers.front_end.fusion import along_rows, fuse, traffic
from llmlab.compilers.front_end.ir import OPS, Graph, Node, constant, made
from llmlab.compilers.front_end.rules import RULES, Rule, apply_rules, by_operation


def rebuilt(graph: Graph, rewrite: Callable[[Node, Node, list[Node]], Node]) -> Graph:
    """The program with every node rewritten, in its order.

    Args:
        rewrite: (old node, the same with its new inputs, the program so far) → what
            stands in its place. What is new it appends to the program itself.
    """
    new: dict[Node, Node] = {}
    program: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(new[each] for each in node.inputs)
        if inputs == node.inputs:
            same = node
        else:
            same = Node(node.op, inputs, node.type, node.attributes, node.data)
        new[node] = rewrite(node, same, program)
    return Graph(
        list(graph.inputs),
        program,
        [new[node] for node in graph.outputs],
        {node: new[value] for node, value in graph.updates.items()},
    )


def remove_dead(graph: Graph) -> Graph:
    """Only what a result needs, and the inputs, which the caller gives anyway."""
    needed = set(graph.inputs)
    waiting = list(graph.results)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.inputs
    nodes = [node for node in graph.nodes if node in needed]
    return Graph(graph.inputs, nodes, graph.outputs, graph.updates)


def fold_constants(graph: Graph, largest: int = 1 << 22) -> Graph:
    """Operations on constants are run now.

    Args:
        largest: bytes that a folded constant may have, unless its inputs had more: a
            small program must not become a large file.
    """

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        known = node.inputs and all(each.data is not None for each in node.inputs)
        had = sum(each.type.bytes for each in node.inputs)
        if known and node.kind != "effect" and node.type.bytes <= max(largest, had):
            data = OPS[node.op].run([x.data for x in node.inputs], node.attributes)
            node = constant(data, node.type.dtype)
        program.append(node)
        return node

    return rebuilt(graph, rewrite)


def key_of(node: Node) -> tuple:
    """Two nodes with the same key have the same value, unless they are effects.

    a + b and b + a do; so do two constants with the same bits (0 and −0 differ, and
    1/x tells them apart).
    """
    if node.data is not None:
        data = node.data
        if data.numel() > 1:
            return ("constant", id(data))
        return ("constant", node.type, data.numpy().tobytes())
    inputs = [id(each) for each in node.inputs]
    if OPS[node.op].commutes:
        inputs.sort()
    return (node.op, node.type, node.attributes, *inputs)


def merge_equal(graph: Graph) -> Graph:
    """Common subexpression elimination: the first of equal nodes serves for all."""
    first: dict[tuple, Node] = {}

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        if node.kind in ("effect", "input"):
            program.append(node)
            return node
        key = key_of(node)
        if key not in first:
            first[key] = node
            program.append(node)
        return first[key]

    return rebuilt(graph, rewrite)


def simplify(graph: Graph, rules: Sequence[Rule] = RULES) -> Graph:
    """Every node by the first rule that fits, until none does."""
    sorted_rules = by_operation(rules)

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        return apply_rules(node, program, sorted_rules)

    return rebuilt(graph, rewrite)


# Layout -------------------------------------------------------------------------------


def swaps_last(node: Node) -> bool:
    """Whether it is a transpose of the last two dimensions."""
    if node.op != "transpose":
        return False
    (order,) = node.attributes
    rank = len(order)
    return rank > 1 and order == (*range(rank - 2), rank - 1, rank - 2)


def choose_layout(graph: Graph) -> Graph:
    """Fewer copies by transposing later, or not at all.

    An elementwise operation commutes with a transpose, so the transpose goes below it;
    a product takes its second input transposed. What meets its inverse is gone, by a
    rule of `simplify`. Above a sum along a row it stays where it is: the sum shares a
    kernel with the elementwise operations before it, and a transpose would part them.
    """
    users = graph.users()
    summed = summed_along_rows(graph, users)
    results = set(graph.results)
    movable: set[Node] = set()  # transposes with one reader

    def rewrite(old: Node, node: Node, program: list[Node]) -> Node:
        if node.op == "matmul" and swaps_last(node.inputs[1]):
            a, b = node.inputs
            (transposed,) = node.attributes
            node = made("matmul", [a, b.inputs[0]], (not transposed,))
        elif node.kind == "elementwise" and old not in summed:
            node = below(node, program, movable)
        program.append(node)
        if node.op == "transpose" and len(set(users[old])) == 1 and old not in results:
            movable.add(node)
        return node

    return rebuilt(graph, rewrite)


def summed_along_rows(graph: Graph, users: dict[Node, list[Node]]) -> set[Node]:
    """What a sum or a maximum along a row reads, through elementwise operations."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        for user in users[node]:
            first = user.kind == "reduction" and along_rows(user)
            if first or (user.kind == "elementwise" and user in found):
                found.add(node)
    return found


def below(node: Node, program: list[Node], movable: set[Node]) -> Node:
    """f(xᵀ, yᵀ, 2) as f(x, y, 2)ᵀ, where nobody else reads xᵀ or yᵀ."""
    turned = [each for each in node.inputs if each.op == "transpose"]
    others = [each for each in node.inputs if each.op != "transpose"]
    orders = {each.attributes for each in turned}
    if len(orders) != 1 or not movable.issuperset(turned):
        return node
    if any(each.type.shape not in ((), (1,)) for each in others):
        return node
    if any(each.type.shape != node.type.shape for each in turned):
        return node
    inputs = [x.inputs[0] if x.op == "transpose" else x for x in node.inputs]
    program.append(made(node.op, inputs, node.attributes))
    return made("transpose", [program[-1]], orders.pop())


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    remove_dead,
    choose_layout,
    fold_constants,
    merge_equal,
    simplify,
    choose_layout,
    simplify,
    merge_equal,
    remove_dead,
)


def moved(graph: Graph) -> int:
    """Bytes that its kernels move, without what the next pass removes."""
    return traffic(fuse(remove_dead(graph)))


def optimise(
    graph: Graph,
    passes: Sequence[Callable[[Graph], Graph]] = PASSES,
    watch: Callable[[str, Graph], None] | None = None,
    by_size: bool = True,
) -> Graph:
    """All passes, one after the other.

    Args:
        watch: called with the name of each pass and what it left.
        by_size: whether passes are left out that make kernels move more bytes: equal
            values that are merged have to be written, and may have been cheap to
            compute twice. Without, programs of other sizes become the same program.
    """
    stages: list[tuple[str, Graph]] = []

    def in_turn(careful: bool) -> Graph:
        stages.clear()
        last = graph
        for each in passes:
            new = each(last)
            if not careful or moved(new) <= moved(last):
                last = new
            if watch is not None:
                stages.append((each.__name__, last))
        return last

    last = in_turn(careful=False)
    if by_size and moved(last) > moved(graph):
        last = in_turn(careful=True)
    for name, stage in stages:
        watch(name, stage)
    return last
