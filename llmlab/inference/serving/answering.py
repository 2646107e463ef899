"""From a request that was understood to its text, piece by piece.

    answer    hands each choice to the worker, yields (choice, text, finish_reason)

Whatever happens, it leaves nothing in the worker: a choice that has not ended when the
reader goes away, or when the time is over, is aborted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmlab.inference.serving.metrics import Metrics
from llmlab.inference.serving.openai_api import Asked, Refused
from llmlab.inference.serving.supervisor import Supervisor
from llmlab.inference.serving.text import Growing, ModelText, Stops, TemplateError


@dataclass(frozen=True)
class ServingConfig:
    """What a server allows.

    Attributes:
        max_length: tokens of a request, prompt and answer.
        max_new_tokens: tokens of an answer.
        max_sequences: that the engine computes at one time.
        max_queue: requests that may wait besides; more are told to come again.
        max_seconds: for a whole answer.
        max_body: bytes of a request.
    """

    max_length: int = 2048
    max_new_tokens: int = 1024
    max_sequences: int = 16
    max_queue: int = 64
    max_seconds: float = 300.0
    max_body: int = 2**20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "max_queue" else 1
            if name == "max_seconds":
                if not value > 0:
                    raise ValueError(f"{name}={value!r} must be above 0")
            elif not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r} must be a whole number from {least}"
                )


class Gone(Exception):
    """The client has hung up."""


@dataclass
class Choice:
    """One text on its way."""

    index: int
    number: int
    growing: Growing
    stops: Stops
    written: int = 0
    last: float = 0.0
    finished: str | None = None


@dataclass
class Call:
    """One request on its way.

    Attributes:
        inbox: what the supervisor says of its choices.
        gone: whether the client has hung up.
        read: tokens of its prompts.
    """

    asked: Asked
    arrived: float
    deadline: float
    inbox: asyncio.Queue = field(default_factory=asyncio.Queue)
    choices: dict[int, Choice] = field(default_factory=dict)
    gone: bool = False
    read: int = 0

    @property
    def written(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.written for choice in self.choices.values())

    @property
    def left(self) -> float:
        """Seconds until its time is over."""
        return max(0.0, self.deadline - time.monotonic())

    def hang_up(self) -> None:
        """Called when the client's connection is closed."""
        self.gone = True
        self.inbox.put_nowait((None, "gone"))


