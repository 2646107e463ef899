"""What all stages of ZeRO share: units of parameters, and AdamW on a rank's pieces.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5. Adam works on each
element alone, so a piece can be stepped without the others. Only the clipping looks at
all of them, and it needs one number: ‖g‖² = Σ over ranks of ‖own piece‖².

    s        elements of a piece, padding included
    w, m, v  fp32 master weights, momentum, variance (fp64 for an fp64 model)
    g        gradient
    c        largest norm
    t        step, from 1
    η        learning rate
    λ        weight decay
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from llmlab.parallelism.runtime import Communicator
from llmlab.parallelism.zero_and_fsdp.layout import LAYOUTS
from llmlab.parallelism.zero_and_fsdp.offload import Host


@dataclass(frozen=True)
class Adam:
    """AdamW (Loshchilov & Hutter 2019) and the clipping before it.

    `clip=None`: no clipping.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be a positive norm, or None")


def adamw_(
    w: Float[Tensor, "s"], m: Tensor, v: Tensor, g: Tensor, t: int, adam: Adam
) -> None:
    """One step, in place: m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  w ← (1−ηλ)w − η m̂ /
    (√v̂ + ε).
    """
    (b1, b2), lr = adam.betas, adam.lr
    m.lerp_(g, 1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    w.mul_(1 - lr * adam.weight_decay)
    w.addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(adam.eps), value=-lr / (1 - b1**t))


class Cut:
    """Parameters of one dtype that are cut and gathered together."""

    def __init__(self, parameters: Sequence[nn.Parameter], p: int, layout: str) -> None:
        self.parameters = list(parameters)
        self.p = p
        self.shapes = [tuple(w.shape) for w in parameters]
        self._cut, self._join = LAYOUTS[layout]

    def pieces(self) -> Shaped[Tensor, "p s"]:
        """The whole weights, cut in p."""
        return self._cut([w.detach() for w in self.parameters], self.p)

    def write(self, pieces: Shaped[Tensor, "p s"]) -> None:
        """Put whole weights into the parameters.

        Through `.data`: autograd need not know.
        """
        for w, new in zip(
            self.parameters, self._join(pieces, self.shapes), strict=True
        ):
            w.data.copy_(new)


class Frozen(Cut):
    """The frozen parameters of a unit: stage 3 keeps a piece of them, and no more."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], p: int, rank: int, layout: str
    ) -> None:
        super().__init__(parameters, p, layout)
        self.piece = self.pieces()[rank].clone().view(1, -1)

    def new_piece(self) -> Shaped[Tensor, "1 s"]:
        """What it always was."""
        return self.piece


class Unit(Cut):
    """Parameters that train, and are cut, reduced and gathered together, with this
    rank's piece of all that Adam needs for them.

    Raises:
        ValueError: a parameter is frozen, or they are of several dtypes.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        p: int,
        rank: int,
        layout: str,
        host: Host | None,
    ):
        frozen = sum(not w.requires_grad for w in parameters)
        dtypes = sorted({str(w.dtype) for w in parameters})
        if frozen or len(dtypes) != 1:
            raise ValueError(
                f"{name} has {frozen} parameters with requires_grad=False and trains"
                f" {' and '.join(dtypes)}: what is stepped together must be trained,"
                " and be of one dtype"
            )
        super().__init__(parameters, p, layout)
        self.name, self.host = name, host
        piece = self.pieces()[rank]
        w = piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True)  # (s,)
        self.w = host.down(w) if host else w
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.grad: Tensor | None = None  # (s,) of the sum over ranks, once reduced
        self.missing = len(self.parameters)

    def all_here(self) -> bool:
        """Called when one more parameter's gradient is ready: whether it was the unit's
        last.
        """
        self.missing = self.missing - 1 or len(self.parameters)
        return self.missing == len(self.parameters)

    def take_gradients(self) -> Float[Tensor, "p s"]:
        """This rank's gradients, cut in p; the parameters' own are freed."""
        without = sum(w.grad is None for w in self.parameters)
        if without:
            raise RuntimeError(
                f"{without} parameters of {self.name} have no gradient: each must take"
                " part in the loss"
            )
        pieces = self._cut([w.grad for w in self.parameters], self.p)
        for w in self.parameters:
            w.grad = None
        return pieces

    def add(self, piece: Float[Tensor, "s"]) -> None:
        """One more microbatch's gradient of this rank's piece.

        It goes to the host at once, where there is one.
        """
        piece = self.host.down(piece) if self.host else piece
        self.grad = piece if self.grad is None else self.grad + piece

    def new_piece(self) -> Float[Tensor, "1 s"]:
        """The updated weights of this rank's piece, in the model's dtype, on its
        device.
        """
        like = self.parameters[0]
        w = self.w.to(like.dtype)
        return (self.host.up(w, like.device) if self.host else w).view(1, -1)


