"""A model that runs: its queue, its instances, and what they count.

A request is put into the queue, and its caller holds a Future. Each instance is a
thread that asks the batcher for the next batch, executes it, and answers the Futures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from llmlab.inference.model_server.backend import BACKENDS, Instance, ModelFailed
from llmlab.inference.model_server.batching import (
    Batcher,
    Decide,
    QueueFull,
    Waiting,
    next_batch,
    one_by_one,
)
from llmlab.inference.model_server.config import Batching, Step
from llmlab.inference.model_server.counting import Counts
from llmlab.inference.model_server.ensemble import run_ensemble
from llmlab.inference.model_server.repository import Entry
from llmlab.inference.model_server.v2 import InferRequest, Refused, check_inputs

AT_ONCE = 64  # requests of one ensemble that are on their way together
Answer = dict[str, np.ndarray]


@dataclass
class Call:
    """A request, and where its answer goes."""

    request: InferRequest
    size: int
    came: int = field(default_factory=time.monotonic_ns)
    answer: Future = field(default_factory=Future)


def shapes_of(request: InferRequest, batched: bool) -> tuple:
    """What must be the same in a batch: every shape but the batch dimension."""
    skipped = 1 if batched else 0
    return tuple((n, x.shape[skipped:]) for n, x in sorted(request.inputs.items()))


class RunningModel:
    """A model with its instances. `submit` may be called from any thread.

    Raises:
        ValueError: there is no such backend, or a model.py cannot be loaded.
    """

    def __init__(self, entry: Entry, decide: Decide = next_batch) -> None:
        self.entry = entry
        self.counts = Counts()
        config = entry.config
        if config.backend not in BACKENDS:
            raise ValueError(
                f"{config.name}: there is no backend {config.backend!r}; there are"
                f" {', '.join(BACKENDS)}"
            )
        make = BACKENDS[config.backend]
        instances = [
            make(config, entry.folder, entry.version, number)
            for number in range(config.instances)
        ]
        if config.batching is None:
            alone = Batching(max_batch=max(1, config.max_batch_size))
            self.batcher = Batcher(alone, one_by_one)
        else:
            self.batcher = Batcher(config.batching, decide)
        self._threads = [
            threading.Thread(target=self._work, args=(each,), daemon=True)
            for each in instances
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: InferRequest) -> Future[Answer]:
        """Put a request into the queue.

        Raises:
            Refused: it does not fit the model, or the queue is full.
        """
        size = check_inputs(self.entry.config, request)
        call = Call(request, size)
        batched = self.entry.config.max_batch_size > 0
        try:
            self.counts.waits(1)
            self.batcher.put(call, size, shapes_of(request, batched))
        except QueueFull as error:
            self.counts.waits(-1)
            self.counts.failed(0, "REJECTED")
            raise Refused(str(error), 503) from None
        except RuntimeError as error:
            self.counts.waits(-1)
            raise Refused(str(error), 503) from None
        return call.answer

    def close(self) -> None:
        """Finish what is being executed; refuse what waits."""
        self._refuse(Refused("the model is being unloaded", 503))
        for thread in self._threads:
            thread.join()

    def _work(self, instance: Instance) -> None:
        try:
            while (batch := self.batcher.take()) is not None:
                self._execute(instance, batch)
        except Exception as error:  # `decide` may be anybody's
            self._refuse(ModelFailed(f"the batcher: {type(error).__name__}: {error}"))
        instance.finalize()

    def _refuse(self, why: Exception) -> None:
        """No more requests; those that wait get the reason."""
        for waiting in self.batcher.close():
            self.counts.waits(-1)
            _answer(waiting.work, why)

    def _execute(self, instance: Instance, batch: list[Waiting]) -> None:
        """One execution, and an answer for each of its requests."""
        calls = [waiting.work for waiting in batch]
        self.counts.waits(-len(calls))
        times = [time.monotonic_ns()]
        try:
            prepared = instance.prepare([call.request for call in calls])
            times.append(time.monotonic_ns())
            answers = instance.execute(prepared)
            times.append(time.monotonic_ns())
            results = instance.collect(answers)
        except Exception as error:  # the author's code may raise anything
            name = f"{self.entry.name}_0"
            said = f"{type(error).__name__}: {error}"
            failed = ModelFailed(
                f"Failed to process the request(s) for model '{name}', message: {said}"
            )
            results = [failed] * len(calls)
        now = time.monotonic_ns()
        if len(times) == 3:  # the model ran
            phases = (times[1] - times[0], times[2] - times[1], now - times[2])
            self.counts.executed(sum(call.size for call in calls), phases)
        for call, result in zip(calls, results, strict=True):
            if isinstance(result, ModelFailed):
                self.counts.failed(now - call.came, "BACKEND")
            else:
                queue = times[0] - call.came
                self.counts.succeeded(call.size, now - call.came, queue, phases)
            _answer(call, result)


def _answer(call: Call, result: Answer | Exception) -> None:
    if not call.answer.set_running_or_notify_cancel():
        return  # the client has gone
    if isinstance(result, Exception):
        call.answer.set_exception(result)
    else:
        call.answer.set_result(result)


class RunningEnsemble:
    """An ensemble over models that run."""

    def __init__(self, entry: Entry, models: Mapping[str, RunningModel]) -> None:
        self.entry = entry
        self.counts = Counts()
        self._models = models
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=entry.name)

    def submit(self, request: InferRequest) -> Future[Answer]:
        """Run all steps.

        Raises:
            Refused: it does not fit.
        """
        size = check_inputs(self.entry.config, request)
        return self._pool.submit(self._run, Call(request, size))

    def close(self) -> None:
        """Finish what is on its way."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, call: Call) -> Answer:
        started = time.monotonic_ns()

        def infer(step: Step, tensors: dict[str, np.ndarray]) -> Answer:
            request = InferRequest(tensors, tuple(step.outputs), call.request.id)
            return self._models[step.model].submit(request).result()

        try:
            found = run_ensemble(self.entry.config.steps, call.request.inputs, infer)
        except Exception:
            self.counts.failed(time.monotonic_ns() - call.came, "BACKEND")
            raise
        now = time.monotonic_ns()
        phases = (0, now - started, 0)
        self.counts.executed(call.size, phases)
        queue = started - call.came
        self.counts.succeeded(call.size, now - call.came, queue, phases)
        return {tensor.name: found[tensor.name] for tensor in self.entry.config.outputs}