class Answering:
    """What the handlers share: the model's text, the worker, the limits.

    Args:
        names: the base, by the name that clients use, then its adapters.
    """

    def __init__(
        self,
        text: ModelText,
        names: list[str],
        supervisor: Supervisor,
        config: ServingConfig,
        metrics: Metrics,
    ) -> None:
        self.text = text
        self.names = names
        self.supervisor = supervisor
        self.config = config
        self.metrics = metrics
        self.reserved = 0  # answers that are being read, computed or written
        self._mean = 1.0  # seconds of an answer, a running mean

    @property
    def room(self) -> int:
        """Answers that may be in work at one time."""
        return self.config.max_sequences + self.config.max_queue

    @property
    def longest(self) -> int:
        """Tokens of a request at most."""
        return min(self.config.max_length, self.text.context or self.config.max_length)

    def reserve(self, asked: Asked) -> int:
        """Takes places in the queue, which `release` gives back.

        Raises:
            Refused: it is full, or could never hold so many.
        """
        count = asked.choices * max(1, len(asked.prompts))
        if count > self.room:
            raise Refused(
                f"{count} answers are asked for, and this server has room for"
                f" {self.room} at one time",
                param="n",
                code="invalid_value",
            )
        if self.reserved + count > self.room:
            turns = self.reserved / self.config.max_sequences
            raise Refused(
                f"the queue is full: {self.reserved} answers are being made or wait,"
                f" and {self.room} may. Try again later",
                status=429,
                code="queue_full",
                wait=max(1, math.ceil(turns * self._mean)),
            )
        self.reserved += count
        return count

    def release(self, count: int, seconds: float) -> None:
        """Gives places back."""
        self.reserved -= count
        self._mean = 0.9 * self._mean + 0.1 * seconds

    def adapter(self, name: str) -> str | None:
        """The adapter that a model's name stands for; None is the base.

        Raises:
            Refused: there is no such model.
        """
        if name not in self.names:
            raise Refused(
                f"the model {name[:80]!r} is not served here: there is"
                f" {', '.join(self.names)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return None if name == self.names[0] else name

    async def tokens(self, asked: Asked) -> list[list[int]]:
        """The tokens of each prompt.

        Raises:
            Refused: it is too long, empty, or no conversation of this model's.
        """
        if asked.messages is not None:
            return [await self._encoded(self.text.chat, asked.messages, "messages")]
        out = []
        for i, prompt in enumerate(asked.prompts):
            name = "prompt" if len(asked.prompts) == 1 else f"prompt[{i}]"
            if isinstance(prompt, str):
                out.append(await self._encoded(self.text.encode, prompt, name))
            else:
                out.append(self._checked(prompt, name))
        return out

    async def _encoded(self, encode: Any, given: Any, name: str) -> list[int]:
        """In a thread: a long text takes a while, and others are served meanwhile."""
        try:
            return self._checked(await asyncio.to_thread(encode, given), name)
        except TemplateError as error:
            raise Refused(str(error), param=name, code="invalid_value") from None

    def _checked(self, tokens: list[int], name: str) -> list[int]:
        vocab = self.text.tokenizer.get_vocab_size()
        if not tokens:
            raise Refused(f"{name} has no tokens", param=name, code="invalid_value")
        if max(tokens) >= vocab:
            raise Refused(
                f"{name} has the token {max(tokens)}: they go from 0 to {vocab - 1}",
                param=name,
                code="invalid_value",
            )
        if len(tokens) >= self.longest:
            raise Refused(
                f"{name} has {len(tokens)} tokens, and prompt and answer together may"
                f" have {self.longest}",
                param=name,
                code="context_length_exceeded",
            )
        return tokens

    async def answer(self, call: Call) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, text, finish_reason), as they come.

        Raises:
            Refused: it cannot be done, or not any more; the reason is said.
            Gone: the client has hung up.
        """
        asked = call.asked
        count = 0
        outcome = "error"
        try:
            adapter = self.adapter(asked.model)
            count = self.reserve(asked)
            prompts = await self.tokens(asked)
            self._submit(call, prompts, adapter)
            while any(not each.finished for each in call.choices.values()):
                message = await asyncio.wait_for(call.inbox.get(), call.left)
                for piece in self._piece(call, message):
                    yield piece
            outcome = "answered"
        except TimeoutError:
            outcome = "time limit"
            raise Refused(
                f"the answer took over {self.config.max_seconds:g} seconds, the limit"
                " of this server: ask for fewer tokens",
                status=504,
                code="time_limit",
            ) from None
        except (Gone, GeneratorExit):
            outcome = "hung up"
            raise
        except Refused as error:
            outcome = error.code or "error"
            raise
        finally:
            for choice in call.choices.values():
                if not choice.finished:
                    self.supervisor.abort(choice.number)
            if count:
                self.release(count, time.monotonic() - call.arrived)
            self.metrics.requests.labels(outcome).inc()
            self.metrics.written.inc(call.written)

    def _submit(
        self, call: Call, prompts: list[list[int]], adapter: str | None
    ) -> None:
        asked = call.asked
        ends = self.text.ends
        for place, tokens in enumerate(prompts):
            room = self.longest - len(tokens)
            most = min(asked.most or room, self.config.max_new_tokens, room)
            for k in range(asked.choices):
                # OpenAI's default is 1; without a temperature it is not the engine's
                sampling = {"temperature": 1.0, **asked.sampling, "order": "vllm"}
                sampling |= {"max_new_tokens": most, "stop_tokens": ends}
                if sampling.get("seed") is not None:
                    sampling["seed"] += k  # else all choices would be the same
                number = self.supervisor.submit(call.inbox, tokens, sampling, adapter)
                call.choices[number] = Choice(
                    place * asked.choices + k,
                    number,
                    Growing(self.text.tokenizer),
                    Stops(asked.stop),
                )
            call.read += len(tokens)
        self.metrics.prompt.inc(call.read)

    def _piece(self, call: Call, message: tuple) -> list[tuple[int, str, str | None]]:
        """What one message means for the answer."""
        number, kind, *rest = message
        if kind == "gone" or call.gone:
            raise Gone
        if kind == "refused":
            call.choices[number].finished = "refused"
            raise Refused(rest[0], code="invalid_value")
        if kind == "failed":
            for choice in call.choices.values():
                choice.finished = "failed"
            raise Refused(rest[0], status=500, code="worker_failed")
        choice = call.choices[number]
        if choice.finished:
            return []  # a token that was on its way when it was stopped
        return self._token(call, choice, *rest)

    def _token(
        self, call: Call, choice: Choice, token: int | None, finished: str | None
    ) -> list[tuple[int, str, str | None]]:
        """One token more, or the end."""
        self._timed(call, choice)
        shown = ""
        if token is not None:
            choice.written += 1
            shown = choice.stops.add(choice.growing.add(token))
        if finished and not choice.stops.reached:
            shown += choice.stops.add(choice.growing.end())
        if choice.stops.reached:
            if not finished:
                self.supervisor.abort(choice.number)
            finished = "stop"
        elif finished:
            shown += choice.stops.end()
        choice.finished = finished
        return [(choice.index, shown, finished)] if shown or finished else []

    def _timed(self, call: Call, choice: Choice) -> None:
        now = time.monotonic()
        if choice.last:
            self.metrics.next.observe(now - choice.last)
        else:
            self.metrics.first.observe(now - call.arrived)
        choice.last = now

    def about(self) -> Mapping[str, Any]:
        """What is served, for the page."""
        return {
            "models": self.names,
            "chat": self.text.template is not None,
            "max_length": self.longest,
            "max_new_tokens": self.config.max_new_tokens,
        }
