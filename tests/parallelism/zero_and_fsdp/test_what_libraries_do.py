"""Where DeepSpeed and PyTorch's distributed checkpoint do what one would not guess. The
lesson has a table of it.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llmlab.parallelism import launch
from llmlab.parallelism.examples.zero_libraries import import_deepspeed
from llmlab.parallelism.zero_and_fsdp import Adam
from tests.libraries import seen_in

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SGD = {"type": "SGD", "params": {"lr": 1.0}}


def adam(kind: str, **more) -> dict:
    """Their optimizer in plain PyTorch: their own would be compiled first."""
    return {"type": kind, "params": {"lr": 1e-3, "torch_adam": True} | more}


CONFIGS = {
    "clip: nothing said": {"optimizer": SGD},
    "clip: 0": {"optimizer": SGD, "gradient_clipping": 0.0},
    "clip: 2": {"optimizer": SGD, "gradient_clipping": 2.0},
    "Adam": {"optimizer": adam("Adam", weight_decay=0.1)},
    "Adam, told": {"optimizer": adam("Adam", weight_decay=0.1, adam_w_mode=False)},
    "AdamW": {"optimizer": adam("AdamW", weight_decay=0.1)},
    "AdamW, told": {"optimizer": adam("AdamW", weight_decay=0.1, adam_w_mode=False)},
    "AdamW, no decay said": {"optimizer": adam("AdamW")},
}


def steps_of_deepspeed(comm) -> dict[str, list[float]]:
    """Weights of ones after one step with the gradient (3, 4), by configuration."""
    deepspeed = import_deepspeed(comm)
    after = {}
    for name, config in CONFIGS.items():
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        engine, *_ = deepspeed.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1} | config
        )
        engine.backward(engine(torch.tensor([[3.0, 4.0]])).sum())
        engine.step()
        after[name] = model.weight[0].tolist()
    return after


@pytest.fixture(scope="module")
def after(deepspeed) -> dict[str, list[float]]:
    return launch(steps_of_deepspeed, 1, timeout=120)[0]


def after_torch(kind: type[torch.optim.Optimizer], **settings) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([weight], lr=1e-3, **settings)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    return weight.tolist()


@seen_in("deepspeed", "0.19.8")
def test_deepspeed_clips_at_1_when_nothing_is_said(after):
    """The gradient (3, 4) has the norm 5. Ours has the same default."""
    assert after["clip: nothing said"] == pytest.approx([1 - 0.6, 1 - 0.8], abs=1e-5)
    assert after["clip: 0"] == pytest.approx([1 - 3, 1 - 4], abs=1e-5)
    assert after["clip: 2"] == pytest.approx([1 - 1.2, 1 - 1.6], abs=1e-5)
    assert Adam().clip == 1.0


@seen_in("deepspeed", "0.19.8")
def test_deepspeeds_adam_is_adamw_unless_it_is_told(after):
    """What is told to `AdamW` is not heard."""
    decoupled = after_torch(torch.optim.AdamW, weight_decay=0.1)
    coupled = after_torch(torch.optim.Adam, weight_decay=0.1)
    assert coupled[0] - decoupled[0] > 9e-5
    for name in ("Adam", "AdamW", "AdamW, told"):
        assert after[name] == pytest.approx(decoupled, abs=1e-6), name
    assert after["Adam, told"] == pytest.approx(coupled, abs=1e-6)


@seen_in("deepspeed", "0.19.8")
def test_the_weight_decay_that_is_not_said_depends_on_the_kernel(after, deepspeed):
    """`torch_adam` brings PyTorch's 0.01; DeepSpeed's own has 0."""
    assert after["AdamW, no decay said"] == pytest.approx(
        after_torch(torch.optim.AdamW, weight_decay=0.01), abs=1e-6
    )
    own = inspect.signature(deepspeed.ops.adam.FusedAdam).parameters
    assert own["weight_decay"].default == 0


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three numbers in fp32 and a whole number."""
    weights = torch.tensor([1.7, 300.25, -2.5])
    dcp.save({"w": weights, "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (torch.float64, [1.7000000476837158, 300.25, -2.5]),
        (torch.bfloat16, [1.703125, 300.0, -2.5]),
        (torch.int64, [1, 300, -2]),
    ],
    ids=str,
)
@seen_in("torch", "2.13.0")
def test_a_checkpoint_is_cast_to_what_waits_for_it(folder, dtype, found):
    """Without a word, and whole numbers are cut off."""
    state = {"w": torch.zeros(3, dtype=dtype)}
    assert dcp.load(state, checkpoint_id=folder, no_dist=True) is None
    assert state["w"].dtype == dtype
    assert state["w"].tolist() == found


@pytest.mark.parametrize(
    ("waiting", "inside"),
    [({"w": torch.zeros(4)}, ValueError), ({"v": torch.zeros(3)}, RuntimeError)],
    ids=["shape", "name"],
)
@seen_in("torch", "2.13.0")
def test_an_error_of_a_checkpoint_is_no_exception(folder, waiting, inside):
    """`except Exception` lets it pass; what went wrong is kept inside, by rank."""
    with pytest.raises(CheckpointException) as caught:
        dcp.load(waiting, checkpoint_id=folder, no_dist=True)
    assert not isinstance(caught.value, Exception)
    assert isinstance(caught.value.failures[0][0], inside)


@seen_in("torch", "2.13.0")
def test_a_second_checkpoint_in_a_folder_ends_the_first(folder):
    """With a warning."""
    with pytest.warns(UserWarning, match="existing checkpoint"):
        dcp.save({"v": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointException):
        dcp.load({"w": torch.zeros(3)}, checkpoint_id=folder, no_dist=True)


@seen_in("torch", "2.13.0")
def test_what_is_not_asked_for_is_left_out(folder):
    """Also a whole number in the dictionary is filled in place."""
    state = {"step": 0}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert state == {"step": 7}
