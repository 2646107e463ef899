"""The challenge of part 09: ranks on GPUs, two cables down, and a step under a bound.

A step of training, in four phases. In each of them all groups send at the same time, on
the same links; nothing else overlaps, so all of it is exposed.

    ticks    micro + pp − 1: a pipeline in lock-step, one micro-batch a tick and stage
    compute  ticks · 6 P/(tp pp) · tokens / (PEAK · MFU)
    tp       ticks · 4 L/pp all-reduces of tokens · H · 2 bytes, each a ring of tp ranks
    pp       ticks · one exchange: tokens · H · 2/tp bytes to the next stage, and as
             much back to the one before
    dp       one all-reduce of 4 P/(tp pp) bytes: gradients are summed in fp32

    P  parameters of all layers    L  layers    H  width    tokens  of a micro-batch

The model is Qwen2.5-14B, without its embeddings. A node is that of Leonardo's Booster
(https://leonardo-supercomputer.cineca.eu/hpc-system): four A100 on NVLink, and 400
Gbit/s, here 100 for each GPU. How many nodes a leaf has, and four spines, are ours: a
leaf can take in two to four times what it can send up. Packets are sprayed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise, product

import numpy as np

from llmlab.chips.checked import counts
from llmlab.chips.clusters_and_networks.collectives import (
    Message,
    as_flows,
    ring_step,
)
from llmlab.chips.clusters_and_networks.flows import simulate
from llmlab.chips.clusters_and_networks.routing import routes
from llmlab.chips.clusters_and_networks.topology import (
    GBIT,
    HOP,
    Builder,
    Cable,
    Topology,
)
from llmlab.models.chips import chips

HDR100 = 100 * GBIT  # a card, and a cable to a spine
PCIE = 16e9 * 16 / 8 * 128 / 130  # 4.0, 16 lanes: from a GPU to its card
MFU = 0.5
TOKENS = 4096  # of a micro-batch: one sequence

HIDDEN, LAYERS, FEED, KV = 5120, 48, 13824, 1024  # KV: 8 heads of 128
# q and o, k and v, the three of the feed-forward layer; biases of q, k, v; two norms
LAYER = 2 * HIDDEN**2 + 2 * HIDDEN * KV + 3 * HIDDEN * FEED + 3 * HIDDEN + 2 * KV
PARAMETERS = LAYERS * LAYER


@dataclass(frozen=True)
class Cluster:
    """Leaves with nodes on them, and spines; GPU (leaf · nodes + node) · gpus + g.

    Attributes:
        nodes: on each leaf; `gpus` in each node.
        down: cables that are down, as ("leaf 1", "spine 0").

    Raises:
        ValueError: a count is below 1, or a cable is not there.
    """

    leaves: int
    nodes: int
    gpus: int = 4
    spines: int = 4
    down: tuple[Cable, ...] = ()

    def __post_init__(self) -> None:
        counts(leaves=self.leaves, nodes=self.nodes, gpus=self.gpus, spines=self.spines)
        self.topology.endpoints  # noqa: B018  (refuses what cannot be built)

    @property
    def size(self) -> int:
        """How many GPUs."""
        return self.leaves * self.nodes * self.gpus

    def leaf(self, gpu: int) -> int:
        return gpu // (self.nodes * self.gpus)

    def up(self, leaf: int) -> int:
        """How many cables to spines a leaf has left."""
        return self.spines - sum(f"leaf {leaf}" in cable for cable in self.down)

    @cached_property
    def topology(self) -> Topology:
        """Each GPU on its node's NVLink, and by a card of its own on its leaf."""
        net = Builder([f"gpu {i}" for i in range(self.size)])
        tops = [net.add(f"spine {s}") for s in range(self.spines)]
        nvlink = chips()["A100"].link
        for i in range(self.leaves):
            leaf = net.add(f"leaf {i}")
            for top in tops:
                net.cable(leaf, top, HDR100, HOP)
            for node in range(i * self.nodes, (i + 1) * self.nodes):
                switch = net.add(f"nvlink {node}")
                for gpu in range(node * self.gpus, (node + 1) * self.gpus):
                    card = net.add(f"card {gpu}")
                    net.cable(gpu, switch, nvlink, HOP)
                    net.cable(gpu, card, PCIE, HOP)
                    net.cable(card, leaf, HDR100, HOP)
        name = f"{self.leaves} leaves of {self.nodes} nodes of {self.gpus} GPUs"
        return net.build(name).without(self.down)


