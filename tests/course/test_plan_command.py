"""`llmlab plan`: what was left out and why, and checkpoints known by their shape."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llmlab.course import model_shapes
from llmlab.course.cli.main import app
from llmlab.models.checkpoint import config_to_hf
from llmlab.models.presets import preset
from llmlab.parallelism.choosing import Job, machines, planner, shapes

A100 = machines.machine("a100-80gb")
PLAIN = config_to_hf(preset("mistral-7b-v0.3")) | {"model_type": "mistral"}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}


def plan(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plan", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


def job(batch: int) -> Job:
    return Job(shapes.gpt(4, 64, 4), batch=batch, seq=64, machine=A100)


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(PLAIN | changes), encoding="utf-8")
    return path


def test_splits_that_do_not_divide_the_batch_are_counted():
    # tp 1: dp 6, 3, 2; tp 2: dp 3, 1; tp 3: dp 2, 1
    assert planner.uneven(job(16), 6) == planner.Uneven(3, 7, 18)
    assert planner.uneven(job(12), 6) == planner.Uneven(0, 7, None)


def test_no_batch_that_is_near_is_better():
    assert planner.uneven(job(8), 6) == planner.Uneven(3, 7, None)


def test_every_split_is_planned_or_left_out():
    some = job(8)
    splits = set(planner.splits_of(some, 6))
    planned = {(p.dp, p.tp, p.pp, p.cp, p.ep) for p in planner.candidates(some, 6)}
    assert len(splits) - len(planned) == planner.uneven(some, 6).left_out


def test_the_command_says_how_many_and_what_to_try():
    code, text = plan("gpt3-175b", "--devices", 1008)
    assert code == 1
    assert "dp does not divide the batch of 1024: try --batch 1008" in text
    assert "were left out" not in plan("llama-2-7b", "--devices", 8)[1]


def test_the_legend_explains_the_columns():
    text = plan("llama-2-7b", "--devices", 8)[1]
    for word in ("b: sequences of a microbatch", "v: pieces", "sp: sequence", "cp"):
        assert word in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_parameters": YARN}, "positions of type yarn"),
        ({"rope_scaling": {"type": "dynamic"}}, "positions of type dynamic"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights (gptq)"),
    ],
)
def test_what_cannot_be_loaded_can_be_planned(changes, told, tmp_path):
    plain = plan(config(tmp_path), "--devices", 8, "--batch", 64, "--json", "-")
    path = config(tmp_path, **changes)
    code, text = plan(path, "--devices", 8, "--batch", 64)
    assert code == 0 and told in text and "by the shape alone" in text
    code, text = plan(tmp_path, "--devices", 8, "--batch", 64, "--json", "-")
    assert json.loads(text)["plans"] == json.loads(plain[1])["plans"]
    assert told in json.loads(text)["left_out"][0]


def test_a_plain_checkpoint_leaves_nothing_out(tmp_path):
    assert model_shapes.from_file(config(tmp_path)).left_out == ()
    llama3 = config_to_hf(preset("llama-3.1-8b"))
    assert model_shapes.shape_alone(llama3) == (llama3 | {"sliding_window": None}, ())


def test_near_names_and_empty_folders(tmp_path):
    code, text = plan("Llama-2-70", "--devices", 8)
    assert code == 2 and "Did you mean llama-2-70b" in text
    code, text = plan(tmp_path, "--devices", 8)
    assert code == 2 and "is a folder without a config.json" in text
