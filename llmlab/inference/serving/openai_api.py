"""OpenAI's requests and answers, as data: read by a list of what is known.

    read_chat, read_completion   a body → `Asked`, or `Refused` with the field that is
                                 wrong, in the form that OpenAI's clients expect
    chat_…, completion_…         what goes back, whole or in pieces

A field that is not known is refused by its name. One that OpenAI has and that does
nothing here (as `logprobs`) may have the value that means "nothing". Samplers that only
open servers have (`top_k`, `min_p` …) are read by the names that vLLM gives them.

Simplified: no tools, no images, no log-probabilities, no biases, no structured output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_CHOICES = 8
MOST_STOPS = 4
MOST_STOP_LENGTH = 200
MOST_MESSAGES = 1000
ROLES = ("system", "developer", "user", "assistant")


class Refused(Exception):
    """A request that is not done: an HTTP status, and OpenAI's error object.

    Attributes:
        status: 400, 404, 429, 503 …
        message: what is wrong, in a sentence.
        param: the field of the request, or None.
        code: a word for programs.
        wait: seconds after which it may be tried again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.wait = wait

    def as_data(self) -> dict[str, Any]:
        """{"error": {…}}."""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = kinds.get(self.status, "invalid_request_error")
        error = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


@dataclass(frozen=True)
class Asked:
    """A request that was understood.

    Attributes:
        model: the base or an adapter, by name.
        messages: of a conversation, or None.
        prompts: of a completion: texts or token lists.
        most: tokens to write at most; None: as many as there is room for.
        sampling: settings of the sampler: temperature, top_p, top_k, seed.
        choices: answers to each prompt.
    """

    model: str
    messages: list[dict[str, str]] | None = None
    prompts: tuple[str | list[int], ...] = ()
    most: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    choices: int = 1
    stream: bool = False
    include_usage: bool = False


# What a field may hold ----------------------------------------------------------------


def wrong(name: str, value: Any, allowed: str) -> Refused:
    """A field with a value that is not allowed."""
    try:
        shown = json.dumps(value)
    except RecursionError:
        shown = "…"
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return Refused(
        f"{name}={shown} is not allowed: use {allowed}",
        param=name,
        code="invalid_value",
    )


