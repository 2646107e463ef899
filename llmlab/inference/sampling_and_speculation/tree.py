"""Several proposals for the same places, read by the target in one pass.

SpecInfer (Miao et al. 2023, https://arxiv.org/abs/2305.09781) and Medusa (Cai et al.
2024, https://arxiv.org/abs/2401.10774). The drafted tokens form a tree. Laid out in a
row, parents first, they are one forward pass whose mask lets each token see the text,
its ancestors and itself. Its position is that of the text's end plus its depth.

    parents[i]  the node that node i follows; −1 for the root
    n           nodes        V  vocabulary
    past        tokens in the cache

The root is the text's last token, which no pass has read yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llmlab.models.cache import KVCache
from llmlab.models.llama import Llama

Tree = tuple[list[int], list[int]]  # the tokens of the nodes, and their parents


def tree_mask(parents: Sequence[int], past: int) -> Bool[Tensor, "n past_and_n"]:
    """True where node i may look: at the whole cache, its ancestors and itself."""
    n = len(parents)
    mask = torch.zeros(n, past + n, dtype=torch.bool)
    mask[:, :past] = True
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] = mask[parent]  # all that the parent sees, the parent included
        mask[i, past + i] = True
    return mask


def depths(parents: Sequence[int]) -> list[int]:
    """How far each node is below the root: its position counts on by this.

    Raises:
        ValueError: a parent that does not stand before its child.
    """
    found: list[int] = []
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ValueError(
                f"parents[{i}]={parent} must be −1 or a node before node {i}"
            )
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def read_tree(
    model: Llama, cache: KVCache, tokens: Sequence[int], parents: Sequence[int]
) -> Float[Tensor, "n vocab"]:
    """Logits after each node. The cache then holds all nodes, in the tree's order."""
    past = cache.length
    positions = past + torch.tensor(depths(parents))
    mask = tree_mask(parents, past)[None]  # (1, n, past + n)
    return model(
        torch.tensor([list(tokens)]),
        attention_mask=mask,
        position_ids=positions[None],
        cache=cache,
    )[0]


def follow(
    tokens: Sequence[int],
    parents: Sequence[int],
    choose: Callable[[int, list[int]], tuple[int | None, int]],
) -> tuple[list[int], list[int]]:
    """From the root down, as long as a drafted token stays.

    Args:
        choose: (node, its children) → which child stays (None: none), and the token.
    Returns:
        The nodes of the path, the root first; and the tokens that are kept: those of
        the path below the root, and one more.
    """
    path = [0]
    kept = []
    while True:
        children = [i for i, parent in enumerate(parents) if parent == path[-1]]
        which, token = choose(path[-1], children)
        kept.append(token)
        if which is None:
            return path, kept
        path.append(children[which])


def keep_path(cache: KVCache, past: int, path: Sequence[int]) -> None:
    """Of the tree's nodes, which begin at `past`, only those of the path stay.

    Keys carry their positions already, so they are moved and not made again.
    """
    kept = past + torch.tensor(list(path))
    for buffer in (*cache.keys, *cache.values):
        buffer[:, :, past : past + len(path)] = buffer[:, :, kept]
    cache.truncate(past + len(path))


class TreeDraft:
    """A model proposes a tree: at each level the likeliest tokens after each node.

    A level costs one pass, however many nodes it has.
    """

    def __init__(self, model: Llama, widths: Sequence[int]) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(
                f"widths={widths} must hold the children per node of each level, at"
                " least 1"
            )
        self.model = model
        self.widths = tuple(widths)
        self.cache = KVCache(len(model.model.layers))
        self.passes = 0

    @torch.inference_mode()
    def grow(self, text: Sequence[int], levels: int) -> Tree:
        """The tree below the last token of the text, at most `levels` deep."""
        tokens = [text[-1]]
        parents = [-1]
        if not self.widths[:levels]:
            return tokens, parents
        # The certain tokens that the cache lacks, the root last, are a tree, too.
        chain = list(text[self.cache.length :])
        logits = self._read(chain, list(range(-1, len(chain) - 1)))[-1:]
        self.cache.truncate(len(text) - 1)
        level = [0]
        for depth, width in enumerate(self.widths[:levels]):
            if depth > 0:
                # All nodes again: simple, and one pass whatever their number.
                logits = self._read(tokens, parents)
                self.cache.truncate(len(text) - 1)
            below = []
            for node in level:
                for token in logits[node].topk(width).indices.tolist():
                    below.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
            level = below
        return tokens, parents

    def _read(self, tokens: list[int], parents: list[int]) -> Tensor:
        self.passes += 1
        return read_tree(self.model, self.cache, tokens, parents)
