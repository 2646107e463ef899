"""Coupled structures of a model: which rows and columns must go together.

A linear makes channels (its rows) and reads channels (its columns). When a channel
goes, all that makes it and all that reads it must go. What that is, is found and not
listed: the model runs once on two tokens, and each element of each activation carries
a label, the channel that it belongs to.

    linear       its columns read the labels of its input, its output has its rows'
    a + b, a ⊙ b  the two labels are one channel from now on
    view         what goes into an axis of a written length (head_dim) is one unit
    attention    query heads, and the key/value head that they share, are one unit
    cat, slices  move labels as they move elements
    output       is what others read: its channels stay

What is one channel is a *unit*: {row 7 of gate, row 7 of up, column 7 of down}. Units
alike are a *group*; a group is cut by choosing the units to keep.

    units    of a group: channels of an MLP, key/value heads with their query heads,
             channels of the residual stream
    member   a parameter, and the axis of it that a group shortens

    >>> from llmlab.models.llama import Llama
    >>> from llmlab.models.presets import preset
    >>> for group in groups(Llama(preset("tiny"))).values():
    ...     print(group.name, group.units)
    model.embed_tokens 32
    model.layers.0.self_attn 2
    model.layers.0.mlp 88
    model.layers.1.self_attn 2
    model.layers.1.mlp 88

To cut is to set the weights of units to 0, and then to leave the zeros out: outputs and
gradients are the same. One group is an exception: an RMSNorm takes the mean over the
channels that are there, so on a narrower residual stream it divides by another number.

Simplified: query heads leave with their key/value head, never alone; no convolutions; a
function that is not known here is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from llmlab.compression import calibration, walk
from llmlab.models.llama import LlamaConfig


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter, and which of its indices each unit takes."""

    name: str  # of the parameter; a tied one has its first name
    axis: int  # 0: rows of a linear, entries of a norm or bias; 1: columns
    size: int  # how long the axis is
    index: Int[Tensor, "units each"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be kept or cut one by one, each with all its members."""

    name: str
    units: int
    members: tuple[Member, ...]


# Groups of a model --------------------------------------------------------------------


def groups(model: nn.Module, example: Tensor | None = None) -> dict[str, Group]:
    """All groups of a model by name, in the order in which they are computed.

    A group is named after the module that holds it, the residual stream after the
    module where it begins.

    Args:
        example: what the model is run on; None: two token ids.
    Raises:
        ValueError: adapters, weights that are quantised, not finite or not there; or
            the model uses a function whose channels cannot be followed. It is named.
    """
    walk.linears(model, skip=())
    if example is None:
        example = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    trace = Trace(model)

    def run() -> None:
        with torch.no_grad(), trace:
            if "use_cache" in inspect.signature(model.forward).parameters:
                out = model(example, use_cache=False)
            else:
                out = model(example)
        trace.stays(out)

    calibration.in_eval_mode(model, run)
    return {group.name: group for group in named(trace.units())}


def named(units: dict[tuple, list[dict]]) -> Iterator[Group]:
    """Groups, from units sorted by what their members are."""
    modules = {}
    names: set[str] = set()
    for kind in units:
        modules[kind] = [name.rpartition(".")[0] for name, *_ in kind]
    prefixes = {kind: common_prefix(places) for kind, places in modules.items()}
    for kind, alike in units.items():
        if len(alike) < 2:  # one unit: there is nothing to choose
            continue
        name = prefixes[kind]
        inside = [p for k, p in prefixes.items() if k != kind and under(p, name)]
        if inside or not name:
            name = modules[kind][0]
        members = []
        for parameter, axis, size, _ in kind:
            index = torch.tensor([unit[parameter, axis, size] for unit in alike])
            members.append(Member(parameter, axis, size, index))
        if name in names:
            name = f"{name}:{len(names)}"
        names.add(name)
        yield Group(name, len(alike), tuple(members))


def common_prefix(names: list[str]) -> str:
    """Of dotted names: "a.b" of "a.b.c" and "a.b.d"."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    common = []
    for part in parts:
        if len(set(part)) > 1:
            break
        common.append(part[0])
    return ".".join(common)


def under(name: str, place: str) -> bool:
    """Whether a module is the one called `place`, or inside it."""
    return not place or name == place or name.startswith(place + ".")


# The trace ----------------------------------------------------------------------------

# Only move elements about: what they do to a tensor they do to its labels.
MOVES = {
    *("__getitem__", "cat", "stack", "chunk", "split", "unbind", "narrow", "select"),
    *("transpose", "permute", "t", "swapaxes", "movedim", "squeeze", "unsqueeze"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "__get__"),
}
VIEWS = {"view", "reshape", "flatten", "unflatten"}
# One element out for one in, or for one of each (with broadcasting).
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rsub", "neg", "pow", "square", "sqrt", "rsqrt"),
    *("exp", "log", "abs", "tanh", "sigmoid", "silu", "gelu", "relu", "clamp"),
    *("softplus", "leaky_relu", "where", "maximum", "minimum", "masked_fill"),
    *("dropout", "to", "float", "type_as", "type", "double", "half", "bfloat16"),
    *("clone", "contiguous", "detach", "__add__", "__mul__", "__sub__", "__neg__"),
    *("__radd__", "__rmul__", "__rsub__", "__truediv__", "__pow__", "copy"),
}
NORMS = {"rms_norm", "layer_norm"}
# What comes out belongs to no channel.
REDUCTIONS = {"mean", "sum", "var", "amax", "amin", "all", "any"}


