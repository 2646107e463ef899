"""The search: complete, ranked, honest about what it rejects; and the command that
prints it.
"""

import json
from math import prod

import pytest
from typer.testing import CliRunner

from llmlab.course.cli.main import app
from llmlab.models.presets import preset
from llmlab.parallelism.choosing import machines, planner, shapes
from llmlab.parallelism.choosing.plan import Job, Plan
from llmlab.parallelism.published import MEGATRON, STEPS, predicted_step, predicted_tera

A100 = machines.machine("a100-80gb")
SMALL = Job(shapes.gpt(12, 768, 12), 48, 512, A100)


@pytest.mark.parametrize("devices", [1, 3, 6, 8, 12])
def test_every_candidate_uses_all_devices_and_the_ranking_is_by_time(devices):
    plans = list(planner.candidates(SMALL, devices))
    assert len(set(plans)) == len(plans)
    assert all(prod((p.dp, p.tp, p.pp, p.cp)) == devices for p in plans)
    found = planner.search(SMALL, devices)
    assert len(found.ranked) + len(found.rejected) == len(plans)
    steps = [e.step for e in found.ranked]
    assert steps and steps == sorted(steps)
    assert all(e.bytes <= A100.memory and not e.problems for e in found.ranked)
    assert all(e.problems for e in found.rejected)


def test_the_best_of_each_split_is_the_first_of_it():
    found = planner.search(SMALL, 12)
    splits = found.splits()
    keys = [(e.plan.dp, e.plan.tp, e.plan.pp, e.plan.cp, e.plan.ep) for e in splits]
    assert len(set(keys)) == len(keys) and splits[0] is found.ranked[0]


def test_a_hand_made_plan_is_never_better_than_the_search():
    best = planner.search(SMALL, 8).ranked[0].step
    for plan in (
        Plan(dp=8),
        Plan(dp=4, tp=2),
        Plan(dp=2, tp=2, pp=2),
        Plan(tp=4, pp=2, sequence=True),
    ):
        assert planner.estimate(SMALL, plan).step >= best


def test_nothing_fits_is_said_with_the_nearest_miss():
    job = Job(
        shapes.llama(preset("llama-2-7b")), 64, 2048, machines.machine("v100-32gb")
    )
    found = planner.search(job, 2)
    assert not found.ranked
    sizes = [e.bytes for e in found.rejected if e.memory]
    assert sizes[0] == min(sizes) and found.rejected[0].problems[0].startswith("needs ")
    assert found.reasons()["too large for a device"] == len(found.rejected)


@pytest.mark.parametrize(("devices", "why"), [(0, "devices=0"), (2.0, "devices=2.0")])
def test_devices_must_be_a_number(devices, why):
    with pytest.raises(ValueError, match=why):
        planner.search(SMALL, devices)


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[0]}x{row[1]}")
def test_megatrons_table_is_predicted_within_a_tenth(row):
    """One number was fitted, to a step of another paper."""
    assert predicted_tera(*row[:-1]) == pytest.approx(row[-1], rel=0.1)


@pytest.mark.parametrize("name", STEPS)
def test_korthikantis_steps_are_predicted_within_16_percent(name):
    for recompute, measured in STEPS[name].items():
        assert predicted_step(name, recompute) == pytest.approx(measured, rel=0.16)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_a_ranked_table_and_why_others_fail():
    result = run(
        "gpt:12,768,12",
        "--devices",
        "8",
        "--batch",
        "48",
        "--seq",
        "512",
        "--price",
        "2",
        "--top",
        "3",
    )
    assert result.exit_code == 0
    assert "MFU" in result.output and "$" in result.output and "cannot" in result.output


def test_the_command_writes_json(tmp_path):
    result = run("llama-2-7b", "--devices", "8", "--batch", "64", "--json", "-")
    data = json.loads(result.output)
    assert result.exit_code == 0
    best = data["plans"][0]
    assert (
        best["dp"] * best["tp"] * best["pp"] * best["cp"] == 8
        and 0 < best["mfu"] < 1
        and best["days"] > 0
    )
    config = tmp_path / "config.json"
    from llmlab.models.checkpoint import config_to_hf

    config.write_text(json.dumps(config_to_hf(preset("llama-2-7b"))))
    assert (
        json.loads(
            run(str(config), "--devices", "8", "--batch", "64", "--json", "-").output
        )["plans"][0]
        == best
    )


def test_the_command_reads_a_mixtrals_config(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(
        sliding_window=None, num_local_experts=8, num_experts_per_tok=2
    ).save_pretrained(tmp_path)
    arguments = ("--devices", "16", "--batch", "64", "--json", "-")
    file, name = (
        json.loads(run(model, *arguments).output)
        for model in (str(tmp_path / "config.json"), "mixtral-8x7b")
    )
    assert (
        file["plans"] == name["plans"] and max(plan["ep"] for plan in file["plans"]) > 1
    )
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    result = run(str(tmp_path / "config.json"), *arguments)
    assert (
        result.exit_code == 2
        and "is not the config.json of a Llama or a Mixtral"
        in result.output.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ("gpt:3,100,7", "--devices", "8"),
            2,
            "hidden=100 must be a multiple of heads=7",
        ),
        (("nothing", "--devices", "8"), 2, "MODEL='nothing' is not known"),
        (("gpt:1,2", "--devices", "8"), 2, "gpt:LAYERS,HIDDEN,HEADS"),
        (("gpt:²,12288,96", "--devices", "8"), 2, "gpt:LAYERS,HIDDEN,HEADS"),
        (
            ("llama-2-7b", "--devices", "8", "--tokens", "inf"),
            2,
            "--tokens inf must be a finite number",
        ),
        (
            ("llama-2-7b", "--devices", "8", "--machine", "abacus"),
            2,
            "use one of v100-32gb",
        ),
        (
            ("llama-2-7b", "--devices", "1", "--machine", "v100-32gb"),
            1,
            "No plan can run. The nearest miss: needs",
        ),
    ],
)
def test_the_command_says_what_is_wrong(arguments, code, says):
    result = run(*arguments)
    assert result.exit_code == code and says in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "it holds a list, not settings by name"),
        ("{half", "is not the config.json of a Llama"),
        ('{"model_type": "gpt2"}', "model_type='gpt2' is not supported"),
        ('{"model_type": "mixtral"}', "is not the config.json of a Llama"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_file(text, says, tmp_path):
    (tmp_path / "config.json").write_text(text)
    result = run(str(tmp_path / "config.json"), "--devices", "8")
    assert result.exit_code == 2 and says in " ".join(result.output.split()).replace(
        "- ", "-"
    )
