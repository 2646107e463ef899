"""Many to one: a queue, and the two ways to keep it from overflowing.

A fluid model of two switches. N senders write to one receiver behind the second; a
victim on the first switch writes to somebody else over the same cable.

    senders ─┐                       ┌─ receiver, C bytes per second
             ├─ switch 1 ══ switch 2 ┤
    victim  ─┘          U            └─ somebody else

    PFC   switch 2 stops switch 1 when its queue reaches X_off, until it is below X_on;
          switch 1 fills, and stops everybody in front of it (IEEE 802.1Qbb)
    ECN   switch 2 marks a packet with probability 0 below K_min, rising to P_max at
          K_max, 1 above; a sender that hears of a mark slows down (DCQCN, Zhu et al.
          2015, https://doi.org/10.1145/2785956.2787484):

              R_T ← R_C,  R_C ← R_C (1 − a/2),  a ← (1 − g) a + g
              else a ← (1 − g) a, and R_C ← (R_C + R_T) / 2, R_T growing by R_AI after
              the fifth time

Simplified: time runs in steps of 1 µs, a rate is a number and a packet only matters for
how likely a mark is; the marks of a period are their expected share; all senders do
the same, half a round trip late; both timers are one; no hyper increase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmlab.chips.checked import counts, positive
from llmlab.chips.clusters_and_networks.topology import NDR

STEP = 1e-6  # s
PACKET = 4096  # bytes


@dataclass(frozen=True)
class Switches:
    """Rates and thresholds; bytes, bytes per second.

    Raises:
        ValueError: a rate or a threshold is not above 0, or they are not in order.
    """

    senders: int = 8
    port: float = NDR  # C, of the receiver, and of each sender
    uplink: float = 16 * NDR  # U, between the switches
    buffer: float = 16e6
    x_off: float = 8e6
    x_on: float = 7e6
    k_min: float = 0.4e6
    k_max: float = 1.6e6
    p_max: float = 0.2
    gain: float = 1 / 256  # g
    period: float = 55e-6  # between two changes of a sender
    increase: float = 250e6  # R_AI: half a percent of the port
    delay: float = 5e-6  # until a sender hears of it
    pfc: bool = True
    ecn: bool = True

    def __post_init__(self) -> None:
        counts(senders=self.senders)
        rates = ("port", "uplink", "k_min", "p_max", "gain", "period", "increase")
        positive(**{name: getattr(self, name) for name in rates})
        if not self.k_min < self.k_max:
            raise ValueError(f"k_max={self.k_max} must be above k_min={self.k_min}")
        if not 0 < self.x_on < self.x_off <= self.buffer:
            raise ValueError(
                f"x_on={self.x_on}, x_off={self.x_off} and buffer={self.buffer} must"
                " grow in this order"
            )
        if self.p_max > 1 or self.gain > 1:
            raise ValueError(f"p_max={self.p_max}, gain={self.gain}: at most 1 each")

    def marking(self, queue: float) -> float:
        """The probability that a packet is marked."""
        if queue <= self.k_min:
            return 0.0
        if queue >= self.k_max:
            return 1.0
        return self.p_max * (queue - self.k_min) / (self.k_max - self.k_min)


@dataclass(frozen=True, eq=False)
class Trace:
    """Over time, in steps of STEP seconds.

    Attributes:
        queue: bytes waiting for the receiver.
        before: bytes waiting in switch 1.
        paused: whether switch 2 has stopped switch 1.
        rate: bytes per second that a sender wants to send.
        received: bytes per second at the receiver.
        victim: bytes per second at somebody else's.
        lost: bytes that found the buffer full.
    """

    queue: np.ndarray
    before: np.ndarray
    paused: np.ndarray
    rate: np.ndarray
    received: np.ndarray
    victim: np.ndarray
    lost: float


class _Sender:
    """DCQCN's reaction point, of which all senders are copies."""

    def __init__(self, switches: Switches) -> None:
        self.switches = switches
        self.rate = switches.port
        self.target = switches.port
        self.alpha = 1.0
        self.rounds = 0  # since the last mark

    def hear(self, mark: float) -> None:
        """A period is over in which packets were marked with this probability."""
        switches = self.switches
        packets = max(self.rate * switches.period / PACKET, 1.0)
        heard = 1 - (1 - mark) ** packets  # at least one was
        if heard > 0.5:
            self.target = self.rate
            self.rate *= 1 - self.alpha / 2
            self.alpha = (1 - switches.gain) * self.alpha + switches.gain
            self.rounds = 0
            return
        self.alpha *= 1 - switches.gain
        self.rounds += 1
        if self.rounds > 5:
            self.target = min(self.target + switches.increase, switches.port)
        self.rate = (self.rate + self.target) / 2


def incast(switches: Switches, seconds: float = 4e-3) -> Trace:
    """N senders and a victim start at full rate; the victim never slows down.

    Queues are first in, first out: what leaves switch 1 has the mix that is in it.
    """
    positive(seconds=seconds)
    steps = round(seconds / STEP)
    columns = np.zeros((6, steps))
    sender = _Sender(switches)
    late = round(switches.delay / STEP)
    every = round(switches.period / STEP)
    many = queue = aside = lost = 0.0  # bytes: in switch 2, in switch 1 of both kinds
    stopped = held = False  # switch 1 by switch 2, the senders by switch 1
    for t in range(steps):
        if t and t % every == 0:
            seen = columns[0, t - late] if t >= late else 0.0
            sender.hear(switches.marking(seen) if switches.ecn else 0.0)
        if not held:
            many += switches.senders * sender.rate * STEP
            aside += switches.port * STEP
        out = 0.0 if stopped else min(many + aside, switches.uplink * STEP)
        through = out * aside / (many + aside) if out else 0.0
        many -= out - through
        aside -= through
        arrived = out - through
        served = min(queue + arrived, switches.port * STEP)
        queue += arrived - served
        spill = max(queue - switches.buffer, 0.0)
        lost += spill
        queue -= spill
        if switches.pfc:
            stopped = queue >= switches.x_off or (stopped and queue > switches.x_on)
            first = many + aside
            held = first >= switches.x_off or (held and first > switches.x_on)
        elif many + aside > switches.buffer:
            excess = 1 - switches.buffer / (many + aside)
            lost += excess * (many + aside)
            many, aside = many * (1 - excess), aside * (1 - excess)
        columns[:, t] = (
            queue,
            many + aside,
            stopped,
            sender.rate,
            served / STEP,
            through / STEP,
        )
    return Trace(*columns, lost=lost)
