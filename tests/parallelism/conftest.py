"""Small Llamas for the tests of this part."""

from __future__ import annotations

import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch._dynamo  # an optimizer imports it: once here, not once in each forked rank
import torch.distributed.fsdp  # and these
import torch.distributed.pipelining
import torch.distributed.tensor.parallel

from llmlab.models.llama import Llama, LlamaConfig

VARIANTS = {
    "gqa": {},
    "two kv heads": {"num_key_value_heads": 2},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True},
}

# Each kind of model on fewer ranks than it has key/value heads, on as many and on more,
# where that is possible, and each number of ranks; not all pairs.
ON_RANKS = [
    ("gqa", 1),
    ("gqa", 4),
    ("two kv heads", 2),
    ("two kv heads", 8),
    ("one kv head, tied", 4),
    ("biases", 2),
    ("biases", 8),
]


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
    model = Llama(
        LlamaConfig(**sizes | {"num_key_value_heads": 4, "head_dim": 6} | changes)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        else:
            # large enough that attention attends to something
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def traces() -> set[str]:
    """What our parallel programs leave behind: processes, sockets, folders, shared
    memory.
    """
    me = psutil.Process()
    children = me.children(recursive=True)
    found = {f"process {c.pid} {c.name()}" for c in children if c.is_running()}
    found |= {f"socket {c.laddr} {c.status}" for c in me.net_connections()}
    found |= {str(path) for path in Path(tempfile.gettempdir()).glob("llmlab-launch-*")}
    return found | shared_memory()


def shared_memory() -> set[str]:
    """The files of shared memory that a program may have forgotten."""
    folder = Path("/dev/shm")
    return {
        str(path) for pattern in ("*torch*", "psm_*") for path in folder.glob(pattern)
    }


def used_by_others(path: str) -> bool:
    """Whether a living process that is not ours maps this file."""
    me = psutil.Process()
    own = {me.pid, *[child.pid for child in me.children(recursive=True)]}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in own and path in {
                m.path for m in process.memory_maps()
            }:
                return True
    return False


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_behind(tmp_path_factory):
    """After each file of this part's tests all is as it was.

    Other tests may run on this machine at the same time. So the folder for temporary
    files is ours alone, and shared memory that another process uses does not count.
    """
    folder = str(tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        before = traces()
        yield
        left, deadline = traces() - before, time.monotonic() + 20
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left &= traces()
    left = {
        trace
        for trace in left
        if not (trace.startswith("/dev/shm/") and used_by_others(trace))
    }
    assert not left, f"left behind: {', '.join(sorted(left))}"


@pytest.fixture(scope="session")
def deepspeed():
    """DeepSpeed for CPUs, imported here and not once in each forked rank; without the
    extension that it would compile for minutes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        module = pytest.importorskip("deepspeed")
        from deepspeed.ops import __compatible_ops__

        patch.setitem(__compatible_ops__, "deepspeed_shm_comm", False)
        yield module


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, as at a terminal; a shell's background jobs
    start with it ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
