"""The planner's arithmetic: shapes against our models, memory against ZeRO's and
Megatron's tables, time against itself.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.models import accounting
from llmlab.models.llama import Llama, LlamaConfig
from llmlab.models.presets import PRESETS, preset
from llmlab.parallelism.choosing import machines, planner, shapes
from llmlab.parallelism.choosing.memory import in_flight, memory, stage_parameters
from llmlab.parallelism.choosing.plan import Job, Plan, microbatches, misfits
from llmlab.parallelism.choosing.time import seconds
from llmlab.parallelism.hybrid.placement import Placement
from llmlab.parallelism.published import SETUPS, SHAPES

A100 = machines.machine("a100-80gb")
GPT3 = Job(shapes.gpt(96, 12288, 96), 1536, 2048, A100)


@pytest.mark.parametrize("name", PRESETS)
def test_a_llamas_parameters_and_flops_are_those_of_the_model(name):
    x, config = shapes.llama(preset(name)), preset(name)
    assert shapes.parameters(x) == accounting.parameters(config)
    assert shapes.token_flops(x, 96) * 96 == pytest.approx(
        accounting.training_flops(config, 1, 96), rel=1e-12
    )


@pytest.mark.parametrize(
    ("L", "d", "V", "s"),
    [(24, 2304, 51_200, 2048), (96, 12288, 51_200, 1024), (7, 96, 1000, 77)],
)
def test_gpt_parameters_and_flops_are_the_papers_formulas(L, d, V, s):
    x = shapes.gpt(L, d, d // 96, V, s)
    assert shapes.parameters(x) == pytest.approx(
        12 * L * d**2 * (1 + 13 / (12 * d) + (V + s) / (12 * L * d)) + 2 * d
    )
    assert shapes.token_flops(x, s) == pytest.approx(
        72 * L * d**2 * (1 + s / (6 * d) + V / (12 * L * d))
    )


def test_a_mixture_counts_all_experts_and_works_with_some():
    # Mixtral 8x7B
    x = shapes.Shape(
        32, 4096, 32, 32_000, 14_336, 8, 128, "llama", tied=False, experts=8, top_k=2
    )
    assert shapes.parameters(x) == 46_702_792_704  # the checkpoint's own count
    dense = replace(x, experts=0, ffn=2 * 14_336)
    router = 2 * 8 * 4096
    assert shapes.layer_flops(x, 100) == pytest.approx(
        (shapes.layer_flops(dense, 100)[0] + router, 4.0 * 4096 * 100)
    )
    assert (
        shapes.active_parameters(x) == shapes.parameters(dense) + 32 * 8 * 4096
        and x == shapes.MIXTURES["mixtral-8x7b"]
    )


@pytest.mark.parametrize("name", shapes.MIXTURES)
def test_mixtures_are_transformers(name):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    x = shapes.MIXTURES[name]
    with torch.device("meta"):
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=x.vocab,
                hidden_size=x.hidden,
                intermediate_size=x.ffn,
                num_hidden_layers=x.layers,
                num_attention_heads=x.heads,
                num_key_value_heads=x.kv_heads,
                num_local_experts=x.experts,
                num_experts_per_tok=x.top_k,
            )
        )
    assert shapes.parameters(x) == sum(p.numel() for p in model.parameters())


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden=100 must be a multiple of heads=7"):
        shapes.gpt(3, 100, 7)


@pytest.mark.parametrize(
    ("kv", "ffn", "batch", "seq"), [(2, 160, 2, 96), (8, 88, 1, 33)]
)
def test_llama_activations_are_what_a_layer_saves(kv, ffn, batch, seq):
    """Plain PyTorch keeps more than fused kernels: both norms' input in fp32 and their
    quotient, and silu(gate).
    """
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=64,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv,
    )
    one, two = (
        _saved(replace(config, num_hidden_layers=n), batch, seq) for n in (1, 2)
    )
    # the last: log-sum-exp a head, two norms' means
    plain = 2 * (4 * 64 + 2 * 64) - 2 * 2 * 64 + 2 * ffn + 4 * 8 + 8
    fused = shapes.layer_activations(shapes.llama(config), seq, batch)
    assert two - one == fused + batch * seq * plain


def _saved(config: LlamaConfig, batch: int, seq: int) -> int:
    model, kept = Llama(config).bfloat16(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randint(31, (batch, seq)))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("sequence", [False, True])
def test_gpt_activations_are_table_2_of_korthikanti(t, sequence):
    s, b, a, h = 2048, 3, 96, 12288
    x = shapes.gpt(96, h, a)
    whole = t if sequence else 1
    expected = s * b * h * (10 / whole + 24 / t + 5 * a * s / (h * t))
    assert shapes.layer_activations(x, s, b, t, sequence) == pytest.approx(expected)
    assert shapes.layer_activations(x, s, b, t, sequence, "selective") == pytest.approx(
        s * b * h * (10 / whole + 24 / t)
    )
    assert (
        shapes.layer_activations(x, s, b, t, sequence, "full") == 2 * s * b * h / whole
    )
    with pytest.raises(ValueError, match="recompute='some' must be one of"):
        shapes.layer_activations(x, s, b, t, sequence, "some")


def test_memory_is_zeros_figure_1():
    """7.5B parameters on 64 devices: 120, 31.4, 16.6 and 1.9 GB."""
    x = shapes.gpt(36, 4096, 32)
    psi = shapes.parameters(x)
    for stage, each in ((0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 16 / 64)):
        held = memory(Job(x, 64, 2048, A100), Plan(dp=64, zero=stage, grad_bytes=2))
        assert sum(
            held[kind] for kind in ("weights", "gradients", "optimizer")
        ) == pytest.approx(each * psi)


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_stages_together_hold_the_model(pp, tp):
    """Uncut but for the norms and positions; a tied embedding stands on the first and
    on the last stage.
    """
    x = shapes.gpt(12, 192, 4, vocab=1000)
    held = sum(stage_parameters(x, Plan(tp=tp, pp=pp), r)[0] for r in range(pp))
    whole = 12 * shapes.replicated_parameters(x) + 2 * 192 + 2048 * 192
    copies = (pp > 1) * 1000 * 192 / tp
    assert held == pytest.approx((shapes.parameters(x) - whole) / tp + whole + copies)


def test_experts_are_cut_by_ep():
    x = shapes.Shape(4, 64, 4, 100, 96, family="llama", experts=6, top_k=2)
    shared, experts = stage_parameters(x, Plan(dp=6, ep=3), 0)
    assert experts == 4 * 2 * shapes.mlp_parameters(x)
    assert shared + 3 * experts == shapes.parameters(x)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 2), (1, 5), (6, 6)])
def test_in_flight_under_1f1b(p, m):
    assert [in_flight(Plan(pp=p), r, m) for r in range(p)] == [
        min(p - r, m) for r in range(p)
    ]


def test_in_flight_interleaved_is_korthikantis_factor():
    p, v = 8, 3  # "a factor of 1 + (p − 1)/(pv)" of the first stage's p microbatches
    assert in_flight(Plan(pp=p, chunks=v), 0, 64) == pytest.approx(
        p * (1 + (p - 1) / (p * v))
    )


def test_the_bubble_and_the_scale_of_a_step():
    base = seconds(GPT3, Plan(dp=16, tp=8, pp=8, microbatch=1))
    m = microbatches(GPT3, Plan(dp=16, tp=8, pp=8))
    work = sum(base[k] for k in ("products", "elementwise", "tensor", "context"))
    assert m == 96 and base["bubble"] == pytest.approx(7 / m * work)
    halved = seconds(GPT3, Plan(dp=16, tp=8, pp=8, chunks=2))
    assert halved["bubble"] == pytest.approx(base["bubble"] / 2)
    assert halved["pipeline"] == pytest.approx(2 * base["pipeline"])
    full = seconds(GPT3, Plan(dp=16, tp=8, pp=8, recompute="full", sequence=True))
    more = seconds(GPT3, Plan(dp=16, tp=8, pp=8, recompute="none", sequence=True))
    assert full["tensor"] == pytest.approx(1.5 * more["tensor"])
    layers_only = 4 / 3 - 1e-2  # the output layer is not computed again
    assert layers_only < full["products"] / more["products"] < 4 / 3


def test_tensor_parallelism_across_nodes_is_slow():
    inside, across = (
        seconds(GPT3, Plan(dp=128 // t * 8, tp=t))["tensor"] for t in (8, 16)
    )
    assert across > 5 * inside


@pytest.mark.parametrize("name", SETUPS)
def test_published_setups_fit_as_they_were_run_and_not_without_recomputation(name):
    t, p, v, n, batch, b = SETUPS[name]
    job = Job(shapes.gpt(*SHAPES[name]), batch, 2048, A100)
    plan = Plan(
        n // t // p, t, p, microbatch=b, chunks=v, recompute="selective", sequence=True
    )
    assert not planner.estimate(job, plan).problems
    (problem,) = planner.estimate(
        job, replace(plan, recompute="none", sequence=False)
    ).problems
    assert problem.startswith("needs ") and "most of it activations" in problem


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (Plan(dp=16, tp=5), "96 attention heads are not a multiple of tp = 5"),
        (Plan(pp=36), "96 layers are not a multiple of pp"),
        (Plan(pp=24, chunks=3), "96 layers are not a multiple of pp · chunks = 72"),
        (Plan(dp=5), "1536 sequences of the batch are not a multiple of dp"),
        (Plan(dp=2, sequence=True), "sequence parallelism cuts along tp, which is 1"),
        (
            Plan(dp=512, pp=2, chunks=2),
            "interleaved microbatches come in multiples of pp = 2",
        ),
        (Plan(dp=4, pp=2, zero=3), "ZeRO-2 and 3 with a pipeline"),
        (Plan(dp=4, ep=2), "ep > 1 needs experts"),
        (
            Plan(tp=3, sequence=True),
            "2048 tokens of a sequence are not a multiple of tp · cp = 3",
        ),
        (Plan(cp=3), "2048 tokens of a sequence are not a multiple of 2 · cp"),
    ],
)
def test_what_does_not_divide_is_named(plan, why):
    assert any(why in problem for problem in misfits(GPT3, plan))


def test_key_value_heads_limit_tp():
    job = Job(shapes.llama(preset("llama-2-70b")), 64, 4096, A100)
    assert "8 key/value heads are fewer than tp = 16" in misfits(job, Plan(tp=16))
    six = Job(
        shapes.Shape(4, 96, 12, 100, 96, kv_heads=6, family="llama"), 64, 4096, A100
    )
    assert "6 key/value heads are not a multiple of tp = 4" in misfits(
        six, Plan(tp=4)
    ) and not misfits(six, Plan(tp=3))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tp": 0}, "tp=0"),
        ({"zero": 4}, "zero=4"),
        ({"recompute": "x"}, "recompute='x'"),
        ({"chunks": -1}, "chunks=-1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        Plan(**settings)


def test_machines_by_name():
    assert machines.machine("h100-80gb", network=1e9).network == 1e9
    with pytest.raises(
        ValueError, match="name='tpu' is not a known machine: use one of v100-32gb"
    ):
        machines.machine("tpu")
    with pytest.raises(ValueError, match="efficiency=2 must be"):
        machines.machine("h100-80gb", efficiency=2)
    assert A100.wire(8).bandwidth == 300e9 and A100.wire(9).bandwidth == 25e9


@pytest.mark.parametrize("node", [4, 6, 8])
@pytest.mark.parametrize("devices", [6, 12, 24])
def test_groups_that_straddle_two_nodes_are_slow(node, devices):
    """Threes in nodes of eight: the third has devices 6, 7 | 8. Held against the
    placement, device by device.
    """
    on = replace(A100, node=node)
    for span in (n for n in range(1, devices + 1) if devices % n == 0):
        nodes = Placement({"outer": devices // span, "inner": span}).nodes(
            "inner", node
        )
        assert on.wire(span, devices).bandwidth == (300e9 if nodes == 1 else 25e9), (
            span,
            nodes,
        )
    took = [
        seconds(
            Job(shapes.gpt(4, 96, 12), 24, 1024, replace(on, node=n)),
            Plan(devices // 3, tp=3),
        )["tensor"]
        for n in (node, 24)
    ]
    assert (took[0] > took[1]) == (node % 3 > 0 and devices > node)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
)
def test_mfu_never_passes_the_efficiency(dp, tp, pp):
    job = Job(shapes.gpt(8, 512, 8, vocab=1024), 64, 512, A100)
    e = planner.estimate(job, Plan(dp, tp, pp))
    assert 0 < e.mfu < A100.efficiency
    assert e.step == pytest.approx(sum(seconds(job, Plan(dp, tp, pp)).values()))
