"""The builder and its engine: network → split, layers, tactics → a folder → calls.

    engine.json          versions, machine, the program, layers, tactics, profiles
    engine.safetensors   what is stored: weights, packed or as codes; with refit the
                         weights themselves, too

An engine belongs to the machine that built it: its tactics were timed there. One from
elsewhere is refused, unless that is asked for.

Refit: a weight takes another value, and nothing is built anew: no capture, no fusion,
no timing. What depends on it (codes, their scales, packed copies) is computed again.
The scales of activations stay, so the new model should see numbers as large as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmlab.compilers.front_end import OPS, Graph, Node, Type, run
from llmlab.compilers.tensorrt.calibration import FORMATS
from llmlab.compilers.tensorrt.layers import Layer, fuse_layers, split
from llmlab.compilers.tensorrt.network import Network, Profile, check_weight
from llmlab.compilers.tensorrt.placement import stored_format
from llmlab.compilers.tensorrt.tactics import (
    Tactic,
    TimingCache,
    check_machine,
    in_floats,
    machine,
    pick,
    prepare,
    run_layer,
)

VERSION = 1
DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}


@dataclass
class Plan:
    """Tactics for one profile.

    Attributes:
        tactics: one for each layer.
        prepared: for each layer its weights as the tactic reads them.
    """

    profile: Profile | None
    tactics: list[Tactic]
    prepared: list[list[Tensor]] = field(default_factory=list)


@dataclass
class Engine:
    """A network that is built.

    Attributes:
        after: the program that runs with each call.
        before: the program that computes what is stored; None without refit.
        weights: its inputs, by name and in their order; empty without refit.
        stored: inputs of `after` → their values.
    """

    after: Graph
    layers: list[Layer]
    plans: list[Plan]
    stored: dict[Node, Tensor]
    before: Graph | None
    weights: dict[str, Tensor]

    @property
    def inputs(self) -> list[Node]:
        """What a call gives."""
        return [node for node in self.after.inputs if node not in self.stored]

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Run it.

        Raises:
            ValueError: arguments that it was not built for, or rows that no profile
                has.
        """
        plan = self.plan_for(arguments)
        values = {**self.stored, **dict(zip(self.inputs, arguments, strict=True))}
        for layer, tactic, ready in zip(
            self.layers, plan.tactics, plan.prepared, strict=True
        ):
            values.update(run_layer(layer, tactic, values, ready))
        return [in_floats(node, values) for node in self.after.outputs]

    def plan_for(self, arguments: Sequence[Tensor]) -> Plan:
        """The plan of the narrowest profile that holds their rows."""
        wanted = [node.type for node in self.inputs]
        found = [Type(tuple(x.shape), x.dtype) for x in arguments]
        if self.plans[0].profile is None:
            if found != wanted:
                raise ValueError(
                    f"called with {', '.join(map(str, found))}; built for"
                    f" {', '.join(map(str, wanted))}"
                )
            return self.plans[0]
        rest = [(t.shape[1:], t.dtype) for t in wanted]
        if [(t.shape[1:], t.dtype) for t in found] != rest:
            raise ValueError(
                f"called with {', '.join(map(str, found))}; built for"
                f" {', '.join(map(str, wanted))} with another first dimension"
            )
        rows = {t.shape[0] for t in found}
        fitting = [
            plan
            for plan in self.plans
            if len(rows) == 1 and plan.profile.holds(next(iter(rows)))
        ]
        if not fitting:
            ranges = ", ".join(
                f"{p.profile.least} to {p.profile.most}" for p in self.plans
            )
            raise ValueError(f"called with {sorted(rows)} rows; profiles: {ranges}")
        return min(fitting, key=lambda plan: plan.profile.most - plan.profile.least)

    def refit(self, name: str, value: Tensor) -> None:
        """Give a weight another value.

        Raises:
            ValueError: the engine was built without refit, has no such weight, or the
                value has another shape, or NaN or infinity; nothing is changed then.
        """
        if self.before is None:
            raise ValueError(
                f"weight {name!r}: this engine keeps no weights: build it with"
                " refit=True"
            )
        if name not in self.weights:
            raise ValueError(
                f"weight {name!r} is not one of {', '.join(sorted(self.weights))}"
            )
        check_weight(name, value)
        old = self.weights[name]
        if value.shape != old.shape or value.dtype != old.dtype:
            raise ValueError(
                f"weight {name!r} has shape {tuple(value.shape)} and {value.dtype};"
                f" it must have {tuple(old.shape)} and {old.dtype}"
            )
        self.weights[name] = value.detach().clone()
        values = list(self.weights.values())
        self.stored = store(self.before, self.stored_nodes(), values)
        self.prepare()

    def stored_nodes(self) -> list[Node]:
        """Inputs of `after` that `before` computes, in its order."""
        return [node for node in self.after.inputs if "stored" in node.attributes]

    def prepare(self) -> None:
        """Weights as the tactics read them."""
        for plan in self.plans:
            plan.prepared = [
                prepare(layer, tactic, self.stored)
                for layer, tactic in zip(self.layers, plan.tactics, strict=True)
            ]

    @property
    def bytes(self) -> int:
        """What the weights take, as the first plan reads them."""
        return sum(x.nbytes for x in self.stored.values())

    def save(self, folder: str | Path) -> None:
        """Two files; what is in the folder already is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for i, node in enumerate(self.stored_nodes()):
            tensors[f"stored.{i}"] = self.stored[node].contiguous()
        for name, value in self.weights.items():
            tensors[f"weight.{name}"] = value.contiguous()
        text = {
            "version": VERSION,
            "machine": machine(),
            "after": written(self.after, "after", tensors),
            "before": self.before and written(self.before, "before", tensors),
            "names": list(self.weights),
            "layers": [layer_places(layer, self.after) for layer in self.layers],
            "plans": [
                {
                    "profile": plan.profile and vars(plan.profile),
                    "tactics": [vars(tactic) for tactic in plan.tactics],
                }
                for plan in self.plans
            ],
        }
        save_file(tensors, folder / "engine.safetensors")
        (folder / "engine.json").write_text(json.dumps(text), encoding="utf-8")


def build(
    network: Network,
    cache: TimingCache | None = None,
    refit: bool = False,
    horizontal: bool = True,
    repeat: int = 5,
) -> Engine:
    """Split, fuse, time, keep.

    Args:
        cache: of times; what is timed now is added.
        refit: whether weights can be given new values later: they are kept.
        horizontal: whether products of the same value become one layer.
        repeat: rounds of timing.
    """
    cache = TimingCache() if cache is None else cache
    parts = split(network)
    layers = fuse_layers(parts.after, horizontal)
    weights = {n: network.values[n].detach() for n in network.weights.values()}
    stored = store(parts.before, parts.stored, list(weights.values()))
    plans = []
    for profile in network.profiles or (None,):
        rows = None if profile is None else profile.usual
        values = examples(parts.after, stored, layers, rows)
        tactics = [pick(layer, values, cache, rows, repeat) for layer in layers]
        plans.append(Plan(profile, tactics))
    engine = Engine(
        parts.after,
        layers,
        plans,
        stored,
        parts.before if refit else None,
        {name: x.clone() for name, x in weights.items()} if refit else {},
    )
    engine.prepare()
    return engine


@torch.no_grad()
def store(
    before: Graph, nodes: Sequence[Node], weights: Sequence[Tensor]
) -> dict[Node, Tensor]:
    """What the engine stores, codes in 8 bits."""
    found = {}
    for node, value in zip(nodes, run(before, *weights), strict=True):
        form = stored_format(node)
        found[node] = value if form is None else value.to(FORMATS[form].dtype)
    return found


@torch.no_grad()
def examples(
    after: Graph,
    stored: Mapping[Node, Tensor],
    layers: Sequence[Layer],
    rows: int | None,
) -> dict[Node, Tensor]:
    """Values for each layer to be timed with: a call with random inputs."""
    random = torch.Generator().manual_seed(0)
    values = dict(stored)
    for node in after.inputs:
        if node not in stored:
            shape = node.type.shape if rows is None else (rows, *node.type.shape[1:])
            values[node] = torch.randn(shape, generator=random, dtype=node.type.dtype)
    for layer in layers:
        values.update(run_layer(layer, Tactic("floats"), values, []))
    return values


# The folder ---------------------------------------------------------------------------


def written(graph: Graph, part: str, tensors: dict[str, Tensor]) -> dict:
    """A program as data; constants of several numbers go to `tensors`."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    nodes = []
    for i, node in enumerate(graph.nodes):
        data = None
        if node.data is not None:
            data = f"{part}.{i}"
            tensors[data] = node.data.clone()
        nodes.append(
            {
                "op": node.op,
                "inputs": [place[each] for each in node.inputs],
                "shape": node.type.shape,
                "dtype": str(node.type.dtype),
                "attributes": node.attributes,
                "data": data,
            }
        )
    return {
        "nodes": nodes,
        "inputs": [place[node] for node in graph.inputs],
        "outputs": [place[node] for node in graph.outputs],
    }


