"""`config.pbtxt`: what a model is given and gives, and how it is to be served.

The subset of Triton's ModelConfig that this server serves, in its words
(https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html).
A field that is not served is refused by its name and line, not passed over: a setting
that is silently ignored is found out in production.

    max_batch_size 0   tensors are as `dims` say; requests never share an execution
    max_batch_size n   a batch dimension stands before `dims`; requests may hold many
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmlab.inference.model_server import pbtxt
from llmlab.inference.model_server.pbtxt import Field, Message, Word

# data_type → the datatype of KServe v2, which is also that of the JSON
DATATYPES = {
    "TYPE_BOOL": "BOOL",
    "TYPE_UINT8": "UINT8",
    "TYPE_UINT16": "UINT16",
    "TYPE_UINT32": "UINT32",
    "TYPE_UINT64": "UINT64",
    "TYPE_INT8": "INT8",
    "TYPE_INT16": "INT16",
    "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64",
    "TYPE_FP16": "FP16",
    "TYPE_FP32": "FP32",
    "TYPE_FP64": "FP64",
    "TYPE_STRING": "BYTES",
}
KINDS = ("KIND_AUTO", "KIND_CPU")


@dataclass(frozen=True)
class TensorConfig:
    """A tensor by its name. −1 in `dims` is any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """In the words of KServe v2: TYPE_STRING is BYTES."""
        return DATATYPES[self.data_type]


@dataclass(frozen=True)
class Batching:
    """When requests that wait leave together.

    Attributes:
        preferred: sizes at which a batch leaves at once; () is (max_batch,).
        delay: seconds that the oldest may wait for others, 0: none.
        max_batch: the largest batch.
        max_queue: requests that may wait, 0: any number.
    """

    preferred: tuple[int, ...] = ()
    delay: float = 0.0
    max_batch: int = 1
    max_queue: int = 0

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch={self.max_batch} must be 1 or more")
        if not self.delay >= 0:
            raise ValueError(f"delay={self.delay} must be 0 seconds or more")
        if self.max_queue < 0:
            raise ValueError(f"max_queue={self.max_queue} must be 0 or more")
        for size in self.preferred:
            if not 1 <= size <= self.max_batch:
                raise ValueError(
                    f"preferred={self.preferred}: {size} must be 1 … {self.max_batch},"
                    " the largest batch"
                )
        chosen = tuple(sorted(set(self.preferred))) or (self.max_batch,)
        object.__setattr__(self, "preferred", chosen)


@dataclass(frozen=True)
class Step:
    """One model of an ensemble. A map goes from the model's tensor to the ensemble's.

    Attributes:
        inputs: the model's input → the name of the tensor that it is given.
        outputs: the model's output → the name under which others find it.
    """

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    version: int = -1  # −1: the newest


