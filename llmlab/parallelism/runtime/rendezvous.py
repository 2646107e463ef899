"""Where ranks of a `World` meet: collectives under way, messages without a partner."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from llmlab.parallelism.runtime.calls import Call


class Group:
    """What the members of a group share: the meetings under way."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.meetings: dict[int, Meeting] = {}


@dataclass
class Meeting:
    """One collective of one group: it happens when the last member comes."""

    number: int
    group: Group
    calls: dict[int, Call] = field(default_factory=dict)
    # when each member could begin, on its clock
    came: dict[int, float] = field(default_factory=dict)
    outputs: list | None = None
    end: float = 0.0

    def ready(self) -> bool:
        """Whether the ranks that wait for it may go on."""
        return self.outputs is not None

    def describe(self) -> str:
        """What is waited for, and where, for the report of a deadlock."""
        call = next(iter(self.calls.values()))
        missing = [
            str(r) for i, r in enumerate(self.group.ranks) if i not in self.calls
        ]
        whom = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        return f"{call} of group {self.group.ranks} for {whom}, at {call.site}"


@dataclass
class Post:
    """A send or a receive that looks for its partner."""

    call: Call
    rank: int
    peer: int
    time: float
    value: Tensor | None = None
    done: bool = False
    end: float = 0.0

    def ready(self) -> bool:
        """Whether the ranks that wait for it may go on."""
        return self.done

    def describe(self) -> str:
        """What is waited for, and where, for the report of a deadlock."""
        word = {"send": "to", "recv": "from"}[self.call.op]
        return (
            f"{self.call.op} {word} rank {self.peer} (tag {self.call.tag}), at"
            f" {self.call.site}"
        )