@dataclass(frozen=True)
class Job:
    """Rank (d · pp + s) · tp + t is part t of stage s of replica d.

    Attributes:
        tp: ranks that share each layer; a group for each stage of each replica.
        pp: stages; dp: replicas. Ranks (t, s, ·) sum their gradients.
        micro: micro-batches of each replica in a step.

    Raises:
        ValueError: a count is below 2, or pp does not divide the layers.
    """

    tp: int
    pp: int
    dp: int
    micro: int = 4

    def __post_init__(self) -> None:
        counts(2, tp=self.tp, pp=self.pp, dp=self.dp)
        counts(micro=self.micro)
        if LAYERS % self.pp:
            raise ValueError(f"pp={self.pp} must divide the {LAYERS} layers")

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def rank(self, t: int, s: int, d: int) -> int:
        return (d * self.pp + s) * self.tp + t

    def stage(self, rank: int) -> int:
        return rank // self.tp % self.pp

    def groups(self, kind: str) -> list[list[int]]:
        """The ranks of each "tp" or "dp" group, or of each pipeline ("pp"), in order.

        Raises:
            ValueError: another kind.
        """
        kinds = ("tp", "pp", "dp")
        if kind not in kinds:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(kinds)}")
        ranks = np.arange(self.ranks).reshape(self.dp, self.pp, self.tp).T
        lines = np.moveaxis(ranks, kinds.index(kind), -1)
        return lines.reshape(-1, lines.shape[-1]).tolist()


def checked(cluster: Cluster, job: Job, placement: Sequence[int]) -> list[int]:
    """placement[rank] is the GPU of a rank: each rank has one, each GPU at most one.

    Raises:
        ValueError: says what is not so.
    """
    if not isinstance(placement, list | tuple | np.ndarray):
        raise ValueError(f"a placement is a list, not {type(placement).__name__}")
    if len(placement) != job.ranks:
        raise ValueError(
            f"the placement has {len(placement)} GPUs: {job.ranks} ranks need one each"
        )
    seen: dict[int, int] = {}
    for rank, gpu in enumerate(placement):
        try:
            number = operator.index(gpu)
        except TypeError:
            number = None
        if number is None or isinstance(gpu, bool):
            raise ValueError(f"placement[{rank}]={gpu!r} must be a whole number")
        if not 0 <= number < cluster.size:
            raise ValueError(
                f"placement[{rank}]={number} must be one of the GPUs 0 …"
                f" {cluster.size - 1}"
            )
        if number in seen:
            missing = min(set(range(cluster.size)) - {int(gpu) for gpu in placement})
            raise ValueError(
                f"GPU {number} has ranks {seen[number]} and {rank}, and GPU {missing}"
                " has none"
            )
        seen[number] = rank
    return list(seen)


@dataclass(frozen=True)
class Phase:
    """What all groups of a kind do at once, `times` times in a step.

    Attributes:
        slowest: the fullest link on the way of the message that arrives last.
        stages: of the ranks whose messages go over it; `messages`: how many.
    """

    kind: str
    seconds: float
    slowest: str
    stages: tuple[int, ...]
    messages: int


@dataclass(frozen=True)
class Step:
    """Seconds of a step; `phases` are tp, pp and dp."""

    compute: float
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        return self.compute + sum(phase.seconds for phase in self.phases)

    @property
    def worst(self) -> Phase:
        """The longest phase."""
        return max(self.phases, key=lambda phase: phase.seconds)


def compute_seconds(job: Job) -> float:
    """All ticks of a stage, forward and backward, at the stated MFU."""
    flops = 6 * PARAMETERS / (job.tp * job.pp) * TOKENS
    return (job.micro + job.pp - 1) * flops / (MFU * chips()["A100"].speed("bf16"))


