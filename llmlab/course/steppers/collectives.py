"""The trace of an all-reduce: ranks in a ring, chunks as cells, messages as arrows.

It runs the algorithm on `World(p)`, with a tensor that shows what is in each message
(see `watching`), so it plays a learner's own function as well as a list of moves.

What a rank does with a chunk that arrives is read from what it sends or returns later.

    own, summands   for each rank, how often its chunk is in a sum
    before, after   the summands of a chunk on the rank that receives
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmlab.course.steppers import watching
from llmlab.course.steppers.trace import Mark, Plane, Step, Trace, number
from llmlab.course.steppers.watching import SUMMANDS, Cell, Entry, Message, Recording
from llmlab.course.words import listed
from llmlab.parallelism.collectives import schedule as schedules

GAP = 20  # pixels between the two arrows of a pair that swap
TITLE = 20  # pixels for the name of a rank


def all_reduce_trace(algorithm: Callable | list[schedules.Move], p: int = 4) -> Trace:
    """What p ranks send in an all-reduce, and what becomes of each chunk.

    Playing stops at the first wrong chunk; `fault` says which it is.

    Args:
        algorithm: a function (comm, x) that returns the sum of all ranks' x, with
            comm.send, comm.recv and comm.sendrecv; or a list of moves. x has p chunks
            of p numbers.
        p: ranks, 2 … 6.
    Raises:
        ValueError: p is not 2 … 6; nothing is sent; or messages are not made of whole
            chunks.
    """
    lines: dict[tuple[int, int], list[str]] = {}
    if callable(algorithm):
        fn = algorithm
    else:
        for move in sorted(algorithm):
            lines.setdefault((move.src, move.dst), []).append(repr(move))

        def fn(comm, x):
            return schedules.all_reduce(comm, x, algorithm)

    recording = watching.record(fn, p, lines)
    if not recording.messages and not recording.error:
        raise ValueError(
            "nothing was sent with comm.send or comm.sendrecv: a collective of comm"
            " itself shows no messages"
        )
    return _Story(recording).trace()


@dataclass(frozen=True)
class Arrival:
    """What becomes of one chunk that arrives in a message.

    how: "adds", "keeps", "ignores", "changes" or, for a cell that mixes chunks, "mixes"
    others: the chunks to which it was added by mistake
    """

    step: int
    rank: int
    chunk: int
    sent: SUMMANDS
    before: SUMMANDS
    after: SUMMANDS
    how: str
    line: str
    others: tuple[int, ...] = ()


def chunk_of(cell: Cell) -> int | None:
    """The only chunk that a cell holds; None if it holds none, or several."""
    found = [j for j, summands in enumerate(cell) if any(summands)]
    return found[0] if len(found) == 1 else None


def added(a: SUMMANDS, b: SUMMANDS) -> SUMMANDS:
    """The summands of a sum."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def shown(summands: SUMMANDS) -> str:
    """'0+1+1' for rank 0 once and rank 1 twice."""
    ranks = [str(r) for r, times in enumerate(summands) for _ in range(times)]
    return "+".join(ranks) or "nothing"


def arrivals(recording: Recording) -> list[Arrival]:
    """Every chunk that arrived, by step and rank."""
    found = []
    for rank, entries in enumerate(recording.logs):
        state = [watching.own(rank, recording.p)] * recording.p
        for k, entry in enumerate(entries):
            if entry.what != "receives":
                continue
            for cell in entry.cells:
                later = entries[k + 1 :]
                arrival = _arrival(rank, entry.message, cell, state, later)
                found.append(arrival)
                if arrival.how != "mixes":
                    state[arrival.chunk] = arrival.after
    return sorted(found, key=lambda arrival: (arrival.step, arrival.rank))


def _arrival(
    rank: int,
    message: Message,
    cell: Cell,
    state: list[SUMMANDS],
    later: tuple[Entry, ...],
) -> Arrival:
    """What a rank does with one cell of a message."""
    chunk = chunk_of(cell)
    if chunk is None:
        first = next((j for j, summands in enumerate(cell) if any(summands)), 0)
        same = state[first]
        return Arrival(
            message.step, rank, first, cell[first], same, same, "mixes", message.line
        )
    sent = cell[chunk]
    before = state[chunk]
    after = _seen_later(later, chunk)
    if after is None:
        # Nothing shows it. A chunk that has all that is here replaces it.
        has_all = all(s >= b for s, b in zip(sent, before, strict=True))
        after = sent if has_all else added(before, sent)
    if after == added(before, sent):
        how = "adds"
    elif after == sent:
        how = "keeps"
    elif after == before:
        how = "ignores"
    else:
        how = "changes"
    others = tuple(_other_place(later, chunk))
    return Arrival(
        message.step, rank, chunk, sent, before, after, how, message.line, others
    )