class Trace(TorchFunctionMode):
    """Follows channels through one run: labels of elements, and pairs of equal ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first: dict[tuple[int, int], int] = {}  # (parameter, axis) → first label
        self.parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        self.count = 0
        self.equal: list[Int[Tensor, "2 pairs"]] = []
        self.fixed: list[Int[Tensor, "labels"]] = []  # these cannot go
        # of each activation, kept alive so that no other gets its id
        self.seen: dict[int, tuple[Tensor, Int[Tensor, "..."]]] = {}

    # Labels. −1 is an element that belongs to no channel.

    def axis(self, parameter: Tensor, axis: int) -> Int[Tensor, "n"]:
        """The labels of one axis of a parameter."""
        n = parameter.shape[axis]
        key = id(parameter), axis
        if key not in self.first:
            self.first[key] = self.count
            self.count += n
        return self.first[key] + torch.arange(n)

    def labels(self, x: object) -> Tensor | None:
        """Of an activation or a vector of parameters; None where it carries none."""
        if not isinstance(x, Tensor):
            return None
        if id(x) in self.seen:
            return self.seen[id(x)][1]
        if id(x) in self.parameters:
            if x.dim() == 1:
                return self.axis(x, 0)
            raise ValueError(
                f"{self.parameters[id(x)][0]} is used by no linear and no embedding:"
                " its channels cannot be followed"
            )
        return None

    def join(self, *labels: Tensor | None) -> Tensor | None:
        """All of these are the same, element by element; what they are then."""
        found = [each for each in labels if each is not None]
        if not found:
            return None
        found = torch.broadcast_tensors(*found)
        joint = found[0]
        for other in found[1:]:
            both = (joint >= 0) & (other >= 0) & (joint != other)
            if both.any():
                self.equal.append(torch.stack([joint[both], other[both]]))
            joint = torch.where(joint >= 0, joint, other)
        return joint

    def tie(self, labels: Tensor, *axes: int) -> None:
        """All elements along these axes are one unit."""
        for axis in axes:
            self.join(labels.narrow(axis, 0, 1).expand_as(labels), labels)

    def stays(self, out: object) -> None:
        """What is read outside cannot go."""
        for x in tree_leaves(dict(out) if isinstance(out, Mapping) else out):
            labels = self.labels(x)
            if labels is not None:
                self.fixed.append(labels[labels >= 0].unique())

    # Functions

    def __torch_function__(
        self,
        func: Callable,
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(isinstance(x, Tensor) for x in tree_leaves(result)):
            return result
        name = func.__name__
        if name.endswith("_") and not name.startswith("__"):
            name = name.rstrip("_")
        labels = self.after(name, func, args, kwargs, result)
        results = tree_leaves(result)
        for x, its in zip(results, tree_leaves(labels), strict=labels is not None):
            self.seen[id(x)] = (x, its)
        return result

    def after(
        self, name: str, func: Callable, args: tuple, kwargs: dict, result: object
    ) -> object:
        """The labels of what a function returned; None where there are none."""
        if name in ("linear", "embedding", "scaled_dot_product_attention"):
            return getattr(self, name)(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        labels = [self.labels(x) for x in given]
        if all(each is None for each in labels) or name in REDUCTIONS:
            return None
        if name in ELEMENTWISE or name in NORMS:
            return self.join(*labels).expand(result.shape)
        if name == "softmax":
            self.tie(labels[0], kwargs.get("dim", (*args, -1)[1]))
            return labels[0]
        if name in ("matmul", "bmm", "__matmul__"):
            return self.product(*labels, result)
        if name in VIEWS:
            moved = labels[0].reshape(result.shape)
            self.tie(moved, *written_axes(given[0].shape, result.shape))
            return moved
        if name in MOVES:
            return func(*tree_map(self.moved, args), **tree_map(self.moved, kwargs))
        raise ValueError(f"channels cannot be followed through the function {name}")

    def moved(self, x: object) -> object:
        """What a function that moves elements is given in place of `x`."""
        labels = self.labels(x)
        if labels is None and isinstance(x, Tensor) and x.is_floating_point():
            return torch.full(x.shape, -1)
        return x if labels is None else labels

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None):
        rows = self.axis(weight, 0)
        columns = self.axis(weight, 1)
        read = self.labels(input)
        if read is None:
            self.fixed.append(columns)  # from outside: as many as are given
        else:
            self.join(read, columns)
        if bias is not None:
            self.join(rows, self.axis(bias, 0))
        return rows.expand(*input.shape[:-1], -1)

    def embedding(self, input: Tensor, weight: Tensor, *args, **kwargs):
        self.fixed.append(self.axis(weight, 0))  # a row for each token
        return self.axis(weight, 1).expand(*input.shape, -1)

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
    ):
        q, k, v = self.labels(query), self.labels(key), self.labels(value)
        shared = q.shape[1] // k.shape[1]  # query heads that read one key/value head
        k = k.repeat_interleave(shared, 1)  # (B, K, S, D) → (B, H, S, D)
        v = v.repeat_interleave(shared, 1)
        return self.product(q, k, self.product(q, v, query)[..., : v.shape[-1]])

    def product(self, a: Tensor | None, b: Tensor | None, result: Tensor):
        """A batch of matrix products: what is in one of them is one unit."""
        if a is None or b is None:
            raise ValueError(
                "channels cannot be followed through a matrix product with what is no"
                " activation"
            )
        for each in (a, b):
            self.tie(each, -1, -2)
        one = self.join(a[..., :1, :1], b[..., :1, :1])
        return one.expand(result.shape)

    # Units

    def units(self) -> dict[tuple, list[dict]]:
        """Units by their kind: (parameter, axis, its size, how many indices) of each
        member.

        A unit is {(parameter, axis, size): indices}.
        """
        roots = components(self.count, self.equal)
        free = torch.ones(self.count, dtype=torch.bool)
        if self.fixed:
            free[roots[torch.cat(self.fixed)]] = False
        found: dict[int, dict] = {}
        for (parameter, axis), first in self.first.items():
            name, tensor = self.parameters[parameter]
            size = tensor.shape[axis]
            member = (name, axis, size)
            its = roots[first : first + size]
            places = free[its].nonzero().flatten()
            for root, i in zip(its[places].tolist(), places.tolist(), strict=True):
                unit = found.setdefault(root, {})
                unit.setdefault(member, []).append(i)
        alike: dict[tuple, list[dict]] = {}
        for unit in found.values():
            kind = tuple((*member, len(index)) for member, index in unit.items())
            alike.setdefault(kind, []).append(unit)
        return alike


def written_axes(old: torch.Size, new: torch.Size) -> list[int]:
    """The axes of a view whose lengths are written in the model's code.

    Where one axis is split, as n · D → (n, D), all but the first of the new ones.
    """
    axes = []
    i = j = 0
    while i < len(old) and j < len(new):
        before, after = [i], [j]
        sizes = [old[i], new[j]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                i += 1
                before.append(i)
                sizes[0] *= old[i]
            else:
                j += 1
                after.append(j)
                sizes[1] *= new[j]
        axes += after[1:]
        i += 1
        j += 1
    return axes


def components(count: int, pairs: list[Int[Tensor, "2 pairs"]]) -> Int[Tensor, "count"]:
    """For each of 0 … count − 1 the smallest number that pairs lead to from it."""
    root = torch.arange(count)
    if not pairs:
        return root
    a, b = torch.cat(pairs, 1)
    while True:
        low = torch.minimum(root[a], root[b])
        new = root.scatter_reduce(0, root[a], low, "amin")
        new = new.scatter_reduce(0, root[b], low, "amin")
        new = new[new]
        if torch.equal(new, root):
            return root
        root = new


# Cutting ------------------------------------------------------------------------------


@torch.no_grad()
def cut(
    model: nn.Module,
    kept: Mapping[str, Int[Tensor, "kept"]],
    known: Mapping[str, Group] | None = None,
) -> nn.Module:
    """Only the kept units of these groups are left, in place; groups not named stay.

    Parameters become new, shorter ones; tied ones stay tied. Where all layers are of
    one width afterwards, the model's config says it.

    Args:
        kept: by the group's name, which units; in any order, which is not kept.
        known: the groups, where they were found already.
    Raises:
        ValueError: as `groups`; or no such group; units that are not there, are there
            twice, or none at all. The model is then as it was.
    """
    known = groups(model) if known is None else known
    walk.linears(model, skip=())
    parameters = dict(model.named_parameters())
    new = dict(parameters)
    chosen = chosen_units(parameters, kept, known)
    for name, units in chosen.items():
        for member in known[name].members:
            index = member.index[units].flatten().sort().values
            weight = new[member.name]
            new[member.name] = weight.index_select(member.axis, index.to(weight.device))
    put(model, {n: w for n, w in new.items() if w is not parameters[n]})
    say_sizes(model)
    return model


@torch.no_grad()
def mask(
    model: nn.Module,
    kept: Mapping[str, Int[Tensor, "kept"]],
    known: Mapping[str, Group] | None = None,
) -> nn.Module:
    """The same with zeros: nothing is shortened. Arguments and errors as in `cut`."""
    known = groups(model) if known is None else known
    parameters = dict(model.named_parameters())
    for name, units in chosen_units(parameters, kept, known).items():
        gone = torch.ones(known[name].units, dtype=torch.bool)
        gone[units] = False
        for member in known[name].members:
            weight = parameters[member.name]
            index = member.index[gone].flatten().to(weight.device)
            weight.index_fill_(member.axis, index, 0.0)
    return model


def chosen_units(
    parameters: Mapping[str, Tensor],
    kept: Mapping[str, Int[Tensor, "kept"]],
    known: Mapping[str, Group],
) -> dict[str, Int[Tensor, "kept"]]:
    """`kept` in order, once it is sure that it fits the groups, and these the model.

    Raises:
        ValueError: as `cut`.
    """
    chosen = {name: checked(name, units, known) for name, units in kept.items()}
    for name in chosen:
        for member in known[name].members:
            weight = parameters.get(member.name)
            shape = () if weight is None else tuple(weight.shape)
            if len(shape) <= member.axis or shape[member.axis] != member.size:
                raise ValueError(
                    f"{member.name} has shape {shape}, and {member.size} along axis"
                    f" {member.axis} when the groups were found: find them anew"
                )
    return chosen


def checked(
    name: str, units: Int[Tensor, "kept"], known: Mapping[str, Group]
) -> Int[Tensor, "kept"]:
    """The units to keep, in order.

    Raises:
        ValueError: as `cut`.
    """
    if name not in known:
        some = ", ".join(list(known)[:4])
        raise ValueError(
            f"kept[{name!r}]: the model has no such group; it has {some} …"
        )
    units = torch.as_tensor(units).cpu()
    if units.dim() != 1 or units.is_floating_point() or units.dtype == torch.bool:
        raise ValueError(
            f"kept[{name!r}] must be numbers of units, of shape (kept,), not"
            f" {units.dtype} of shape {tuple(units.shape)}"
        )
    if not len(units):
        raise ValueError(f"kept[{name!r}] is empty: at least one unit must stay")
    total = known[name].units
    if units.min() < 0 or units.max() >= total:
        raise ValueError(
            f"kept[{name!r}] reaches from {units.min()} to {units.max()}; units are"
            f" 0 … {total - 1}"
        )
    if len(units.unique()) < len(units):
        raise ValueError(f"kept[{name!r}] holds a unit twice")
    return units.long().sort().values


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """New parameters in the place of old ones, wherever the model holds them."""
    old = dict(model.named_parameters())
    new = {}
    for name, weight in weights.items():
        parameter = nn.Parameter(weight.contiguous(), old[name].requires_grad)
        new[id(old[name])] = parameter
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                setattr(module, key, new[id(parameter)])


def say_sizes(model: nn.Module) -> None:
    """Modules and config say the widths that the parameters have."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        for field, width in widths(module).items():
            if isinstance(getattr(module, field, None), int):
                setattr(module, field, width)
    config = getattr(model, "config", None)
    if config is None:
        return
    found = {}
    for module in model.modules():
        for field, width in widths(module).items():
            found.setdefault(field, set()).add(width)
    even = {field: next(iter(ws)) for field, ws in found.items() if len(ws) == 1}
    even = {field: width for field, width in even.items() if hasattr(config, field)}
    if isinstance(config, LlamaConfig):  # frozen
        model.config = dataclasses.replace(config, **even)
    else:
        for field, width in even.items():
            setattr(config, field, width)


def widths(module: nn.Module) -> dict[str, int]:
    """What the parameters of a part of a Llama block say about its widths."""
    found = {}
    if isinstance(getattr(module, "gate_proj", None), nn.Linear):
        found["intermediate_size"], found["hidden_size"] = module.gate_proj.weight.shape
    if isinstance(getattr(module, "q_proj", None), nn.Linear):
        D = getattr(module, "head_dim", None)
        q = module.q_proj.weight.shape[0]
        k = module.k_proj.weight.shape[0]
        if D and not q % k and not k % D:  # else no config can say it
            found["num_attention_heads"] = q // D
            found["num_key_value_heads"] = k // D
            found["head_dim"] = D
        found["hidden_size"] = module.q_proj.weight.shape[1]
    return found