def number(low: float, high: float, above: bool = False) -> Callable:
    """A reader of numbers from `low` (or above it) to `high`."""
    words = f"a number {'above' if above else 'from'} {low:g} to {high:g}"

    def read(name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # no NaN is between two numbers
        if not is_number or not low <= value <= high or (above and value == low):
            raise wrong(name, value, words)
        return float(value)

    return read


def whole(low: int, high: int) -> Callable:
    """A reader of whole numbers from `low` to `high`."""

    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(name, value, f"a whole number from {low} to {high}")
        if not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return read


def boolean(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def only(*allowed: Any) -> Callable:
    """A reader of a field that does nothing here and may say so only."""

    def read(name: str, value: Any) -> None:
        for each in allowed:
            # True == 1 in Python, but not in JSON
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return
        shown = " or ".join(json.dumps(each) for each in allowed)
        raise Refused(
            f"{name} is not supported here: leave it out"
            + (f", or use {shown}" if allowed else ""),
            param=name,
            code="unsupported_parameter",
        )

    return read


def anything(name: str, value: Any) -> None:
    """A field that is for the caller's own books."""


def text(name: str, value: Any) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(
            f"{name} holds half of a surrogate pair, which is no character",
            param=name,
            code="invalid_value",
        ) from None
    return value


def stops(name: str, value: Any) -> tuple[str, ...]:
    """A stop string, or a list of them."""
    found = [value] if isinstance(value, str) else value
    allowed = f"a text, or a list of at most {MOST_STOPS}"
    if not isinstance(found, list) or len(found) > MOST_STOPS:
        raise wrong(name, value, allowed)
    for each in found:
        if not text(name, each) or len(each) > MOST_STOP_LENGTH:
            raise wrong(name, value, f"texts of 1 to {MOST_STOP_LENGTH} characters")
    return tuple(found)


def stream_options(name: str, value: Any) -> bool:
    """Whether usage is asked for."""
    if not isinstance(value, dict):
        raise wrong(name, value, 'an object, as {"include_usage": true}')
    for key in value:
        if key not in ("include_usage", "include_obfuscation"):
            raise unknown(f"{name}.{key}", "it can hold include_usage")
    if "include_obfuscation" in value:
        only(False)(f"{name}.include_obfuscation", value["include_obfuscation"])
    return boolean(f"{name}.include_usage", value.get("include_usage", False))


def unknown(name: str, known: str) -> Refused:
    """A field that nobody knows."""
    return Refused(
        f"{name[:80]} is not a field that is known here: {known}",
        param=name[:80],
        code="unknown_parameter",
    )


def messages(name: str, value: Any) -> list[dict[str, str]]:
    """A conversation, each message with a role and one text."""
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise wrong(name, value, f"a list of 1 to {MOST_MESSAGES} messages")
    return [_message(f"{name}[{i}]", each) for i, each in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong(name, value, 'an object, as {"role": "user", "content": "Hello"}')
    for key, held in value.items():
        # what an answer holds besides may be sent back, as long as it is empty
        if key not in ("role", "content", "name") and held not in (None, [], {}):
            raise unknown(f"{name}.{key}", "a message holds role and content")
    role = value.get("role")
    if role not in ROLES:
        raise wrong(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(
            _part(f"{name}.content[{i}]", part) for i, part in enumerate(content)
        )
    content = text(f"{name}.content", content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(name: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise wrong(f"{name}.type", kind, '"text": this model reads nothing else')
    return text(f"{name}.text", value.get("text"))


def prompts(name: str, value: Any) -> tuple[str | list[int], ...]:
    """A text, a list of texts, a list of tokens, or a list of those."""
    if isinstance(value, str):
        return (text(name, value),)
    allowed = f"a text, a list of tokens, or a list of at most {MOST_CHOICES} of them"
    if not isinstance(value, list) or not value:
        raise wrong(name, value, allowed)
    if all(_is_token(each) for each in value):
        return (value,)
    if len(value) > MOST_CHOICES:
        raise wrong(name, value, allowed)
    out: list[str | list[int]] = []
    for i, each in enumerate(value):
        if isinstance(each, str):
            out.append(text(f"{name}[{i}]", each))
        elif isinstance(each, list) and each and all(map(_is_token, each)):
            out.append(each)
        else:
            raise wrong(f"{name}[{i}]", each, "a text or a list of tokens")
    return tuple(out)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# The lists of what is known -----------------------------------------------------------

SAMPLING: dict[str, Callable] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(1, 1_000_000),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 10, above=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": whole(-(2**63), 2**63 - 1),
}
COMMON: dict[str, Callable] = {
    "model": text,
    "max_tokens": whole(1, 2**31),
    "n": whole(1, MOST_CHOICES),
    "stop": stops,
    "stream": boolean,
    "stream_options": stream_options,
    "logit_bias": only({}),
    "user": anything,
    "metadata": anything,
    **SAMPLING,
}
CHAT: dict[str, Callable] = {
    **COMMON,
    "messages": messages,
    "max_completion_tokens": whole(1, 2**31),
    "logprobs": only(False),
    "top_logprobs": only(0),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "tool_choice": only("none"),
    "parallel_tool_calls": anything,
    "store": only(False),
    "service_tier": only("auto", "default"),
}
COMPLETION: dict[str, Callable] = {
    **COMMON,
    "prompt": prompts,
    "best_of": only(1),
    "echo": only(False),
    "logprobs": only(),
    "suffix": only(),
}


def decoded(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: it is no JSON, or another kind of JSON.
    """
    try:
        found = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise Refused("the body is not UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        why = str(error) or "nested too deeply"
        if isinstance(error, RecursionError):
            why = "nested too deeply"
        message = f"the body is not valid JSON: {why}"
        raise Refused(message, code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(
            f"the body holds a {type(found).__name__}, not an object",
            code="invalid_json",
        )
    return found


def read(body: bytes, known: dict[str, Callable], needed: Sequence[str]) -> dict:
    """field → value, for those that are there and not null.

    Raises:
        Refused: a field is unknown, missing or has a value that is not allowed.
    """
    raw = decoded(body)
    found = {}
    for name, value in raw.items():
        if name not in known:
            raise unknown(name, "these are: " + ", ".join(sorted(known)))
        if value is not None:
            found[name] = known[name](name, value)
    for name in needed:
        if found.get(name) is None:
            raise Refused(
                f"{name} is missing", param=name, code="missing_required_parameter"
            )
    if "stream_options" in found and not found.get("stream"):
        raise Refused(
            "stream_options is for answers that are streamed: set stream to true",
            param="stream_options",
            code="invalid_value",
        )
    return found


def read_chat(body: bytes) -> Asked:
    """The body of POST /v1/chat/completions.

    Raises:
        Refused: see `read`.
    """
    found = read(body, CHAT, ("model", "messages"))
    if "max_tokens" in found and "max_completion_tokens" in found:
        raise Refused(
            "max_tokens is the old name of max_completion_tokens: give one of them",
            param="max_tokens",
            code="invalid_value",
        )
    most = found.get("max_completion_tokens", found.get("max_tokens"))
    return _asked(found, most, messages=found["messages"])


def read_completion(body: bytes) -> Asked:
    """The body of POST /v1/completions.

    Raises:
        Refused: see `read`.
    """
    found = read(body, COMPLETION, ("model", "prompt"))
    asked = _asked(found, found.get("max_tokens", 16), prompts=found["prompt"])
    if asked.choices * len(asked.prompts) > MOST_CHOICES:
        raise wrong("n", asked.choices, f"at most {MOST_CHOICES} answers in all")
    return asked


def _asked(found: dict[str, Any], most: int | None, **rest: Any) -> Asked:
    return Asked(
        model=found["model"],
        most=most,
        sampling={name: found[name] for name in SAMPLING if name in found},
        stop=found.get("stop", ()),
        choices=found.get("n", 1),
        stream=found.get("stream", False),
        include_usage=found.get("stream_options", False),
        **rest,
    )


# What goes back -----------------------------------------------------------------------


def usage(prompt: int, written: int, cached: int = 0) -> dict[str, Any]:
    """How many tokens were read and written, and how many read from the cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str
    is_chat: bool

    def whole(self, texts: Sequence[tuple[str, str]], used: dict) -> dict[str, Any]:
        """The answer in one piece.

        Args:
            texts: (text, finish_reason) of each choice.
        """
        choices = []
        for i, (written, reason) in enumerate(texts):
            choice: dict[str, Any] = {"index": i, "finish_reason": reason}
            choice["logprobs"] = None
            if self.is_chat:
                message = {"role": "assistant", "content": written, "refusal": None}
                choice["message"] = message
            else:
                choice["text"] = written
            choices.append(choice)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": used}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a conversation's answer: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return self._piece(index, {"delta": delta}, None)

    def piece(self, index: int, written: str) -> dict[str, Any]:
        """Some text."""
        return self._piece(index, self._text(written), None)

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The last piece of a choice."""
        said = {"delta": {}} if self.is_chat else {"text": ""}
        return self._piece(index, said, reason)

    def used(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The piece after the last: usage, and no choice."""
        return self._head(self._chunk) | {"choices": [], "usage": counts}

    def _text(self, written: str) -> dict[str, Any]:
        return {"delta": {"content": written}} if self.is_chat else {"text": written}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _piece(self, index: int, said: dict, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return self._head(self._chunk) | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """GET /v1/models: the first is the base, the others are adapters on it."""
    data = [model(name, names[0], created) for name in names]
    return {"object": "list", "data": data}


def model(name: str, base: str, created: int) -> dict[str, Any]:
    """One of them."""
    out = {"id": name, "object": "model", "created": created, "owned_by": "llmlab"}
    if name != base:
        out["parent"] = base
    return out
