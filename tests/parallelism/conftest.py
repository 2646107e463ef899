"""Small Llamas for the tests of this part."""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch._dynamo  # an optimizer imports it: once here, not once in each forked rank
import torch.distributed.fsdp  # and these

from llmlab.models.llama import Llama, LlamaConfig

VARIANTS = {
    "gqa": {},
    "two kv heads": {"num_key_value_heads": 2},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True},
}


def tiny(**changes) -> Llama:
    """A Llama of 8 query heads with a vocabulary that divides by nothing."""
    sizes = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**sizes | {"num_key_value_heads": 4, "head_dim": 6} | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough that attention attends to something
    return model


def traces() -> set[str]:
    """What parallel programs leave behind: processes and sockets of this one; folders and shared memory of the machine."""
    me = psutil.Process()
    found = {f"process {child.pid} {child.name()}" for child in me.children(recursive=True) if child.is_running()}
    found |= {f"socket {c.laddr} {c.status}" for c in me.net_connections()}
    for folder, pattern in ((tempfile.gettempdir(), "llmlab-launch-*"), ("/dev/shm", "*torch*"), ("/dev/shm", "psm_*")):
        found |= {str(path) for path in Path(folder).glob(pattern)}
    return found


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_behind():
    """After each file of this part's tests all is as it was. Another process's tests may run at the same time: theirs pass."""
    before = traces()
    yield
    left, deadline = traces() - before, time.monotonic() + 20
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= traces()
    assert not left, f"left behind: {', '.join(sorted(left))}"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, as at a terminal; a shell's background jobs start with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
