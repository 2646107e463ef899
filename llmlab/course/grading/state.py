"""A plain torch for the time of a check, whatever the learner set before.

A default dtype, a default device, gradients turned off, a seed: none of it reaches the
check, and all of it is back afterwards.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import numpy as np
import torch

CPU = torch.device("cpu")


@contextmanager
def neutral(seed: int = 0) -> Iterator[None]:
    """Seeds all generators and sets torch's switches to what they are at its start.

    Afterwards everything is as it was.
    """
    with ExitStack() as stack:
        stack.enter_context(_switches())
        stack.enter_context(_generators(seed))
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Shows no output and no warnings: an answer's were seen once already."""
    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _switches() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        _use(CPU)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            np.errstate(all="warn"),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        _use(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _use(device: torch.device) -> None:
    """Makes `device` the default, where it is another one."""
    if torch.get_default_device() != device:
        # None, not the CPU: without a default device torch's calls are quicker.
        torch.set_default_device(None if device == CPU else device)


@contextmanager
def _generators(seed: int) -> Iterator[None]:
    """Seeds the generators of torch, NumPy and Python; puts them back afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
