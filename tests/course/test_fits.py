"""`llmlab fits`: what a model needs on this machine."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llmlab.course import fits
from llmlab.course.cli.fits import duration
from llmlab.course.cli.main import app
from llmlab.models import accounting
from llmlab.models.checkpoint import config_to_hf
from llmlab.models.llama import Llama
from llmlab.models.presets import preset
from llmlab.peft import qlora
from llmlab.peft.qlora import QLoRAConfig

LLAMA = preset("llama-2-7b")
FAST_BF16 = fits.Speed(flops_bf16=4e11, flops_fp32=1e11, bandwidth=1e10)
PLAIN = fits.Speed(flops_bf16=1e9, flops_fp32=1e11, bandwidth=1e10)


def needs(speed=FAST_BF16, config=LLAMA, batch=1, seq=512, rank=16):
    return {n.use: n for n in fits.needs(config, batch, seq, rank, speed)}


@pytest.fixture
def command(monkeypatch):
    """The command on a machine of 16 GB whose speed is known."""
    monkeypatch.setattr(fits, "memory_free", lambda: 16e9)
    monkeypatch.setattr(fits, "calibrate", lambda: FAST_BF16)

    def run(*words):
        done = CliRunner().invoke(app, ["fits", *map(str, words)])
        return done.exit_code, done.stdout, " ".join(done.output.split())

    return run


def test_memory_is_the_packages_own_count():
    n = accounting.parameters(LLAMA)
    found = needs()
    cache = accounting.kv_cache_bytes(LLAMA, 1, 512)
    assert found["inference"].bytes == 2 * n + cache
    plan = qlora.memory_plan(LLAMA, QLoRAConfig(r=16), 1, 512)
    assert found["QLoRA"].bytes == sum(plan.values())
    full = found["full fine-tuning"]
    assert full.bytes == 16 * n + plan["activations"]
    adapters = plan["adapters"] + plan["gradients"] + plan["optimizer"]
    assert found["LoRA"].bytes == 2 * n + adapters + plan["activations"]


def test_a_small_model_holds_what_is_counted():
    """Weights that were really made, in fp32 and in NF4."""
    tiny = preset("course")
    found = needs(PLAIN, tiny)
    model = Llama(tiny)
    assert found["inference"].parts["weights"] == sum(
        p.numel() * p.element_size() for p in model.parameters()
    )
    qlora.apply(model, QLoRAConfig(r=16))
    held = qlora.qlora.nbytes(model)
    parts = found["QLoRA"].parts
    assert held["codes"] == parts["4-bit codes"]
    assert held["scales"] == parts["scales"]
    assert held["trained"] == parts["adapters"]


def test_numbers_are_four_bytes_where_bf16_is_slow():
    assert (FAST_BF16.width, PLAIN.width) == (2, 4)
    assert (FAST_BF16.flops, PLAIN.flops) == (4e11, 1e11)
    narrow, wide = needs(FAST_BF16), needs(PLAIN)
    assert wide["inference"].bytes == 2 * narrow["inference"].bytes
    for kind in ("4-bit codes", "scales", "optimizer"):
        assert wide["QLoRA"].parts[kind] == narrow["QLoRA"].parts[kind]
    for kind in ("other weights", "adapters", "gradients", "activations"):
        assert wide["QLoRA"].parts[kind] == 2 * narrow["QLoRA"].parts[kind]
    full = "full fine-tuning"
    assert wide[full].parts["momentum"] == narrow[full].parts["momentum"]


def test_times_are_flops_or_bytes_over_the_speed():
    found = needs()
    forward = accounting.forward_flops(LLAMA, 1, 512)
    assert found["full fine-tuning"].seconds == pytest.approx(4 * forward / 4e11)
    assert found["LoRA"].seconds == pytest.approx(3 * forward / 4e11)
    # a token reads all weights: 13.7 GB at 10 GB/s, longer than its FLOPs take
    inference = found["inference"]
    assert inference.seconds == pytest.approx(inference.bytes / 1e10)
    assert needs(batch=2)["LoRA"].seconds == pytest.approx(2 * found["LoRA"].seconds)


def test_the_calibration_measures_within_its_time():
    speed = fits.calibrate(0.3)
    assert min(speed.flops_bf16, speed.flops_fp32, speed.bandwidth) > 1e6
    assert speed.bandwidth < 1e13


def test_a_slow_run_is_not_believed(monkeypatch):
    clock = iter([0.0, 0.0, 5.0, 5.0, 5.5, 6.0, 9.0, 99.0])
    monkeypatch.setattr(fits.time, "perf_counter", lambda: next(clock))
    assert fits.fastest(lambda: None, 0.0) == 0.5


def test_the_command_says_what_fits(command):
    code, _, text = command("llama-2-7b")
    assert code == 0
    assert "6.74 B parameters; 16.0 GB of memory can be had here" in text
    assert "Counted in bf16" in text and "estimates" in text
    assert "× too large" in text and " yes " in text


def test_the_command_for_machines(command):
    code, out, _ = command("llama-2-7b", "--json", "-", "--seq", 2048)
    data = json.loads(out)
    assert (code, data["seq"], data["free_bytes"]) == (0, 2048, 16e9)
    fit = {use["use"]: use["fits"] for use in data["uses"]}
    assert fit["QLoRA"] and not fit["full fine-tuning"]


def test_a_folder_and_a_checkpoint_that_cannot_be_loaded(command, tmp_path):
    raw = config_to_hf(preset("llama-2-7b")) | {"sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    code, _, text = command(tmp_path)
    assert code == 0 and "6.74 B" in text and "without: sliding_window=4096" in text


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("smolm2-135m", "Did you mean smollm2-135m"),
        ("nothing-like-it", "is not known. Use a name"),
        ("{folder}", "is a folder without a config.json"),
        ("{mixture}", "has 8 experts in each layer"),
    ],
)
def test_what_cannot_be_counted_is_told(command, tmp_path, model, told):
    raw = config_to_hf(preset("mistral-7b-v0.3")) | {"model_type": "mixtral"}
    raw |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps(raw))
    code, _, text = command(model.format(folder=tmp_path, mixture=mixture))
    assert code == 2 and told in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0204, "20 ms"), (3.14, "3.1 s"), (720, "12 min"), (18720, "5.2 h")],
)
def test_durations_have_two_digits(seconds, text):
    assert duration(seconds) == text


def test_free_memory_is_less_than_what_there_is():
    import psutil

    assert 0 <= fits.memory_free() < psutil.virtual_memory().total