def _seen_later(later: tuple[Entry, ...], chunk: int) -> SUMMANDS | None:
    """A chunk as its rank next sends or returns it; None if it arrives again before."""
    for entry in later:
        if entry.what == "returns":
            cell = entry.cells[chunk]
            return cell[chunk] if chunk_of(cell) == chunk else None
        for cell in entry.cells:
            if chunk_of(cell) == chunk:
                return None if entry.what == "receives" else cell[chunk]
    return None


def _other_place(later: tuple[Entry, ...], chunk: int) -> list[int]:
    """The chunks with which a chunk is later sent or returned in one cell, if any."""
    for entry in later:
        if entry.what == "receives":
            continue
        for cell in entry.cells:
            inside = [j for j, summands in enumerate(cell) if any(summands)]
            if chunk in inside and len(inside) > 1:
                return [j for j in inside if j != chunk]
    return []


def fault_of_message(message: Message) -> str:
    """What is wrong with what is sent, '' for nothing."""
    for cell in message.cells:
        inside = [j for j, summands in enumerate(cell) if any(summands)]
        if len(inside) > 1:
            return f"rank {message.src} sends a sum of chunks {listed(inside)}"
        if not inside:
            return f"rank {message.src} sends an empty chunk"
        if max(cell[inside[0]]) > 1:
            return (
                f"rank {message.src} sends chunk {inside[0]} as"
                f" {shown(cell[inside[0]])}"
            )
    return ""


def fault_of_arrival(arrival: Arrival) -> str:
    """What is wrong with what becomes of a chunk, '' for nothing."""
    who = f"rank {arrival.rank}"
    chunk = f"chunk {arrival.chunk}"
    if arrival.how == "mixes":
        return f"{who} receives something that is not one chunk"
    twice = [r for r, times in enumerate(arrival.after) if times > 1]
    if twice and max(arrival.before) <= 1:
        return (
            f"{who} {arrival.how} {chunk} ({shown(arrival.sent)}) and has"
            f" {shown(arrival.after)}: rank {twice[0]} is in it more than once"
        )
    lost = [
        r
        for r, (b, a) in enumerate(zip(arrival.before, arrival.after, strict=True))
        if b > a
    ]
    if lost:
        return (
            f"{who} {arrival.how} {chunk} ({shown(arrival.sent)}) in place of"
            f" {shown(arrival.before)}: the summand of rank {lost[0]} is lost"
        )
    is_news = any(s > b for s, b in zip(arrival.sent, arrival.before, strict=True))
    if arrival.how == "ignores" and is_news and arrival.others:
        others = listed(list(arrival.others))
        return f"{who} adds {chunk} ({shown(arrival.sent)}) to chunk {others}"
    if arrival.how == "ignores" and is_news:
        return (
            f"{who} makes no use of {chunk} ({shown(arrival.sent)}): it still has"
            f" {shown(arrival.after)}"
        )
    return ""


def fault_of_result(recording: Recording) -> str:
    """The first chunk that is returned and is not the sum of all, '' if all are."""
    complete = (1,) * recording.p
    for rank, entries in enumerate(recording.logs):
        for place, cell in enumerate(entries[-1].cells):
            inside = [j for j, summands in enumerate(cell) if any(summands)]
            if inside == [place] and cell[place] == complete:
                continue
            if not inside:
                said = "zeros"
            elif inside != [place]:
                said = f"a sum of chunks {listed(inside)}"
                if len(inside) == 1:
                    said = f"chunk {inside[0]}"
            else:
                said = shown(cell[place])
                lacks = [r for r, times in enumerate(cell[place]) if not times]
                if lacks:
                    said += f", without {listed(lacks)}"
            return f"rank {rank} returns chunk {place} as {said}"
    return ""


