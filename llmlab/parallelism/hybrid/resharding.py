"""A sharded checkpoint that any other split reads, bit for bit: TP 2 → TP 4, PP 2 → 1.

Every rank writes the pieces that it holds into a file of its own, with the place of
each piece in the whole tensor. A reader asks for the pieces that *it* needs, and takes
from each file the part that overlaps. No rank ever holds a whole tensor that it does
not own, and no conversion is needed between two splits. torch.distributed.checkpoint
and Megatron's dist_checkpointing do the same.

    rank-00003.safetensors    the pieces of one rank, under the whole model's names
    rank-00003.json           for each piece: the whole shape, the dimension that is
                              cut, its first entry and the one past its last

    p  tensor-parallel ranks
    d  hidden_size
    K  key/value heads
    V  vocabulary, padded to a multiple of p in memory, never on disk
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
from llmlab.parallelism.tensor import cut_of_parameter, rows_per_rank


@dataclass(frozen=True)
class Piece:
    """Where a rank's part of a tensor lies in the whole: [start, stop) along `dim`."""

    shape: tuple[int, ...]  # of the whole tensor
    dim: int = 0
    start: int = 0
    stop: int = 0
    padded: int = 0  # length along `dim` in memory
    copies: int = 1  # how many tensor-parallel ranks hold the same

    @property
    def length(self) -> int:
        """Entries along `dim` without padding."""
        return self.stop - self.start


def whole_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model, a tied one once."""
    d = config.hidden_size
    V = config.vocab_size
    shapes = {}
    shapes["model.embed_tokens.weight"] = (V, d)
    for i in range(config.num_hidden_layers):
        for part, shape in linear_shapes(config).items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
            is_attention = "self_attn" in part
            if config.attention_bias if is_attention else config.mlp_bias:
                shapes[f"model.layers.{i}.{part}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, d)
    return shapes


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
    shape = shapes[name]
    cut = cut_of_parameter(name)
    if cut is None:
        return Piece(shape, 0, 0, shape[0], shape[0], copies=p)
    dim, by = cut
    whole_length = shape[dim]
    K = config.num_key_value_heads
    if by == "kv heads" and p > K:
        # K pieces, each held by p/K ranks
        length = whole_length // K
        number = rank * K // p
        copies = p // K
    else:
        length = rows_per_rank(whole_length, p)
        number = rank
        copies = 1
    # the last pieces may be shorter than `length`, or empty: the rest is padding
    start = min(whole_length, number * length)
    stop = min(whole_length, (number + 1) * length)
    return Piece(shape, dim, start, stop, length, copies)


def save(
    folder: Path | str, rank: int, tensors: Mapping[str, tuple[Tensor, Piece]]
) -> None:
    """Write one rank's pieces.

    A rank leaves out what is a copy of another rank's (see `Hybrid.owned`).
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    without_padding = {}
    places = {}
    for name, (x, place) in tensors.items():
        unpadded = x.detach().narrow(place.dim, 0, place.length)
        without_padding[name] = unpadded.contiguous()
        places[name] = asdict(place)
    save_file(without_padding, folder / f"rank-{rank:05}.safetensors")
    (folder / f"rank-{rank:05}.json").write_text(json.dumps(places), encoding="utf-8")


def load(folder: Path | str, wanted: Mapping[str, Piece]) -> dict[str, Tensor]:
    """The pieces that are asked for, from a checkpoint of any split; padding is zero.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`.
        ValueError: a tensor is missing, is not complete in the checkpoint, or has
            another shape than is wanted; or two files disagree about it: then some of
            them are of an earlier split that was saved in the same folder.
    """
    stored = _read_places(Path(folder))
    found: dict[str, Tensor] = {}
    for name, want in wanted.items():
        parts = stored.get(name, [])
        if not parts:
            raise ValueError(
                f"{name} is not in the checkpoint {folder}: it has"
                f" {', '.join(list(stored)[:3])} …"
            )
        _, first_place = parts[0]
        if first_place.shape != want.shape:
            raise ValueError(
                f"{name} has shape {first_place.shape} in the checkpoint and"
                f" {want.shape} here"
            )
        out, filled = assemble(name, want, parts)
        if not filled.all():
            raise ValueError(
                f"{name}: the checkpoint {folder} lacks {int((~filled).sum())} of its"
                f" {want.length} entries"
            )
        found[name] = out
    return found


