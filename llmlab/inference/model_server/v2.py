"""KServe's Open Inference Protocol, version 2: tensors in JSON, and beside it.

https://github.com/kserve/open-inference-protocol. A tensor is an object:

    {"name": "X", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}

`data` is flattened in row-major order; nested lists are read as if they were.
BYTES are texts in JSON. With the binary extension `data` is missing, `parameters` say
`binary_data_size`, and the raw little-endian numbers stand after the JSON in the body,
tensor after tensor; the header Inference-Header-Content-Length says where the JSON
ends. There each element of BYTES has four bytes with its length before it.

A request is read without a look at the model; `check_inputs` then holds it to the
model's configuration. What is wrong raises `Refused` with a status and a reason.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmlab.inference.model_server.config import ModelConfig, TensorConfig

NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
LARGEST = 1 << 24  # elements of a tensor; the body's size bounds it, too


class Refused(Exception):
    """A request that is answered with a reason, and an HTTP status."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class InferRequest:
    """What a client asks.

    Attributes:
        inputs: by name; texts are arrays of bytes objects.
        outputs: the names that are asked for; () for all.
        binary: the outputs that are wanted in binary; None for all.
    """

    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...] = ()
    id: str = ""
    binary: frozenset[str] | None = field(default_factory=frozenset)


# Tensors -----------------------------------------------------------------------------


def read_tensor(entry: Mapping) -> np.ndarray:
    """A tensor of the JSON as an array.

    Raises:
        ValueError: an unknown datatype, or data that does not fit shape or datatype.
    """
    shape = _shape(entry)
    datatype = entry.get("datatype")
    if datatype not in NUMPY:
        raise ValueError(f"the datatype {datatype!r} is none of {', '.join(NUMPY)}")
    if datatype == "FP16":
        raise ValueError("FP16 cannot be sent as JSON: send binary data")
    data = _flat(entry.get("data"))
    if len(data) != math.prod(shape):
        raise ValueError(
            f"data has {len(data)} elements, and the shape {list(shape)} asks for"
            f" {math.prod(shape)}"
        )
    for value in data:
        if not _fits(value, datatype):
            raise ValueError(f"data holds {value!r:.60}, which is no {datatype}")
    if datatype == "BYTES":
        array = np.empty(len(data), dtype=np.object_)
        array[:] = [value.encode() for value in data]
        return array.reshape(shape)
    try:
        with np.errstate(over="ignore"):  # 1e39 as FP32 is infinite, as in Triton
            return np.array(data, dtype=NUMPY[datatype]).reshape(shape)
    except OverflowError as error:
        raise ValueError(f"{datatype}: {error}") from None


def _fits(value: object, datatype: str) -> bool:
    """Whether a value of the JSON is of a datatype. True is no number here."""
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    kinds = (int, float) if datatype.startswith("FP") else int
    return isinstance(value, kinds) and not isinstance(value, bool)


def _shape(entry: Mapping) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list):
        raise ValueError("the shape is missing")
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"the shape {shape!r:.60} holds {size!r:.20}")
    if math.prod(shape) > LARGEST:
        raise ValueError(f"the shape {shape!r:.60} has too many elements")
    return tuple(shape)


def _flat(data: object) -> list:
    """A list, nested lists taken apart in order."""
    if not isinstance(data, list):
        raise ValueError("data is no list")
    found: list = []
    stack = [iter(data)]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            found.append(value)
        else:
            stack.pop()
    return found


def write_tensor(name: str, array: np.ndarray) -> dict:
    """An array as a tensor of the JSON.

    Raises:
        ValueError: JSON has no such value: FP16, NaN, infinity, bytes that are no text.
    """
    datatype = datatype_of(array)
    if datatype == "FP16":
        raise ValueError(f"{name} is FP16, which JSON cannot carry: ask for binary")
    flat = array.reshape(-1)
    if datatype == "BYTES":
        try:
            data = [_bytes(value).decode() for value in flat]
        except UnicodeDecodeError:
            raise ValueError(f"{name} holds bytes that are no text") from None
    else:
        if datatype.startswith("FP") and not np.isfinite(flat).all():
            raise ValueError(
                f"{name} holds NaN or infinity, which JSON cannot carry: ask for binary"
            )
        data = flat.tolist()
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(array.shape),
        "data": data,
    }