def units_of(
    model: nn.Module, blocks: Iterable[nn.Module] | None = None
) -> list[tuple[str, nn.Module, list]]:
    """(name, module, parameters): a unit a block, and the last, the root's, for the
    rest.

    Every parameter is in one unit, once: tied ones too, and what several blocks share
        belongs to the root.
    """
    blocks = list(model.model.layers if blocks is None else blocks)
    uses = Counter(id(w) for block in blocks for w in block.parameters())
    own = [[w for w in block.parameters() if uses[id(w)] == 1] for block in blocks]
    rest = [w for w in model.parameters() if uses[id(w)] != 1]
    named = [
        (f"block {i}", block, ws)
        for i, (block, ws) in enumerate(zip(blocks, own, strict=True))
    ]
    return [unit for unit in [*named, ("root", model, rest)] if unit[2]]


def keep_unchanged(model: nn.Module) -> None:
    """From now on each forward that may be differentiated asks whether the model trains
    the same parameters as now.

    Raises (then):
        ValueError: a parameter came, went, was frozen or set free: it would have no
            optimizer state, or no gradient would come for it.
    """

    def flags() -> dict[str, tuple[int, bool]]:
        return {n: (id(w), w.requires_grad) for n, w in model.named_parameters()}

    before = flags()

    def check(*_) -> None:
        if not torch.is_grad_enabled():
            return
        now = flags()
        names = before.keys() | now.keys()
        changed = sorted(name for name in names if before.get(name) != now.get(name))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"the model was changed after it was split: {', '.join(changed[:3])}"
                f"{more} came, went, was frozen or set free. Put adapters on, and"
                " freeze, before the split"
            )

    model.register_forward_pre_hook(check)


def update(units: list[Unit], shards: Communicator | None, t: int, adam: Adam) -> float:
    """Clip by the norm of the whole gradient, then step every piece.

    Returns the norm before clipping.

    Args:
        shards: the ranks whose pieces together are the gradient; None: every rank has
            it whole.
    Raises:
        RuntimeError: a unit has no gradient yet, or only that of some of its
            parameters.
    """
    for unit in units:
        if unit.grad is None or unit.missing != len(unit.parameters):
            raise RuntimeError(
                f"{unit.name} is not reduced: its backward pass has not come, or not to"
                " every parameter"
            )
    # padding adds 0
    square = torch.stack(
        [unit.grad.to(unit.w.dtype).square().sum() for unit in units]
    ).sum()
    if shards:
        # summed over ranks first, the root comes after
        square = shards.all_reduce(square.to(shards.device))
    norm = square.sqrt().item()
    scale = 1.0 if adam.clip is None else min(1.0, adam.clip / (norm + 1e-6))
    for unit in units:
        adamw_(unit.w, unit.m, unit.v, unit.grad.to(unit.w.dtype) * scale, t, adam)
        unit.grad = None
    return norm


def state_tensors(units: list[Unit]) -> dict[str, list[Tensor]]:
    """Reduced gradients and w, m, v.

    Where they are offloaded, all of it under "host".
    """
    state, reduced = (
        [t for unit in units for t in (unit.w, unit.m, unit.v)],
        [unit.grad for unit in units],
    )
    if units and units[0].host:
        return {"reduced": [], "optimizer": [], "host": state + reduced}
    return {"reduced": reduced, "optimizer": state, "host": []}


def held(engine) -> dict[str, int]:
    """Bytes of the storages behind this rank's weights, gradients and optimizer state
    at this moment.
    """
    found = {
        kind: {t.untyped_storage() for t in ts if t is not None}
        for kind, ts in engine.tensors().items()
    }
    size = {
        kind: sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        for kind, storages in found.items()
    }
    size["gradients"] += size.pop("reduced")
    return size
