"""The same model in each engine: live where it is quick, recorded and run again where
it is slow.
"""

import pytest

from llmlab.parallelism import World, launch
from llmlab.parallelism.frameworks import engines


@pytest.fixture(scope="module")
def reference():
    return World(1).run(engines.plain)[0]


@pytest.mark.parametrize(
    "engine", [engines.ddp, engines.fsdp2, engines.dtensor, engines.pipelining]
)
def test_an_engine_of_pytorch_trains_as_one_process(engine, reference):
    assert reference[-1] < reference[0] - 0.1
    for losses in launch(engine, 2, timeout=120):
        assert losses == pytest.approx(reference, abs=1e-5)


def test_four_replicas(reference):
    assert launch(engines.ddp, 4, timeout=120)[3] == pytest.approx(reference, abs=1e-5)


def test_what_was_recorded_is_the_same(reference):
    losses = engines.recorded()["losses"]
    assert len(losses) == 5 and set(engines.recorded()["versions"]) == {
        "deepspeed",
        "megatron-core",
        "torch",
    }
    for name, found in losses.items():
        assert found == pytest.approx(reference, abs=1e-4), name


@pytest.mark.slow
def test_deepspeed_again(reference, deepspeed):
    found = launch(lambda comm: engines.deepspeed(comm, 1), 2, timeout=200)
    assert found[1] == pytest.approx(reference, abs=1e-4)