def layer_places(layer: Layer, graph: Graph) -> dict[str, list[int]]:
    """A layer by the places of its nodes."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    return {
        part: [place[node] for node in getattr(layer, part)]
        for part in ("nodes", "reads", "roots")
    }


def tuples(x: object) -> object:
    """Lists of JSON as the tuples that they were."""
    return tuple(map(tuples, x)) if isinstance(x, list) else x


def read_program(found: Mapping, tensors: Mapping[str, Tensor], file: Path) -> Graph:
    """A program from data.

    Raises:
        ValueError: an operation that is not known: a plugin that was not registered.
    """
    nodes: list[Node] = []
    for each in found["nodes"]:
        if each["op"] not in OPS:
            raise ValueError(
                f"{file} has the operation {each['op']!r}, which is not known here: if"
                " it is a plugin, register it first"
            )
        nodes.append(
            Node(
                each["op"],
                tuple(nodes[i] for i in each["inputs"]),
                Type(tuple(each["shape"]), DTYPES[each["dtype"]]),
                tuples(each["attributes"]),
                None if each["data"] is None else tensors[each["data"]],
            )
        )
    inputs = [nodes[i] for i in found["inputs"]]
    outputs = [nodes[i] for i in found["outputs"]]
    graph = Graph(inputs, nodes, outputs)
    graph.check()
    return graph


def load_engine(folder: str | Path, other_machine: bool = False) -> Engine:
    """From a folder.

    Args:
        other_machine: take an engine whose tactics were timed elsewhere.

    Raises:
        ValueError: no engine, another version, another machine, an unknown operation.
    """
    file = Path(folder) / "engine.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no engine.json")
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
        version = text["version"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{file} is no engine: {problem}") from None
    if version != VERSION:
        raise ValueError(f"{file} has version {version!r}; known is {VERSION}: rebuild")
    if not other_machine:
        check_machine(text["machine"], str(file))
    tensors = load_file(Path(folder) / "engine.safetensors")
    after = read_program(text["after"], tensors, file)
    before = text["before"] and read_program(text["before"], tensors, file)
    layers = [
        Layer(*([after.nodes[i] for i in each[p]] for p in ("nodes", "reads", "roots")))
        for each in text["layers"]
    ]
    plans = [
        Plan(
            each["profile"] and Profile(**each["profile"]),
            [Tactic(**tactic) for tactic in each["tactics"]],
        )
        for each in text["plans"]
    ]
    weights = {name: tensors[f"weight.{name}"] for name in text["names"]}
    engine = Engine(after, layers, plans, {}, before, weights)
    for i, node in enumerate(engine.stored_nodes()):
        engine.stored[node] = tensors[f"stored.{i}"]
    engine.prepare()
    return engine


def summary(engine: Engine) -> list[str]:
    """A line per layer: what it holds, its precision, its tactic, its bytes."""
    lines = []
    for layer, tactic in zip(engine.layers, engine.plans[0].tactics, strict=True):
        size = f"{layer.traffic / 1e3:8.1f} kB"
        lines.append(f"{layer.precision:5} {size}  {tactic!s:22} {layer}")
    return lines
