"""A sharded checkpoint that any other split can read: TP 2 → TP 4, PP 2 → PP 1, bit for
bit.

Every rank writes what it holds into a file of its own, with the place of each piece in
the whole tensor; who reads asks for the pieces that *it* needs, and takes from each
file the part that overlaps. No rank ever holds a whole tensor that it does not own, and
no conversion step stands between two splits. This is what torch.distributed.checkpoint
and Megatron's dist_checkpointing do.

    rank-00003.safetensors    the pieces of one rank, under the whole model's names
    rank-00003.json           for each: the whole shape, the dimension that is cut,
                              first and one past the last

    p  tensor-parallel ranks, r this one      V  vocabulary, padded to a multiple of p
                                                 in memory, never on disk
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmlab.models.accounting import linear_shapes
from llmlab.models.llama import LlamaConfig
from llmlab.parallelism.tensor import PLAN, rows_per_rank

_RULE = {module: (dim, by) for module, dim, by in PLAN}


@dataclass(frozen=True)
class Piece:
    """Where a rank's part of a tensor lies in the whole: [start, stop) along `dim`;
    `padded` is its length in memory.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    stop: int = 0
    padded: int = 0
    copies: int = 1  # how many tensor-parallel ranks hold the same

    @property
    def length(self) -> int:
        """Real entries along `dim`."""
        return self.stop - self.start


def whole_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, a tied one once."""
    d, V, shapes = config.hidden_size, config.vocab_size, {}
    shapes["model.embed_tokens.weight"] = (V, d)
    for i in range(config.num_hidden_layers):
        for part, shape in linear_shapes(config).items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
            if config.attention_bias if "self_attn" in part else config.mlp_bias:
                shapes[f"model.layers.{i}.{part}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (V, d)}


def piece(name: str, config: LlamaConfig, rank: int = 0, p: int = 1) -> Piece:
    """The part of a parameter that tensor-parallel rank `rank` of `p` holds.

    Raises:
        ValueError: the model has no parameter of that name.
    """
    shapes = whole_shapes(config)
    if name == "lm_head.weight" and config.tie_word_embeddings:
        name = "model.embed_tokens.weight"
    if name not in shapes:
        raise ValueError(
            f"name={name!r} is not a parameter of this model: it has"
            f" {', '.join(list(shapes)[:3])} …"
        )
    shape, (leaf, kind) = shapes[name], name.split(".")[-2:]
    dim, by = _RULE.get(leaf, (None, None))
    if dim is None or (kind == "bias" and dim == 1):
        return Piece(shape, 0, 0, shape[0], shape[0], copies=p)
    n, K = shape[dim], config.num_key_value_heads
    if by == "kv heads" and p > K:
        each, at, copies = n // K, rank * K // p, p // K
    else:
        each, at, copies = rows_per_rank(n, p), rank, 1
    start, stop = min(n, at * each), min(n, (at + 1) * each)
    return Piece(shape, dim, start, stop, each, copies)


def save(
    folder: Path | str, rank: int, tensors: Mapping[str, tuple[Tensor, Piece]]
) -> None:
    """Write one rank's pieces. Who holds a copy of what another rank writes leaves it
    out (see `Hybrid.owned`).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    real = {
        name: x.detach().narrow(at.dim, 0, at.length).contiguous()
        for name, (x, at) in tensors.items()
    }
    save_file(real, folder / f"rank-{rank:05}.safetensors")
    places = {name: asdict(at) for name, (_, at) in tensors.items()}
    (folder / f"rank-{rank:05}.json").write_text(json.dumps(places), encoding="utf-8")


def load(folder: Path | str, wanted: Mapping[str, Piece]) -> dict[str, Tensor]:
    """The pieces that are asked for, from a checkpoint of any split; padding is zero.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`.
        ValueError: a tensor is missing or not whole in the checkpoint, has another
            shape than is wanted, or two files disagree about
            it: then some of them are of an earlier split that was saved in the same
                folder.
    """
    from safetensors import safe_open

    stored = _index(Path(folder))
    found: dict[str, Tensor] = {}
    for name, want in wanted.items():
        parts = stored.get(name, [])
        if not parts:
            raise ValueError(
                f"{name} is not in the checkpoint {folder}: it has"
                f" {', '.join(list(stored)[:3])} …"
            )
        if parts[0][1].shape != want.shape:
            raise ValueError(
                f"{name} has shape {parts[0][1].shape} in the checkpoint and"
                f" {want.shape} here"
            )
        out, filled = None, torch.zeros(want.length, dtype=torch.bool)
        for file, at in parts:
            low, high = _overlap(at, want)
            if high <= low:
                continue
            with safe_open(file, "pt") as f:
                part = _read(f.get_slice(name), at, low, high)
            out = torch.zeros(_shape(want), dtype=part.dtype) if out is None else out
            place, twice = (
                x.narrow(d, low - want.start, high - low)
                for x, d in ((out, want.dim), (filled, 0))
            )
            at_both = twice.nonzero().flatten()
            if not torch.equal(
                *(x.index_select(want.dim, at_both) for x in (place, part))
            ):
                raise ValueError(
                    f"{name} in {file.name} is not what another file says: use a folder"
                    " for each save"
                )
            place.copy_(part)
            twice.fill_(True)
        if not filled.all():
            raise ValueError(
                f"{name}: the checkpoint {folder} lacks {int((~filled).sum())} of its"
                f" {want.length} entries"
            )
        found[name] = _nothing(name, *parts[0], want) if out is None else out
    return found


def _nothing(name: str, file: Path, at: Piece, want: Piece) -> Tensor:
    """The piece of a rank that has padding only: no row is read, but the dtype."""
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        return torch.zeros(
            _shape(want), dtype=_read(f.get_slice(name), at, at.start, at.start).dtype
        )


def _index(folder: Path) -> dict[str, list[tuple[Path, Piece]]]:
    stored: dict[str, list[tuple[Path, Piece]]] = {}
    for file in sorted(folder.glob("rank-*.json")):
        for name, at in json.loads(file.read_text(encoding="utf-8")).items():
            place = Piece(**{**at, "shape": tuple(at["shape"])})
            stored.setdefault(name, []).append(
                (file.with_suffix(".safetensors"), place)
            )
    if not stored:
        raise FileNotFoundError(
            f"{folder} has no checkpoint: no file rank-*.json in it"
        )
    return stored


def _overlap(at: Piece, want: Piece) -> tuple[int, int]:
    """The range along the wanted dimension that a stored piece covers; a tensor is cut
    along one dimension only.
    """
    if at.dim == want.dim:
        return max(at.start, want.start), min(at.stop, want.stop)
    if at.length == at.shape[at.dim]:  # stored whole
        return want.start, want.stop
    raise ValueError(f"stored along dimension {at.dim}, wanted along {want.dim}")


def _read(stored, at: Piece, low: int, high: int) -> Tensor:
    shift = at.start
    index = [slice(None)] * len(at.shape)
    index[at.dim] = slice(low - shift, high - shift)
    return stored[tuple(index)]


def _shape(want: Piece) -> list[int]:
    shape = list(want.shape)
    shape[want.dim] = want.padded
    return shape
