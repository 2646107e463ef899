"""A split keeps what is frozen, trains the rest as one process does, and refuses what
it would cut wrong; a pipeline under autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlab.models.llama import Llama, LlamaConfig
from llmlab.parallelism import World, sequence, tensor
from llmlab.parallelism.data_parallel import DataParallel
from llmlab.parallelism.hybrid.hybrid import Hybrid
from llmlab.parallelism.hybrid.placement import Placement
from llmlab.parallelism.moe import ExpertParallelMoE, MoE, MoEConfig
from llmlab.parallelism.pipeline import Pipeline, split
from llmlab.parallelism.pipeline.schedules import gpipe, one_f_one_b, zb_h1
from llmlab.peft import qlora
from llmlab.peft.lora import lora

FROZEN = {
    "embedding and MLPs": ("embed_tokens", "mlp"),
    "the first block and what is before it": ("embed_tokens", "layers.0"),
    "norms": ("norm",),
    "all but the last block": ("embed", "layers.0", "layers.1", "lm_head", "l.norm"),
}
every_kind = pytest.mark.parametrize("parts", FROZEN.values(), ids=FROZEN.keys())


def make(parts=(), tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=True,
        initializer_range=0.2,
    )
    model = Llama(config).double()
    for name, w in model.named_parameters():
        w.requires_grad_(not any(part in name for part in parts))
    return model


def batch(n=1):
    dice = torch.Generator().manual_seed(4)
    rows = [torch.randint(37, (2, 9), generator=dice) for _ in range(n)]
    return [(x[:, :-1], x[:, 1:]) for x in rows]


def whole(model, batches):
    """(loss, name → gradient) of one process."""
    model.zero_grad()
    each = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in batches]
    loss = torch.stack(each).mean()
    loss.backward()
    return loss.item(), {n: w.grad for n, w in model.named_parameters()}


def flags(model):
    return {n: w.requires_grad for n, w in model.named_parameters()}


@every_kind
@pytest.mark.parametrize("room", [tensor, sequence], ids=["tensor", "sequence"])
def test_tensor_and_sequence(room, parts):
    model = make(parts)
    ((x, y),) = batch()

    def fn(comm):
        part = room.parallelize(make(parts), comm)
        logits = part(x)
        loss = tensor.vocab_parallel_cross_entropy(
            logits, y, comm, vocab_size=model.config.vocab_size
        )
        loss.backward()
        if room is sequence:
            sequence.sum_replicated_gradients(part, comm)
        kept = {n for n, w in part.named_parameters() if not w.requires_grad}
        got = {n: w.grad for n, w in part.named_parameters()}
        return loss.item(), kept, got

    loss, gradients = whole(model, [(x, y)])
    frozen = {n for n, trains in flags(model).items() if not trains}
    for mine, kept, got in World(2).run(fn):
        assert mine == pytest.approx(loss)
        assert len(kept) == len(frozen)
        for name, gradient in got.items():
            if name in gradients:  # sequence parallelism wraps the blocks
                assert (gradient is None) == (gradients[name] is None)
                if gradient is not None and gradient.shape == gradients[name].shape:
                    torch.testing.assert_close(gradient, gradients[name])


@every_kind
@pytest.mark.parametrize("tied", [False, True])
def test_hybrid(parts, tied):
    batches = batch(2)
    loss, gradients = whole(make(parts, tied), batches)

    def fn(comm):
        sizes = {"pp": 2, "dp": 1, "tp": 2}
        job = Hybrid(make(parts, tied), comm, Placement(sizes))
        mine = job.step(one_f_one_b(2, 2), batches)
        job.clip_grad_norm(1e9)
        return mine, {n: (w.requires_grad, w.grad) for n, w in job.named_parameters()}

    trained = flags(make(parts, tied))
    for mine, got in World(4).run(fn):
        assert mine == pytest.approx(loss)
        for place, (trains, gradient) in got.items():
            head = tied and place == "lm_head.weight"  # the last stage's own copy
            name = "model.embed_tokens.weight" if head else place
            assert trains == trained[name] and (gradient is not None) == trains
            if trains and gradient.shape == gradients[name].shape:
                torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("frozen", ["gate", "experts"])
def test_experts(frozen):
    torch.manual_seed(0)
    moe = MoE(MoEConfig(experts=4, top_k=2), 8, 16)
    getattr(moe, frozen).requires_grad_(False)
    for trains in World(2).run(lambda comm: flags(ExpertParallelMoE(moe, comm))):
        assert trains == flags(moe)


@pytest.mark.parametrize("room", [tensor, sequence], ids=["tensor", "sequence"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: lora.apply(m, lora.LoRAConfig()), "q_proj is a LoRALinear"),
        (
            lambda m: qlora.quantize(m, qlora.QLoRAConfig(block=32)),
            "only floats can be cut",
        ),
    ],
    ids=["an adapter", "4 bits"],
)
def test_what_cannot_be_cut_is_named_and_left_alone(room, change, message):
    def fn(comm):
        model = change(make().float())
        before = list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            room.parallelize(model, comm)
        return before == list(model.state_dict())

    assert World(2).run(fn) == [True, True]


@pytest.mark.parametrize("room", [tensor, sequence], ids=["tensor", "sequence"])
def test_an_adapter_on_a_split_matrix_is_named(room):
    """Its A would be whole on every rank, with a part of the gradient on each."""

    def fn(comm):
        model = room.parallelize(make(), comm)
        model(batch()[0][0])
        lora.apply(model, lora.LoRAConfig(target_modules=("q_proj",)))
        with pytest.raises(ValueError, match=r"q_proj.weight is not where the split"):
            model(batch()[0][0])
        return True

    assert World(2).run(fn) == [True, True]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_adapters_under_hybrid_are_named_before_and_after(sizes):
    placement = Placement(dict(zip(("pp", "dp", "tp"), sizes, strict=True)))

    def fn(comm):
        with pytest.raises(ValueError, match="q_proj is a LoRALinear"):
            Hybrid(lora.apply(make(), lora.LoRAConfig()), comm, placement)
        job = Hybrid(make(), comm, placement)
        for stage in job.pipe.stages:
            for block in stage.model.layers.values():
                block.self_attn.q_proj = lora.LoRALinear(block.self_attn.q_proj)
        job.step(one_f_one_b(sizes[0], 1), batch())

    with pytest.raises(ValueError, match=r"q_proj.base.weight came after the split"):
        World(2).run(fn)


def under_lora():
    model = make().float()
    torch.manual_seed(3)
    lora.apply(model, lora.LoRAConfig(r=3, target_modules=("v_proj", "down_proj")))
    for name, w in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(w, std=0.2)
    return model.double()


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, zb_h1])
def test_a_pipeline_of_a_model_under_lora(schedule):
    batches = batch(2)
    loss, gradients = whole(under_lora(), batches)

    def fn(comm):
        pipe = Pipeline(split(under_lora(), comm.rank, comm.size), comm)
        mine = pipe.step(schedule(2, 2), batches)
        return mine, {n: w.grad for s in pipe.stages for n, w in s.named_parameters()}

    for mine, got in World(2).run(fn):
        assert mine == pytest.approx(loss)
        for name, gradient in got.items():
            assert (gradient is None) == (gradients[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("start", [make, under_lora], ids=["part", "LoRA"])
def test_data_parallel(start):
    """The mean over ranks of what trains; what is frozen is sent once, at the start."""
    batches = batch(2)

    def model_of():
        return start(("embed", "mlp")) if start is make else start()

    _, gradients = whole(model_of(), batches)

    def fn(comm):
        model = model_of()
        with torch.no_grad():
            for w in model.parameters():
                w.add_(comm.rank)  # rank 0's weights count
        ddp = DataParallel(model, comm)
        comm.barrier()
        before = comm.ledger.bytes("all_reduce", comm.rank)
        x, y = batches[comm.rank]
        F.cross_entropy(ddp(x).flatten(0, 1), y.flatten()).backward()
        ddp.finish()
        sent = comm.ledger.bytes("all_reduce", comm.rank) - before
        return sent, {n: w.grad for n, w in model.named_parameters()}

    trained = sum(w.numel() for w in model_of().parameters() if w.requires_grad)
    for sent, got in World(2).run(fn):
        assert sent == pytest.approx(8 * trained, rel=0.01)  # fp64, 2(p−1)/p = 1
        for name, gradient in got.items():
            assert (gradient is None) == (gradients[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: lora.apply(m, lora.LoRAConfig()),
        lambda m: m.model.norm.weight.requires_grad_(False),
        lambda m: m.model.embed_tokens.weight.requires_grad_(True),
    ],
    ids=["an adapter", "frozen", "set free"],
)
def test_a_change_after_data_parallel_is_named(change):
    def fn(comm):
        ddp = DataParallel(make(("embed",)).float(), comm)
        change(ddp.module)
        with torch.no_grad():
            ddp(batch()[0][0])
        with pytest.raises(ValueError, match="after DataParallel was made"):
            ddp(batch()[0][0])
        return True

    assert World(2).run(fn) == [True, True]


@pytest.mark.parametrize("schedule", [gpipe, zb_h1])
def test_a_pipeline_under_autocast(schedule):
    batches = batch(2)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        loss, gradients = whole(make().float(), batches)

    def fn(comm):
        pipe = Pipeline(split(make().float(), comm.rank, comm.size), comm)
        with autocast():
            mine = pipe.step(schedule(2, 2), batches)
        return mine, {n: w.grad for s in pipe.stages for n, w in s.named_parameters()}

    for mine, got in World(2).run(fn):
        assert mine == pytest.approx(loss, rel=1e-2)
        for name, gradient in got.items():
            assert gradient.dtype == torch.float32
            off = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert off < 0.03, name


def test_the_frozen_stay_after_a_step_of_everything_that_trains():
    def fn(comm):
        model = tensor.parallelize(make(("mlp",)), comm)
        before = {n: w.detach().clone() for n, w in model.named_parameters()}
        ((x, y),) = batch()
        tensor.vocab_parallel_cross_entropy(model(x), y, comm, vocab_size=37).backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        moved = {n for n, w in model.named_parameters() if not w.equal(before[n])}
        return {"mlp" in n for n in moved}, isinstance(model, nn.Module)

    assert World(2).run(fn) == [({False}, True)] * 2
