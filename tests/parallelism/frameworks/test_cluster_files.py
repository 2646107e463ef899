"""The launch files add up: syntax, ranks, batches, and the models that they name."""

import json
import re
import subprocess
from math import prod
from pathlib import Path

import pytest
import yaml

from llmlab.models.presets import preset
from llmlab.parallelism import examples
from llmlab.parallelism.choosing import shapes

FOLDER = Path(examples.__file__).parent / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))


def option(text: str, name: str) -> int:
    """An integer option of a script, as in --nodes=4 or --num-layers 70."""
    (value,) = set(re.findall(rf"--{name}[= ](\d+)", text))
    return int(value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_valid_shell_and_names_its_resources(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text
    assert option(text, "nodes") >= 2 and option(text, "gpus-per-node") == 8
    if "torchrun" in text:
        assert (
            option(text, "ntasks-per-node") == 1 and option(text, "nproc-per-node") == 8
        )
        assert all(
            word in text
            for word in (
                "--rdzv-backend=c10d",
                "--rdzv-endpoint",
                '--nnodes="$SLURM_NNODES"',
            )
        )
    else:
        assert option(text, "ntasks-per-node") == 8


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_modules_of_ours_exist_with_the_options_that_are_given(script):
    text = script.read_text().replace("\\\n", " ")
    for module, rest in re.findall(r"-m (llmlab\.[\w.]+)([^\n']*)", text):
        source = (FOLDER.parents[3] / (module.replace(".", "/") + ".py")).read_text()
        for name in re.findall(r"--([\w-]+)", rest):
            assert name.replace("-", "_") in source, f"{module} has no option --{name}"


def test_bloom_is_bloom():
    """176,247,271,424 parameters, as the model card says; 384 GPUs; 2,048 sequences in
    128 microbatches.
    """
    text = (FOLDER / "megatron_deepspeed_bloom.sbatch").read_text()
    L, d, H = (
        option(text, name)
        for name in ("num-layers", "hidden-size", "num-attention-heads")
    )
    # ALiBi; a LayerNorm above the embedding
    x = shapes.gpt(L, d, H, vocab=250_880, positions=0)
    assert shapes.parameters(x) + 2 * d == 176_247_271_424
    tp, pp = (
        option(text, "tensor-model-parallel-size"),
        option(text, "pipeline-model-parallel-size"),
    )
    devices = 8 * option(text, "nodes")
    assert devices == 384 and devices // (tp * pp) == 8
    config = json.loads((FOLDER / "bloom_ds_config.json").read_text())
    assert config["train_batch_size"] == option(text, "global-batch-size") == 2048
    assert config["train_micro_batch_size_per_gpu"] == option(text, "micro-batch-size")
    assert (
        config["train_batch_size"]
        % (config["train_micro_batch_size_per_gpu"] * devices // (tp * pp))
        == 0
    )
    assert config["zero_optimization"]["stage"] == option(text, "zero-stage") == 1


def test_llama_is_llama():
    text, config = (FOLDER / "megatron_llama.sbatch").read_text(), preset("llama-2-7b")
    names = {
        "num-layers": config.num_hidden_layers,
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.intermediate_size,
        "num-attention-heads": config.num_attention_heads,
        "seq-length": config.max_position_embeddings,
    }
    assert {name: option(text, name) for name in names} == names
    dp = 8 * option(text, "nodes") // option(text, "tensor-model-parallel-size")
    assert (
        option(text, "global-batch-size") % (dp * option(text, "micro-batch-size")) == 0
    )


def test_deepspeeds_batch_is_micro_times_accumulation_times_ranks():
    config = json.loads((FOLDER / "ds_config.json").read_text())
    ranks = 8 * option((FOLDER / "deepspeed.sbatch").read_text(), "nodes")
    parts = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert config["train_batch_size"] == ranks * prod(config[name] for name in parts)
    slots = re.findall(
        r"^\S+ slots=(\d+)$", (FOLDER / "hostfile").read_text(), flags=re.M
    )
    assert sum(map(int, slots)) == ranks


def test_the_pytorchjob_is_what_the_operator_wants():
    job = yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    policy, worker = (
        job["spec"]["elasticPolicy"],
        job["spec"]["pytorchReplicaSpecs"]["Worker"],
    )
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert (
        container["name"] == "pytorch"
        and container["resources"]["limits"]["nvidia.com/gpu"] == policy["nProcPerNode"]
    )
    assert container["command"][0] == "torchrun"
    mounts, volumes = container["volumeMounts"], worker["template"]["spec"]["volumes"]
    assert {m["name"] for m in mounts} == {v["name"] for v in volumes}
    assert any(m["mountPath"] == "/dev/shm" for m in mounts)