def datatype_of(array: np.ndarray) -> str:
    """FP32 for float32; BYTES for texts.

    Raises:
        ValueError: the protocol has no such type.
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    for name, kind in NUMPY.items():
        if array.dtype == kind:
            return name
    raise ValueError(f"an array of {array.dtype} has no datatype in the protocol")


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def to_bytes(array: np.ndarray) -> bytes:
    """The raw form of the binary extension."""
    if datatype_of(array) != "BYTES":
        little = array.dtype.newbyteorder("<")
        return np.ascontiguousarray(array, dtype=little).tobytes()
    parts = []
    for value in array.reshape(-1):
        raw = _bytes(value)
        parts.append(struct.pack("<I", len(raw)) + raw)
    return b"".join(parts)


def from_bytes(raw: bytes, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """The array of a raw form.

    Raises:
        ValueError: an unknown datatype, or bytes that do not fit the shape.
    """
    if datatype not in NUMPY:
        raise ValueError(f"the datatype {datatype!r} is none of {', '.join(NUMPY)}")
    count = math.prod(shape)
    if datatype == "BYTES":
        values = _texts(raw)
        if len(values) != count:
            raise ValueError(f"{len(values)} texts, and the shape asks for {count}")
        array = np.empty(count, dtype=np.object_)
        array[:] = values
        return array.reshape(shape)
    kind = np.dtype(NUMPY[datatype])
    if len(raw) != count * kind.itemsize:
        raise ValueError(
            f"{len(raw)} bytes, and {datatype} of the shape {list(shape)} has"
            f" {count * kind.itemsize}"
        )
    array = np.frombuffer(raw, dtype=kind.newbyteorder("<"))
    return array.astype(kind).reshape(shape)


def _texts(raw: bytes) -> list[bytes]:
    found = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise ValueError("a text's length is cut off")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise ValueError(f"a text of {length} bytes is cut off")
        found.append(raw[at : at + length])
        at += length
    return found


# Requests and responses --------------------------------------------------------------


def parse_infer_request(body: bytes, header_length: int | None = None) -> InferRequest:
    """The body of POST v2/models/NAME/infer.

    Args:
        header_length: where the JSON ends and binary data begins; None: there is none.
    Raises:
        Refused: with the reason.
    """
    if header_length is not None and not 0 <= header_length <= len(body):
        raise Refused(
            f"Inference-Header-Content-Length is {header_length}, and the body has"
            f" {len(body)} bytes"
        )
    head = body[:header_length]
    rest = body[len(head) :]
    try:
        asked = json.loads(head)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON: {error}") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("inputs"), list):
        raise Refused("the request has no list of inputs")
    identity = asked.get("id", "")
    if not isinstance(identity, str):
        raise Refused(f"id is {identity!r:.40}, and must be a text")
    inputs: dict[str, np.ndarray] = {}
    for entry in asked["inputs"]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise Refused("an input has no name")
        if name in inputs:
            raise Refused(f"the input {name!r} is there twice")
        try:
            inputs[name], rest = _input(entry, rest)
        except ValueError as error:
            raise Refused(f"input {name!r}: {error}") from None
    if rest:
        raise Refused(f"{len(rest)} bytes at the end belong to no input")
    outputs, binary = _outputs(asked)
    return InferRequest(inputs, outputs, identity, binary)


def _input(entry: dict, rest: bytes) -> tuple[np.ndarray, bytes]:
    """One input, and the binary data that is left for the others."""
    parameters = entry.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return read_tensor(entry), rest
    if "data" in entry:
        raise ValueError("there are data and binary_data_size: one of them")
    if not isinstance(size, int) or not 0 <= size <= len(rest):
        raise ValueError(
            f"binary_data_size is {size!r:.20}: {len(rest)} bytes are left"
        )
    array = from_bytes(rest[:size], entry.get("datatype"), _shape(entry))
    return array, rest[size:]


def _outputs(asked: dict) -> tuple[tuple[str, ...], frozenset[str] | None]:
    """The outputs that are asked for, and those of them in binary."""
    entries = asked.get("outputs") or []
    if not isinstance(entries, list):
        raise Refused("outputs is no list")
    parameters = asked.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Refused("parameters is no object")
    everything = parameters.get("binary_data_output") is True
    if not entries:
        return (), None if everything else frozenset()
    names = []
    binary = set()
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise Refused("an output has no name")
        names.append(name)
        own = entry.get("parameters") or {}
        if isinstance(own, dict) and own.get("binary_data", everything) is True:
            binary.add(name)
    return tuple(names), frozenset(binary)


def check_inputs(config: ModelConfig, request: InferRequest) -> int:
    """Hold a request to the model's configuration.

    Returns:
        How many inferences it holds: its batch, or 1.
    Raises:
        Refused: with the reason.
    """
    wanted = {tensor.name: tensor for tensor in config.inputs}
    for name in request.inputs:
        if name not in wanted:
            raise Refused(f"unexpected inference input '{name}' for '{config.name}'")
    missing = [name for name in wanted if name not in request.inputs]
    if missing:
        raise Refused(f"'{config.name}' is missing the inputs {missing}")
    known = {tensor.name for tensor in config.outputs}
    for name in request.outputs:
        if name not in known:
            raise Refused(f"unexpected inference output '{name}' for '{config.name}'")
    for name, array in request.inputs.items():
        _check_input(config, wanted[name], array)
    if not config.max_batch_size:
        return 1
    batches = {array.shape[0] for array in request.inputs.values()}
    if len(batches) > 1:
        raise Refused(f"inputs differ in their batch: {sorted(batches)}")
    batch = batches.pop()
    if not 1 <= batch <= config.max_batch_size:
        raise Refused(
            f"the batch is {batch}, and must be 1 … {config.max_batch_size} for"
            f" '{config.name}'"
        )
    return batch


def _check_input(config: ModelConfig, wanted: TensorConfig, array: np.ndarray) -> None:
    if datatype_of(array) != wanted.datatype:
        raise Refused(
            f"input '{wanted.name}' is {datatype_of(array)}, and '{config.name}'"
            f" expects {wanted.datatype}"
        )
    shape = config.shape(wanted)
    same = len(shape) == array.ndim and all(
        want in (-1, size) for want, size in zip(shape, array.shape, strict=True)
    )
    if not same:
        raise Refused(
            f"unexpected shape for input '{wanted.name}': expected {list(shape)}, got"
            f" {list(array.shape)}"
        )


def infer_response(
    config: ModelConfig,
    version: int,
    request: InferRequest,
    outputs: Mapping[str, np.ndarray],
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary data follows.

    Raises:
        Refused: an output that JSON cannot carry.
    """
    answer: dict = {"model_name": config.name, "model_version": str(version)}
    if request.id:
        answer = {"id": request.id, **answer}
    entries = []
    raw = []
    for name in request.outputs or [tensor.name for tensor in config.outputs]:
        array = np.asarray(outputs[name])
        if request.binary is None or name in request.binary:
            raw.append(to_bytes(array))
            entry = {
                "name": name,
                "datatype": datatype_of(array),
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(raw[-1])},
            }
        else:
            try:
                entry = write_tensor(name, array)
            except ValueError as error:
                raise Refused(str(error)) from None
        entries.append(entry)
    answer["outputs"] = entries
    head = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    if not raw:
        return head, None
    return head + b"".join(raw), len(head)
