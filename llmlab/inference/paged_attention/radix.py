"""A radix tree over token ids: the longest stored prefix of a text, token by token.

SGLang's RadixAttention, Zheng et al. 2023, https://arxiv.org/abs/2312.07104, section 3.
An edge carries a run of tokens, and for each token the place of its keys and values.
Texts that begin alike share a path; where they part, an edge is split. Hashed blocks
find full blocks only; a tree finds every token.

    tokens    the run on the edge into a node
    places    where the keys and values of each of them lie
    locks     running requests that need this node, or one below it
    used      when it was last asked for

When memory is short, leaves that nobody has locked go first, the one that was not used
for longest before all others; a parent becomes a leaf when its last child has gone.

Simplified: one place per token (pages of 1), no scheduling by the length of the match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Node:
    """The end of an edge."""

    def __init__(
        self, tokens: tuple[int, ...], places: list[int], parent: Node | None
    ) -> None:
        self.tokens = tokens
        self.places = places
        self.parent = parent
        self.children: dict[int, Node] = {}  # by the first token of their run
        self.locks = 0
        self.used = 0


class RadixTree:
    """Places by text."""

    def __init__(self) -> None:
        self.root = Node((), [], None)
        self._clock = 0

    def __len__(self) -> int:
        """Tokens stored."""
        return sum(len(node.tokens) for node in self.nodes())

    def nodes(self) -> Iterator[Node]:
        """All but the root, parents before children."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def match(self, tokens: Sequence[int]) -> tuple[list[int], Node]:
        """The longest prefix that is stored.

        Where it ends within an edge, the edge is split there, so that the prefix ends
        at a node, which can be locked.

        Returns:
            The places of its tokens, and the node where it ends.
        """
        self._clock += 1
        node, at = self.root, 0
        places: list[int] = []
        while at < len(tokens) and tokens[at] in node.children:
            child = node.children[tokens[at]]
            same = common(child.tokens, tokens[at:])
            if same < len(child.tokens):
                child = self._split(child, same)
            child.used = self._clock
            places += child.places
            node, at = child, at + same
        return places, node

    def insert(self, tokens: Sequence[int], places: Sequence[int]) -> int:
        """Store a text.

        Returns:
            How many of its tokens were stored already. Those keep their old places, and
            the new ones for them can be given back.
        Raises:
            ValueError: not one place per token.
        """
        if len(tokens) != len(places):
            raise ValueError(
                f"{len(tokens)} tokens and {len(places)} places: one for each"
            )
        known, node = self.match(tokens)
        at = len(known)
        if at < len(tokens):
            leaf = Node(tuple(tokens[at:]), list(places[at:]), node)
            leaf.used = self._clock
            node.children[tokens[at]] = leaf
        return at

    def lock(self, node: Node) -> None:
        """A request reads all from the root to here: nothing of it may go."""
        for each in path(node):
            each.locks += 1

    def unlock(self, node: Node) -> None:
        """The request has ended.

        Raises:
            ValueError: it had not been locked.
        """
        for each in path(node):
            if each.locks == 0:
                raise ValueError("this node is not locked")
            each.locks -= 1

    def evict(self, count: int) -> list[int]:
        """Give back places of leaves that nobody has locked, least recently used first,
        until there are `count`, or no such leaf is left.

        Whole leaves go, so there may be more.
        """
        back: list[int] = []
        while len(back) < count:
            leaves = [n for n in self.nodes() if not n.children and n.locks == 0]
            if not leaves:
                break
            oldest = min(leaves, key=lambda node: node.used)
            back += oldest.places
            del oldest.parent.children[oldest.tokens[0]]
        return back

    def check(self) -> None:
        """What holds after every call.

        Raises:
            RuntimeError: it does not.
        """
        for node in self.nodes():
            if not node.tokens or len(node.tokens) != len(node.places):
                raise RuntimeError("an edge has no tokens, or not one place for each")
            if node.parent.children[node.tokens[0]] is not node:
                raise RuntimeError("a node is not where its parent looks for it")
            if sum(child.locks for child in node.children.values()) > node.locks:
                raise RuntimeError("a node is locked more often than its parent")
            if any(child.used > node.used for child in node.children.values()):
                raise RuntimeError("a node was used after its parent")

    def _split(self, node: Node, at: int) -> Node:
        """Cut the edge into `node` after `at` tokens; returns the new upper node.

        `node` stays the lower one, so who holds it still holds the same text.
        """
        upper = Node(node.tokens[:at], node.places[:at], node.parent)
        upper.locks = node.locks
        upper.used = node.used
        upper.children[node.tokens[at]] = node
        node.parent.children[node.tokens[0]] = upper
        node.tokens = node.tokens[at:]
        node.places = node.places[at:]
        node.parent = upper
        return upper


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


def path(node: Node) -> Iterator[Node]:
    """From a node up to the root, the root left out."""
    while node.parent is not None:
        yield node
        node = node.parent