class _Story:
    """Makes the steps: for each round what is sent, then what becomes of it."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.p = recording.p
        self.arrivals = arrivals(recording)
        self.rounds = 1 + max((m.step for m in recording.messages), default=-1)
        self.sent = [0] * self.p  # chunks that each rank has sent
        self.chips: list[str] = []  # the arrows that are to be seen
        self.final_fault = ""
        if not recording.error:
            self.final_fault = fault_of_result(recording)
        self.is_right = not recording.error and not self.final_fault
        self.stop: int | None = None
        self.fault = ""
        self.place = _Places(self.p)
        self.steps = [self.opening()]

    def trace(self) -> Trace:
        for k in range(self.rounds):
            self.steps.append(self.sending(k))
            self.steps.append(self.arriving(k))
        self.steps.append(self.ending())
        return Trace(self.place.scene, tuple(self.steps), self.stop, self.fault)

    def opening(self) -> Step:
        """All ranks with what they bring."""
        marks = []
        for rank in range(self.p):
            marks.append(self.place.box(rank))
            mine = watching.own(rank, self.p)
            for chunk in range(self.p):
                value = f"rank {rank}, chunk {chunk}: its own"
                marks.append(self.cell(rank, chunk, mine, value))
        alt = (
            f"{self.p} ranks, each with its own {self.p} chunks. The squares of a chunk"
            " say whose summands are in it; it is done when all are."
        )
        return Step(tuple(marks), alt, facts=self.facts(0))

    def sending(self, k: int) -> Step:
        """The messages of a round, as arrows."""
        messages = [m for m in self.recording.messages if m.step == k]
        pairs = {(m.src, m.dst) for m in messages}
        gone = tuple(self.chips)
        self.chips = []
        marks = []
        said = []
        faults = []
        for message in messages:
            fault = "" if self.is_right else fault_of_message(message)
            faults.append(fault)
            self.sent[message.src] += len(message.cells)
            what = _contents(message.cells)
            value = f"rank {message.src} sends {what} to rank {message.dst}"
            said.append(f"{message.src} sends {what} to {message.dst}")
            mark = Mark(
                f"m{k}-{message.src}-{message.dst}",
                "arrow",
                self.place.arrow(message, (message.dst, message.src) in pairs),
                _label(message.cells),
                kind="wrong" if fault else "plain",
                parts=_parts(message.cells),
                value=value,
                line=message.line,
            )
            marks.append(mark)
            self.chips.append(mark.id)
        alt = f"Round {k + 1} of {self.rounds}: rank {'; '.join(said)}."
        return self.step(marks, alt, faults, k + 1, gone)

    def arriving(self, k: int) -> Step:
        """What the ranks do with what has arrived."""
        marks = []
        said = []
        faults = []
        for arrival in (a for a in self.arrivals if a.step == k):
            fault = "" if self.is_right else fault_of_arrival(arrival)
            faults.append(fault)
            value = (
                f"rank {arrival.rank} {arrival.how} chunk {arrival.chunk}"
                f" ({shown(arrival.sent)}): {shown(arrival.after)}"
            )
            said.append(value)
            kind = "wrong" if fault else "plain"
            mark = self.cell(
                arrival.rank, arrival.chunk, arrival.after, value, kind, arrival.line
            )
            marks.append(mark)
        alt = f"Round {k + 1} of {self.rounds} arrives: {'; '.join(said)}."
        return self.step(marks, alt, faults, k + 1)

    def ending(self) -> Step:
        """What is returned."""
        gone = tuple(self.chips)
        if self.recording.error:
            first = self.recording.error.splitlines()
            alt = f"It ends here: {'; '.join(line.strip() for line in first)}."
            return self.step([], alt, [alt], self.rounds, gone)
        if not self.final_fault:
            alt = f"Done: every rank has the sum of all {self.p} in every chunk."
            return self.step([], alt, [], self.rounds, gone)
        marks = []
        for rank, entries in enumerate(self.recording.logs):
            for place, cell in enumerate(entries[-1].cells):
                value = f"rank {rank} returns as chunk {place} {_contents((cell,))}"
                summands = cell[place]
                wrong = chunk_of(cell) != place or set(summands) != {1}
                kind = "wrong" if wrong else "plain"
                marks.append(self.cell(rank, place, summands, value, kind))
        alt = f"The result is wrong: {self.final_fault}."
        return self.step(marks, alt, [self.final_fault], self.rounds, gone)

    def step(self, marks, alt, faults, rounds, gone=()) -> Step:
        """A step; the first that has a fault is where playing stops."""
        found = [fault for fault in faults if fault]
        if found and self.stop is None:
            self.stop = len(self.steps)
            self.fault = found[0]
            if not alt.startswith(("The result", "It ends")):
                alt = f"Wrong, in round {rounds}: {found[0]}."
                if len(found) > 1:
                    alt += f" It is the first of {len(found)} in this step."
        return Step(tuple(marks), alt, gone=gone, facts=self.facts(rounds))

    def facts(self, rounds: int) -> dict[str, str]:
        most = max(self.sent) / self.p
        return {"rounds": f"{rounds} of {self.rounds}", "sent": f"{number(most)} n"}

    def cell(
        self,
        rank: int,
        chunk: int,
        summands: SUMMANDS,
        value: str,
        kind: str = "plain",
        line: str = "",
    ) -> Mark:
        """A chunk of a rank."""
        if kind == "plain" and set(summands) == {1}:
            kind = "done"
        place = self.place.cell(rank, chunk)
        text = str(chunk)
        return Mark(f"{rank}/{chunk}", "cell", place, text, kind, summands, value, line)


def _contents(cells: tuple[Cell, ...]) -> str:
    """'chunk 2 (0+1)'."""
    said = []
    for cell in cells:
        inside = [
            f"chunk {j} ({shown(summands)})"
            for j, summands in enumerate(cell)
            if any(summands)
        ]
        said.append(" plus ".join(inside) or "zeros")
    return ", ".join(said)


def _label(cells: tuple[Cell, ...]) -> str:
    """The numbers of the chunks that a message carries."""
    found = [chunk_of(cell) for cell in cells]
    numbers = ["?" if chunk is None else str(chunk) for chunk in found]
    return " ".join(numbers)


def _parts(cells: tuple[Cell, ...]) -> SUMMANDS:
    """The summands of a message of one chunk; for several, those of the first."""
    cell = cells[0]
    chunk = chunk_of(cell)
    if chunk is None:
        return added(cell[0], cell[1]) if len(cell) > 1 else cell[0]
    return cell[chunk]


class _Places:
    """Where things stand: ranks on an ellipse, rank 0 on top, then clockwise."""

    def __init__(self, p: int) -> None:
        self.p = p
        self.cell_width = 30 if p <= 4 else 24
        self.cell_height = 34
        self.box_width = p * self.cell_width + 10
        self.box_height = TITLE + self.cell_height + 8
        self.width = 430 if p == 5 else 352
        self.height = self.box_height + {2: 150, 5: 320, 6: 450}.get(p, 250)
        cell = (self.cell_width, self.cell_height)
        self.scene = Plane(self.width, self.height, cell)

    def centre(self, rank: int) -> tuple[float, float]:
        angle = 2 * math.pi * rank / self.p - math.pi / 2
        x = self.width / 2 + (self.width - self.box_width - 4) / 2 * math.cos(angle)
        y = self.height / 2 + (self.height - self.box_height - 4) / 2 * math.sin(angle)
        return x, y

    def box(self, rank: int) -> Mark:
        x, y = self.centre(rank)
        left, top = x - self.box_width / 2, y - self.box_height / 2
        at = (round(left), round(top), self.box_width, self.box_height)
        return Mark(f"rank{rank}", "box", at, f"rank {rank}", parts=(rank,))

    def cell(self, rank: int, chunk: int) -> tuple[float, ...]:
        left, top, _, _ = self.box(rank).at
        x = left + 5 + chunk * self.cell_width
        return (x, top + TITLE, self.cell_width, self.cell_height)

    def arrow(self, message: Message, is_swap: bool) -> tuple[float, ...]:
        """From the edge of one box to that of the other, beside its counterpart."""
        x0, y0 = self.centre(message.src)
        x1, y1 = self.centre(message.dst)
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        if is_swap:
            x0, y0, x1, y1 = (
                x0 - GAP * dy,
                y0 + GAP * dx,
                x1 - GAP * dy,
                y1 + GAP * dx,
            )
        edge = min(
            self.box_width / 2 / max(abs(dx), 1e-9),
            self.box_height / 2 / max(abs(dy), 1e-9),
        )
        edge += 3
        ends = (x0 + edge * dx, y0 + edge * dy, x1 - edge * dx, y1 - edge * dy)
        return tuple(round(number_, 1) for number_ in ends)