def stored_names(folder: Path | str) -> set[str]:
    """What a checkpoint holds, by name.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`.
    """
    return set(_read_places(Path(folder)))


def assemble(
    name: str, want: Piece, parts: list[tuple[Path, Piece]]
) -> tuple[Tensor, Tensor]:
    """A wanted piece from the stored parts that overlap with it.

    Returns:
        The piece, and which of its entries along the cut dimension some file had.
    """
    from safetensors import safe_open

    out = None
    filled = torch.zeros(want.length, dtype=torch.bool)
    for file, place in parts:
        low, high = _overlap(place, want)
        if high <= low:
            continue
        with safe_open(file, "pt") as opened:
            part = _read_range(opened.get_slice(name), place, low, high)
        if out is None:  # the first part tells the dtype
            out = torch.zeros(_shape_in_memory(want), dtype=part.dtype)
        # views of the entries low … high − 1
        target = out.narrow(want.dim, low - want.start, high - low)
        target_filled = filled.narrow(0, low - want.start, high - low)
        # Entries that an earlier file had, too, must be the same in both.
        in_both = target_filled.nonzero().flatten()
        earlier = target.index_select(want.dim, in_both)
        if not torch.equal(earlier, part.index_select(want.dim, in_both)):
            raise ValueError(
                f"{name} in {file.name} is not what another file says: use a folder"
                " for each save"
            )
        target.copy_(part)
        target_filled.fill_(True)
    if out is None:
        out = _only_padding(name, want, *parts[0])
    return out, filled


def _only_padding(name: str, want: Piece, file: Path, place: Piece) -> Tensor:
    """The piece of a rank that has padding only: a file tells the dtype."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        nothing = _read_range(opened.get_slice(name), place, place.start, place.start)
    return torch.zeros(_shape_in_memory(want), dtype=nothing.dtype)


def _read_places(folder: Path) -> dict[str, list[tuple[Path, Piece]]]:
    """For each tensor, the files that have a part of it, and the part's place."""
    stored: dict[str, list[tuple[Path, Piece]]] = {}
    for index in sorted(folder.glob("rank-*.json")):
        tensors = index.with_suffix(".safetensors")
        for name, fields in json.loads(index.read_text(encoding="utf-8")).items():
            place = Piece(**{**fields, "shape": tuple(fields["shape"])})
            stored.setdefault(name, []).append((tensors, place))
    if not stored:
        raise FileNotFoundError(
            f"{folder} has no checkpoint: no file rank-*.json in it"
        )
    return stored


def _overlap(place: Piece, want: Piece) -> tuple[int, int]:
    """The range [low, high) along the wanted dimension that a stored piece covers.

    A tensor is cut along one dimension only.
    """
    if place.dim == want.dim:
        return max(place.start, want.start), min(place.stop, want.stop)
    if place.length == place.shape[place.dim]:  # stored whole
        return want.start, want.stop
    raise ValueError(f"stored along dimension {place.dim}, wanted along {want.dim}")


def _read_range(stored, place: Piece, low: int, high: int) -> Tensor:
    """Entries low … high − 1 of the whole tensor, from the part at `place`."""
    index = [slice(None)] * len(place.shape)
    index[place.dim] = slice(low - place.start, high - place.start)
    return stored[tuple(index)]


def _shape_in_memory(want: Piece) -> list[int]:
    shape = list(want.shape)
    shape[want.dim] = want.padded
    return shape