def traffic(job: Job) -> Iterator[tuple[str, int, list[Message]]]:
    """(kind, times in a step, messages that all leave at once), rank to rank.

    All steps of a ring are alike, so one stands for all of them.
    """
    ticks = job.micro + job.pp - 1
    activations = TOKENS * HIDDEN * 2
    neighbours = [
        pair
        for line in job.groups("pp")
        for a, b in pairwise(line)
        for pair in ((a, b), (b, a))
    ]
    part = activations / job.tp
    yield _all_reduces(job, "tp", activations, 4 * LAYERS // job.pp * ticks)
    yield "pp", ticks, [Message(0, a, b, part) for a, b in neighbours]
    yield _all_reduces(job, "dp", 4 * PARAMETERS / (job.tp * job.pp), 1)


def _all_reduces(
    job: Job, kind: str, size: float, times: int
) -> tuple[str, int, list[Message]]:
    """All groups of a kind sum `size` bytes in rings, `times` times."""
    groups = job.groups(kind)
    p = len(groups[0])
    sent = [
        Message(0, group[each.src], group[each.dst], each.bytes)
        for each in ring_step(p, size)
        for group in groups
    ]
    return kind, times * 2 * (p - 1), sent


def step(cluster: Cluster, job: Job, placement: Sequence[int]) -> Step:
    """How long a step takes in a placement, and on which links.

    Raises:
        ValueError: the placement is none.
    """
    gpus = checked(cluster, job, placement)
    net = cluster.topology
    phases = []
    for kind, times, sent in traffic(job):
        # sorted as `as_flows` does, so that message i is flow i
        sent = sorted(sent)
        flows = as_flows(sent, gpus)
        ways = routes(net, flows, "spray")
        run = simulate(net, flows, ways=ways, merge=0.0)
        busy = np.round(run.carried / net.bandwidth, 9)  # ties are ties on any CPU
        last = ways.of(int(np.argmax(np.round(run.finish, 9))))
        link = int(last[np.argmax(busy[last])])
        on_it = [i for i in range(len(flows)) if link in ways.of(i)]
        stages = sorted({job.stage(sent[i].src) for i in on_it})
        name = net.link_name(link)
        phases.append(Phase(kind, times * run.seconds, name, tuple(stages), len(on_it)))
    return Step(compute_seconds(job), tuple(phases))


def least_seconds(cluster: Cluster, job: Job) -> float:
    """No placement that keeps a tp group on a node is quicker.

    Each node holds one tp group, a cell (stage, replica). A stage that is on a leaf in
    part has, in its ring, tp messages that leave the leaf. How many stages each leaf
    may have in part for the phase to take no longer than a given time is tried with
    all ways to share cells out; the pipeline is counted on the cards alone.

    Raises:
        ValueError: tp is not the number of GPUs of a node.
    """
    if job.tp != cluster.gpus or job.ranks != cluster.size:
        raise ValueError(f"tp={job.tp} must be gpus={cluster.gpus}, and no GPU be idle")
    seconds = compute_seconds(job)
    nvlink = chips()["A100"].link
    for kind, times, sent in traffic(job):
        size = sent[0].bytes
        if kind == "tp":
            seconds += times * size / nvlink
        elif kind == "pp":
            seconds += times * size / HDR100 * min(2, job.pp - 1)
        else:
            # messages of a card's rate that a cable to a spine has, at least
            most = max(1.0, _fewest(cluster, job))
            seconds += times * size / HDR100 * most
    return seconds


def _fewest(cluster: Cluster, job: Job) -> float:
    """Messages on each cable of the fullest leaf, at least."""
    up = [cluster.up(leaf) for leaf in range(cluster.leaves)]
    levels = sorted({job.tp * parts / u for parts in range(job.pp + 1) for u in up})
    whole = job.dp

    @cache
    def fits(leaf: int, left: tuple[int, ...], level: float) -> bool:
        """Whether leaves from this one on can take the cells that are left."""
        if leaf == cluster.leaves:
            return not any(left)
        for taken in product(*(range(min(n, cluster.nodes) + 1) for n in left)):
            parts = sum(0 < n < whole for n in taken)
            if sum(taken) != cluster.nodes or job.tp * parts > level * up[leaf]:
                continue
            rest = sorted(n - k for n, k in zip(left, taken, strict=True))
            if fits(leaf + 1, tuple(rest), level):
                return True
        return False

    return next(
        level for level in levels if fits(0, (job.dp,) * job.pp, level)
    )  # fmt: skip


def in_order(job: Job, order: str = "tp-dp-pp") -> list[int]:
    """The placement that fills GPUs from 0 in this order of ranks, the first fastest.

    "tp-pp-dp" is rank r on GPU r. Megatron-LM's default is "tp-dp-pp"; its option
    --use-tp-pp-dp-mapping chooses the other.

    Raises:
        ValueError: another order.
    """
    if order == "tp-pp-dp":
        return list(range(job.ranks))
    if order != "tp-dp-pp":
        raise ValueError(f"order={order!r} must be tp-pp-dp or tp-dp-pp")
    found = [0] * job.ranks
    cells = product(range(job.pp), range(job.dp), range(job.tp))
    for gpu, (s, d, t) in enumerate(cells):
        found[job.rank(t, s, d)] = gpu
    return found


@dataclass(frozen=True)
class Case:
    """A cluster with cables down, a job, and the seconds that its step may take."""

    cluster: Cluster
    job: Job
    bound: float


CASES = (
    Case(
        Cluster(4, 3, down=(("leaf 1", "spine 0"), ("leaf 2", "spine 1"))),
        Job(tp=4, pp=3, dp=4),
        2.52,
    ),
    Case(
        Cluster(5, 4, down=(("leaf 2", "spine 1"), ("leaf 2", "spine 3"))),
        Job(tp=4, pp=4, dp=5),
        2.45,
    ),
    Case(
        Cluster(4, 4, down=(("leaf 0", "spine 1"), ("leaf 1", "spine 2"))),
        Job(tp=4, pp=2, dp=8),
        2.82,
    ),
)
