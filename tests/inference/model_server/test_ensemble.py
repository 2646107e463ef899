"""Models joined by the names of tensors."""

from __future__ import annotations

import itertools

import pytest

from llmlab.inference.model_server.config import ModelConfig, Step, TensorConfig
from llmlab.inference.model_server.ensemble import check_ensemble, run_ensemble

# a diamond: a → (b, c) → d
STEPS = (
    Step("a", {"in": "start"}, {"out": "x"}),
    Step("b", {"in": "x"}, {"out": "y"}),
    Step("c", {"in": "x"}, {"out": "z"}),
    Step("d", {"left": "y", "right": "z"}, {"out": "end"}),
)


def run(steps, tensors=None):
    order = []

    def infer(step, given):
        order.append(step.model)
        assert given.keys() == step.inputs.keys()  # by its own names
        return {"out": f"{step.model}({','.join(given[k] for k in sorted(given))})"}

    return run_ensemble(steps, tensors or {"start": "s"}, infer), order


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_in_which_steps_are_written_does_not_matter(order):
    found, ran = run([STEPS[i] for i in order])
    assert found["end"] == "d(b(a(s)),c(a(s)))"
    assert sorted(ran) == ["a", "b", "c", "d"]
    assert ran[0] == "a" and ran[-1] == "d"


def test_all_tensors_are_there_and_the_inputs_are_not_changed():
    given = {"start": "s"}
    found, _ = run(STEPS, given)
    assert set(found) == {"start", "x", "y", "z", "end"}
    assert given == {"start": "s"}


def test_a_model_may_stand_in_several_steps():
    steps = [Step("a", {"in": n}, {"out": n + "a"}) for n in ("s", "sa", "saa")]
    found, ran = run(steps, {"s": "s"})
    assert (found["saaa"], ran) == ("a(a(a(s)))", ["a"] * 3)


def test_inputs_that_never_come_are_told():
    circle = [
        Step("a", {"in": "y"}, {"out": "x"}),
        Step("b", {"in": "x"}, {"out": "y"}),
    ]
    with pytest.raises(ValueError, match="the inputs of a, b never come"):
        run(circle)


def tensor(name, data_type="TYPE_FP32"):
    return TensorConfig(name, data_type, (1,))


MODELS = {
    "a": ModelConfig("a", "python", 0, (tensor("in"),), (tensor("out"),)),
    "t": ModelConfig(
        "t", "python", 0, (tensor("in", "TYPE_STRING"),), (tensor("out"),)
    ),
}


def ensemble(*steps, outputs=(("end", "TYPE_FP32"),)):
    return ModelConfig(
        "e",
        "ensemble",
        inputs=(tensor("start"),),
        outputs=tuple(tensor(*o) for o in outputs),
        steps=steps,
    )


def test_a_good_ensemble_passes():
    check_ensemble(
        ensemble(
            Step("a", {"in": "x"}, {"out": "end"}),
            Step("a", {"in": "start"}, {"out": "x"}),
        ),
        MODELS,
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ensemble(Step("q", {}, {})), "there is no model 'q'"),
        (
            ensemble(Step("a", {"of": "start"}, {"out": "end"})),
            "a has the inputs ['in'], and the step maps ['of']",
        ),
        (
            ensemble(Step("a", {"in": "start"}, {"made": "end"})),
            "a has no output 'made'",
        ),
        (
            ensemble(Step("a", {"in": "start"}, {"out": "start"})),
            "'start' is written twice",
        ),
        (
            ensemble(
                Step("a", {"in": "start"}, {"out": "end"}),
                Step("a", {"in": "x"}, {"out": "y"}),
            ),
            "the inputs of a never come",
        ),
        (
            ensemble(Step("t", {"in": "start"}, {"out": "end"})),
            "'start' is FP32, and t wants BYTES",
        ),
        (
            ensemble(
                Step("a", {"in": "start"}, {"out": "end"}), outputs=[("q", "TYPE_FP32")]
            ),
            "'q' is made by no step",
        ),
        (
            ensemble(
                Step("a", {"in": "start"}, {"out": "end"}),
                outputs=[("end", "TYPE_INT64")],
            ),
            "'end' is FP32, not INT64",
        ),
    ],
)
def test_what_cannot_work_is_told_before_the_first_request(config, told):
    with pytest.raises(ValueError) as error:
        check_ensemble(config, MODELS)
    assert told in str(error.value)


def test_no_ensemble_in_an_ensemble():
    inner = ensemble(Step("a", {"in": "start"}, {"out": "end"}))
    outer = ensemble(Step("e", {"start": "start"}, {"end": "end"}))
    with pytest.raises(ValueError, match="is an ensemble itself"):
        check_ensemble(outer, {**MODELS, "e": inner})