@dataclass(frozen=True)
class ModelConfig:
    """A model as its config.pbtxt describes it."""

    name: str
    backend: str
    max_batch_size: int = 0
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    instances: int = 1
    batching: Batching | None = None
    steps: tuple[Step, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def is_ensemble(self) -> bool:
        """Whether it is made of other models."""
        return self.backend == "ensemble"

    def shape(self, tensor: TensorConfig) -> tuple[int, ...]:
        """A tensor's shape, −1 for the batch where there is one."""
        return (-1, *tensor.dims) if self.max_batch_size else tensor.dims

    def metadata(self, versions: tuple[int, ...]) -> dict:
        """What GET v2/models/NAME answers."""

        def tensors(of: tuple[TensorConfig, ...]) -> list[dict]:
            return [
                {"name": t.name, "datatype": t.datatype, "shape": list(self.shape(t))}
                for t in of
            ]

        return {
            "name": self.name,
            "versions": [str(version) for version in versions],
            "platform": self.backend,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
        }

    def as_json(self) -> dict:
        """What GET v2/models/NAME/config answers, in Triton's words."""
        found: dict = {
            "name": self.name,
            "platform": "ensemble" if self.is_ensemble else "",
            "backend": "" if self.is_ensemble else self.backend,
            "max_batch_size": self.max_batch_size,
        }
        for key, tensors in (("input", self.inputs), ("output", self.outputs)):
            found[key] = [
                {"name": t.name, "data_type": t.data_type, "dims": list(t.dims)}
                for t in tensors
            ]
        if self.batching is not None:
            found["dynamic_batching"] = {
                "preferred_batch_size": list(self.batching.preferred),
                "max_queue_delay_microseconds": round(self.batching.delay * 1e6),
            }
        if self.is_ensemble:
            steps = [
                {
                    "model_name": step.model,
                    "model_version": step.version,
                    "input_map": dict(step.inputs),
                    "output_map": dict(step.outputs),
                }
                for step in self.steps
            ]
            found["ensemble_scheduling"] = {"step": steps}
            found["instance_group"] = []
        else:
            name = f"{self.name}_0"
            group = {"name": name, "kind": "KIND_CPU", "count": self.instances}
            found["instance_group"] = [group]
        found["parameters"] = {
            key: {"string_value": value} for key, value in self.parameters.items()
        }
        return found


# From the text -----------------------------------------------------------------------


def read_config(text: str, folder: str) -> ModelConfig:
    """A config.pbtxt.

    Args:
        folder: the model's folder: its name, and that of the file in a complaint.
    Raises:
        ValueError: it cannot be read, or asks for what is not served here.
    """
    try:
        found = _taken(pbtxt.read(text), MODEL)
        return _checked(found, folder)
    except ValueError as error:
        raise ValueError(f"{folder}/config.pbtxt: {error}") from None


def load_config(model: Path) -> ModelConfig:
    """The config.pbtxt in a model's folder. See `read_config`."""
    file = model / "config.pbtxt"
    if not file.is_file():
        raise ValueError(f"{model.name} has no config.pbtxt")
    return read_config(file.read_text(encoding="utf-8"), model.name)


Reader = Callable[[Field], object]


def _text(given: Field) -> str:
    if not isinstance(given.value, str):
        raise ValueError(f"line {given.line}: {given.name} must be a text in quotes")
    return given.value


def _whole(given: Field) -> int:
    if not isinstance(given.value, int):
        raise ValueError(f"line {given.line}: {given.name} must be a whole number")
    return given.value


def _word(allowed: tuple[str, ...]) -> Reader:
    def one(given: Field) -> str:
        name = given.value.name if isinstance(given.value, Word) else given.value
        if name not in allowed:
            raise ValueError(
                f"line {given.line}: {given.name} is {name}, and served are"
                f" {', '.join(allowed)}"
            )
        return name

    return one


def _message(schema: dict[str, tuple[Reader, bool]]) -> Reader:
    def one(given: Field) -> dict:
        if not isinstance(given.value, Message):
            raise ValueError(f"line {given.line}: {given.name} must be {{ … }}")
        return _taken(given.value, schema)

    return one


def _taken(message: Message, schema: dict[str, tuple[Reader, bool]]) -> dict:
    """A message's fields by name; those that may stand several times as lists."""
    found: dict = {}
    for given in message.fields:
        if given.name not in schema:
            known = ", ".join(schema)
            raise ValueError(
                f"line {given.line}: {given.name} is not served here; known are {known}"
            )
        reader, repeated = schema[given.name]
        value = reader(given)
        if repeated:
            found.setdefault(given.name, []).append(value)
        elif given.name in found:
            raise ValueError(f"line {given.line}: {given.name} stands there twice")
        else:
            found[given.name] = value
    return found


# field → (how its value is read, whether it may stand several times)
TENSOR = {
    "name": (_text, False),
    "data_type": (_word(tuple(DATATYPES)), False),
    "dims": (_whole, True),
}
ENTRY = {"key": (_text, False), "value": (_text, False)}
STRING = {"string_value": (_text, False)}
STEP = {
    "model_name": (_text, False),
    "model_version": (_whole, False),
    "input_map": (_message(ENTRY), True),
    "output_map": (_message(ENTRY), True),
}
MODEL = {
    "name": (_text, False),
    "platform": (_text, False),
    "backend": (_text, False),
    "max_batch_size": (_whole, False),
    "input": (_message(TENSOR), True),
    "output": (_message(TENSOR), True),
    "instance_group": (
        _message({"kind": (_word(KINDS), False), "count": (_whole, False)}),
        True,
    ),
    "dynamic_batching": (
        _message(
            {
                "preferred_batch_size": (_whole, True),
                "max_queue_delay_microseconds": (_whole, False),
                "default_queue_policy": (
                    _message({"max_queue_size": (_whole, False)}),
                    False,
                ),
            }
        ),
        False,
    ),
    "ensemble_scheduling": (_message({"step": (_message(STEP), True)}), False),
    "parameters": (
        _message({"key": (_text, False), "value": (_message(STRING), False)}),
        True,
    ),
}


def _checked(found: dict, folder: str) -> ModelConfig:
    """The fields as a ModelConfig, when they fit together."""
    name = found.get("name", folder)
    if name != folder:
        raise ValueError(f"name is {name!r}, and the folder is called {folder!r}")
    platform = found.get("platform", "")
    backend = platform if platform == "ensemble" else found.get("backend", "")
    if platform not in ("", "ensemble") or not backend:
        raise ValueError(
            f"backend={backend!r}, platform={platform!r}: give a backend, or the"
            " platform 'ensemble'"
        )
    max_batch = found.get("max_batch_size", 0)
    if max_batch < 0:
        raise ValueError(f"max_batch_size={max_batch} must be 0 or more")
    config = ModelConfig(
        name=name,
        backend=backend,
        max_batch_size=max_batch,
        inputs=_tensors("input", found.get("input", [])),
        outputs=_tensors("output", found.get("output", [])),
        instances=_instances(found.get("instance_group", [])),
        batching=_batching(found.get("dynamic_batching"), max_batch),
        steps=_steps(found.get("ensemble_scheduling", {})),
        parameters={
            entry.get("key", ""): entry.get("value", {}).get("string_value", "")
            for entry in found.get("parameters", [])
        },
    )
    if config.is_ensemble != bool(config.steps):
        raise ValueError("an ensemble, and only an ensemble, has ensemble_scheduling")
    if config.is_ensemble and config.batching is not None:
        raise ValueError("an ensemble has no dynamic_batching: its models have")
    return config


def _tensors(kind: str, given: list[dict]) -> tuple[TensorConfig, ...]:
    if not given:
        raise ValueError(f"there is no {kind}")
    found = []
    for tensor in given:
        missing = [key for key in TENSOR if key not in tensor]
        if missing:
            raise ValueError(f"an {kind} has no {' and no '.join(missing)}")
        dims = tuple(tensor["dims"])
        if any(size < 1 and size != -1 for size in dims):
            raise ValueError(f"dims {list(dims)} of {tensor['name']}: sizes, or -1")
        found.append(TensorConfig(tensor["name"], tensor["data_type"], dims))
    names = [tensor.name for tensor in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two of {kind} have the same name: {names}")
    return tuple(found)


def _instances(groups: list[dict]) -> int:
    counts = [group.get("count", 1) for group in groups] or [1]
    if min(counts) < 1:
        raise ValueError(f"instance_group: count={min(counts)} must be 1 or more")
    return sum(counts)


def _batching(given: dict | None, max_batch: int) -> Batching | None:
    if given is None:
        return None
    if max_batch < 1:
        raise ValueError("dynamic_batching needs a max_batch_size of 1 or more")
    delay = given.get("max_queue_delay_microseconds", 0)
    policy = given.get("default_queue_policy", {})
    return Batching(
        preferred=tuple(given.get("preferred_batch_size", [])),
        delay=delay / 1e6,
        max_batch=max_batch,
        max_queue=policy.get("max_queue_size", 0),
    )


def _steps(given: dict) -> tuple[Step, ...]:
    found = []
    for step in given.get("step", []):
        if "model_name" not in step:
            raise ValueError("a step has no model_name")
        maps = []
        for key in ("input_map", "output_map"):
            entries = step.get(key, [])
            pairs = {e.get("key", ""): e.get("value", "") for e in entries}
            if len(pairs) < len(entries) or "" in pairs or "" in pairs.values():
                raise ValueError(
                    f"{key} of {step['model_name']}: each entry needs a key of its own"
                    " and a value"
                )
            maps.append(pairs)
        version = step.get("model_version", -1)
        found.append(Step(step["model_name"], maps[0], maps[1], version))
    return tuple(found)
