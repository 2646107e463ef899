"""What PyTorch, Paddle and MindSpore do when nothing is said.

The table is llmlab/chips/ascend_and_other_accelerators/data/defaults.csv.

Four steps, each in its own environment, from the repository's root:

    python scripts/golden/port_defaults_goldens.py torch FOLDER
    PADDLE/bin/python scripts/golden/port_defaults_goldens.py paddle FOLDER
    MINDSPORE/bin/python scripts/golden/port_defaults_goldens.py mindspore FOLDER
    python scripts/golden/port_defaults_goldens.py table FOLDER

(paddlepaddle 3.3.1 and paddleformers 1.2.0; mindspore 2.10.0, numpy<2; an x86 CPU.)
Each of the first three answers the same questions. The last puts them side by side, and
takes some of the defaults into the block of port_inputs.safetensors, to see what each
does to the logits.
"""

from __future__ import annotations

import csv
import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "llmlab/chips/ascend_and_other_accelerators/data/defaults.csv"
HALVES = np.array([-0.5, 0.5, 1.5, 2.5, -2.5], np.float32)
TIES = np.array([1, 3, 3, 2], np.float32)
NAN = np.array([1, np.nan, 3], np.float32)
WIDE = np.array([127.9, 200.7, -200.7], np.float32)
FAR = np.array([[0, -1000]], np.float32)
LABELS = np.array([1, -100], np.int64)
LOGITS = np.array([[0, 1, 2], [2, 0, 1]], np.float32)
ONES = np.ones((100, 100), np.float32)
CUBE = np.zeros((2, 3, 4), np.float32)


def numbers(x, digits: int = 4) -> str:
    """An array in few words."""
    flat = np.asarray(x, dtype=np.float64).ravel()
    return " ".join(f"{v:.{digits}g}" for v in flat)


def spread(x) -> str:
    """A matrix of random numbers: which law, and how wide."""
    x = np.asarray(x, dtype=np.float64)
    std, most = x.std(), np.abs(x).max()
    if most == 0:
        return "0"
    if abs(most / std - 3**0.5) < 0.03:
        return f"uniform ±{most:.2g}"
    return f"normal std {std:.2g}"


def kept(y) -> str:
    """What dropout made of ones."""
    y = np.asarray(y, dtype=np.float64)
    left = y[y != 0]
    return f"keeps {np.mean(y != 0):.1f}, times {left.mean():.2f}"


def summed(y) -> str:
    """The axis along which a (2, 3, 4) sums to 1."""
    y = np.asarray(y)
    axes = [i for i in range(3) if np.allclose(y.sum(i), 1)]
    return f"axis {axes[0]} of 3"


def said(call, name: str) -> str:
    """A default in a signature."""
    return f"{inspect.signature(call).parameters[name].default:g}"


def answer(ask: Callable[[], object]) -> str:
    """What came out, or the kind of the refusal."""
    try:
        return str(ask())
    except Exception as error:
        text = str(error)
        if "regist" in text or "Unsupported data type" in text:
            return "no kernel on a CPU"
        return f"refused ({type(error).__name__})"


def in_torch() -> tuple[str, dict]:
    import torch
    import torch.nn.functional as F
    from torch import nn, tensor
    from transformers import LlamaConfig

    torch.manual_seed(0)
    t = torch.from_numpy
    embedding = nn.Embedding(5, 3, padding_idx=0)
    nn.init.ones_(embedding.weight)  # as a checkpoint would
    u = inspect.signature(torch.optim.AdamW).parameters

    def stepped():
        w = nn.Parameter(torch.ones(1))
        w.grad = torch.full_like(w, 1e-2)
        torch.optim.AdamW([w]).step()
        return numbers(w.detach(), 6)

    v = torch.arange(1.0, 5).view(1, 1, 4, 1)
    zero = torch.zeros(1, 1, 4, 1)
    return torch.__version__, {
        "RMSNorm epsilon": ("nn.RMSNorm(8)", lambda: f"{torch.finfo().eps:.3g}"),
        "LayerNorm epsilon": ("nn.LayerNorm(8)", lambda: f"{nn.LayerNorm(8).eps:g}"),
        "GELU of 1": ("nn.GELU()(1.0)", lambda: numbers(nn.GELU()(tensor(1.0)), 6)),
        "Linear(3, 5)'s weight": (
            "nn.Linear(3, 5)",
            lambda: tuple(nn.Linear(3, 5).weight.shape),
        ),
        "Linear(512, 256)'s weight": (
            "nn.Linear(512, 256)",
            lambda: spread(nn.Linear(512, 256).weight.detach()),
        ),
        "Linear(512, 256)'s bias": (
            "nn.Linear(512, 256)",
            lambda: spread(nn.Linear(512, 8192).bias.detach()),
        ),
        "Embedding(1000, 64)": (
            "nn.Embedding(1000, 64)",
            lambda: spread(nn.Embedding(1000, 64).weight.detach()),
        ),
        "Embedding of the padding's index": (
            "nn.Embedding(5, 3, padding_idx=0), weights of ones",
            lambda: numbers(embedding(tensor([0])).detach()[0, 0]),
        ),
        "a new layer is training": ("nn.Linear", lambda: nn.Linear(2, 2).training),
        "Dropout(0.2) while training": (
            "nn.Dropout(0.2)",
            lambda: kept(nn.Dropout(0.2)(t(ONES))),
        ),
        "softmax without an axis": (
            "nn.Softmax()(3 axes)",
            lambda: summed(nn.Softmax()(t(CUBE))),
        ),
        "softmax of 0, -1000": (
            "F.softmax",
            lambda: numbers(F.softmax(t(FAR), -1), 3),
        ),
        "softmax of bfloat16": (
            "F.softmax",
            lambda: str(F.softmax(t(FAR).bfloat16(), -1).dtype).split(".")[-1],
        ),
        "cross entropy of 0, -1000, label 1": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(FAR), tensor([1]))),
        ),
        "cross entropy, labels 1, -100": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(LOGITS), t(LABELS))),
        ),
        "cross entropy, all labels -100": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(LOGITS[1:]), t(LABELS[1:]))),
        ),
        "AdamW: betas, eps, decay": (
            "optim.AdamW",
            lambda: numbers(
                [*u["betas"].default, u["eps"].default, u["weight_decay"].default]
            ),
        ),
        "AdamW: w = 1 after a step of 0.001": (
            "optim.AdamW, gradient 0.01",
            stepped,
        ),
        "round": ("round", lambda: numbers(t(HALVES).round())),
        "argmax of 1 3 3 2": ("argmax", lambda: int(t(TIES).argmax())),
        "argmax of 1 nan 3": ("argmax", lambda: int(t(NAN).argmax())),
        "-7 // 2, -7 % 2": (
            "//, %",
            lambda: numbers([tensor(-7) // tensor(2), tensor(-7) % tensor(2)]),
        ),
        "127.9, 200.7, -200.7 as int8": (
            "to(torch.int8)",
            lambda: numbers(t(WIDE).to(torch.int8)),
        ),
        "dtype of 1.0, of 1": (
            "tensor",
            lambda: f"{tensor(1.0).dtype} {tensor(1).dtype}".replace("torch.", ""),
        ),
        "float32 + int32": (
            "+",
            lambda: str((tensor([1.0]) + tensor([1]).int()).dtype).split(".")[-1],
        ),
        "std of 1, 3": ("std", lambda: numbers(tensor([1.0, 3.0]).std())),
        "split(6 numbers, 2)": (
            "split",
            lambda: f"{len(torch.arange(6).split(2))} parts",
        ),
        "attention takes": (
            "F.scaled_dot_product_attention",
            lambda: "batch heads tokens channels",
        ),
        "causal, 2 queries and 4 keys": (
            "F.scaled_dot_product_attention",
            lambda: numbers(
                F.scaled_dot_product_attention(zero[:, :, :2], zero, v, is_causal=True)
            ),
        ),
        "Dropout(0.2) by its older name": (
            "nn.Dropout(0.2)",
            lambda: kept(nn.Dropout(0.2)(t(ONES))),
        ),
        "a Llama's head is its embedding": (
            "transformers' LlamaConfig()",
            lambda: LlamaConfig().tie_word_embeddings,
        ),
        "a Llama's padding token": (
            "transformers' LlamaConfig()",
            lambda: LlamaConfig().pad_token_id,
        ),
        "RoPE's fused kernel turns": (
            "none; transformers' rotate_half",
            lambda: "i with i + D/2",
        ),
        "cross entropy's newer form": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(LOGITS), tensor([1, 2]))),
        ),
    }


def in_paddle() -> tuple[str, dict]:
    import paddle
    import paddle.nn.functional as F
    from paddle import nn
    from paddle.incubate.nn.functional import fused_rotary_position_embedding
    from paddleformers.transformers import LlamaConfig

    paddle.seed(0)
    t = paddle.to_tensor
    embedding = nn.Embedding(5, 3, padding_idx=0)
    embedding.weight.set_value(np.ones((5, 3), np.float32))
    w = paddle.create_parameter([1], "float32")
    w.set_value(np.ones(1, np.float32))
    (w.sum() * 1e-2).backward()
    paddle.optimizer.AdamW(parameters=[w]).step()
    u = inspect.signature(paddle.optimizer.AdamW).parameters
    v = t(np.arange(1, 5, dtype=np.float32).reshape(1, 4, 1, 1))
    zero = paddle.zeros([1, 4, 1, 1])
    dice = np.random.default_rng(0)
    wide = [t(dice.standard_normal((2, n, 7, 8)).astype(np.float32)) for n in (6, 2, 2)]
    of = lambda x: str(x.dtype).split(".")[-1]  # noqa: E731

    def layout():
        """Ours would be (batch, tokens, heads, channels) = 2, 6, 7, 8 then."""
        y = F.scaled_dot_product_attention(*wide, is_causal=True)
        assert y.shape == [2, 6, 7, 8]
        return "batch tokens heads channels"

    return paddle.__version__, {
        "RMSNorm epsilon": ("F.rms_norm", lambda: said(F.rms_norm, "eps")),
        "LayerNorm epsilon": (
            "nn.LayerNorm(8)",
            lambda: f"{nn.LayerNorm(8)._epsilon:g}",
        ),
        "GELU of 1": ("nn.GELU()(1.0)", lambda: numbers(nn.GELU()(t(1.0)), 6)),
        "Linear(3, 5)'s weight": (
            "nn.Linear(3, 5)",
            lambda: tuple(nn.Linear(3, 5).weight.shape),
        ),
        "Linear(512, 256)'s weight": (
            "nn.Linear(512, 256)",
            lambda: spread(nn.Linear(512, 256).weight),
        ),
        "Linear(512, 256)'s bias": (
            "nn.Linear(512, 256)",
            lambda: spread(nn.Linear(512, 256).bias),
        ),
        "Embedding(1000, 64)": (
            "nn.Embedding(1000, 64)",
            lambda: spread(nn.Embedding(1000, 64).weight),
        ),
        "Embedding of the padding's index": (
            "nn.Embedding(5, 3, padding_idx=0), weights of ones",
            lambda: numbers(embedding(t([0]))[0, 0]),
        ),
        "a new layer is training": ("nn.Linear", lambda: nn.Linear(2, 2).training),
        "Dropout(0.2) while training": (
            "nn.Dropout(0.2)",
            lambda: kept(nn.Dropout(0.2)(t(ONES))),
        ),
        "softmax without an axis": (
            "nn.Softmax()(3 axes)",
            lambda: summed(nn.Softmax()(t(CUBE))),
        ),
        "softmax of 0, -1000": ("F.softmax", lambda: numbers(F.softmax(t(FAR)), 3)),
        "softmax of bfloat16": (
            "F.softmax",
            lambda: of(F.softmax(t(FAR).astype("bfloat16"))),
        ),
        "cross entropy of 0, -1000, label 1": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(FAR), t([1]))),
        ),
        "cross entropy, labels 1, -100": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(LOGITS), t(LABELS))),
        ),
        "cross entropy, all labels -100": (
            "F.cross_entropy",
            lambda: numbers(F.cross_entropy(t(LOGITS[1:]), t(LABELS[1:]))),
        ),
        "AdamW: betas, eps, decay": (
            "optimizer.AdamW",
            lambda: numbers(
                [u[n].default for n in ("beta1", "beta2", "epsilon", "weight_decay")]
            ),
        ),
        "AdamW: w = 1 after a step of 0.001": (
            "optimizer.AdamW, gradient 0.01",
            lambda: numbers(w, 6),
        ),
        "round": ("round", lambda: numbers(t(HALVES).round())),
        "argmax of 1 3 3 2": ("argmax", lambda: int(t(TIES).argmax())),
        "argmax of 1 nan 3": ("argmax", lambda: int(t(NAN).argmax())),
        "-7 // 2, -7 % 2": ("//, %", lambda: numbers([t(-7) // t(2), t(-7) % t(2)])),
        "127.9, 200.7, -200.7 as int8": (
            'astype("int8")',
            lambda: numbers(t(WIDE).astype("int8")),
        ),
        "dtype of 1.0, of 1": ("to_tensor", lambda: f"{of(t(1.0))} {of(t(1))}"),
        "float32 + int32": ("+", lambda: of(t([1.0]) + t([1]).astype("int32"))),
        "std of 1, 3": ("std", lambda: numbers(t([1.0, 3.0]).std())),
        "split(6 numbers, 2)": (
            "split",
            lambda: f"{len(paddle.split(paddle.arange(6), 2))} parts",
        ),
        "attention takes": ("F.scaled_dot_product_attention", layout),
        "causal, 2 queries and 4 keys": (
            "F.scaled_dot_product_attention",
            lambda: numbers(
                F.scaled_dot_product_attention(zero[:, :2], zero, v, is_causal=True)
            ),
        ),
        "a Llama's head is its embedding": (
            "PaddleFormers' LlamaConfig()",
            lambda: LlamaConfig().tie_word_embeddings,
        ),
        "a Llama's padding token": (
            "PaddleFormers' LlamaConfig()",
            lambda: LlamaConfig().pad_token_id,
        ),
        "RoPE's fused kernel turns": (
            "fused_rotary_position_embedding, as documented",
            lambda: {True: "2i with 2i + 1"}[
                inspect.signature(fused_rotary_position_embedding)
                .parameters["use_neox_rotary_style"]
                .default
            ],
        ),
    }


def in_mindspore() -> tuple[str, dict]:
    import mindspore as ms
    from mindspore import mint, nn, ops

    ms.set_device("CPU")
    ms.runtime.launch_blocking()  # or a later line is blamed
    ms.set_seed(0)
    t = ms.Tensor
    embedding = nn.Embedding(5, 3, padding_idx=0)
    embedding.embedding_table.set_data(t(np.ones((5, 3), np.float32)))
    drop = nn.Dropout(p=0.2).set_train()
    u = inspect.signature(nn.AdamWeightDecay).parameters

    def stepped():
        w = ms.Parameter(t(np.ones(1, np.float32)), name="w")
        nn.AdamWeightDecay([w])((t(np.full(1, 1e-2, np.float32)),))
        return numbers(w.asnumpy(), 6)

    of = lambda x: str(x.dtype).lower()  # noqa: E731
    loss = lambda x, y: numbers(  # noqa: E731
        ops.cross_entropy(t(x), t(np.asarray(y, np.int32))).asnumpy()
    )
    return ms.__version__, {
        "RMSNorm epsilon": ("ops.rms_norm", lambda: said(ops.rms_norm, "epsilon")),
        "LayerNorm epsilon": (
            "nn.LayerNorm",
            lambda: f"{nn.LayerNorm([8]).epsilon:g}",
        ),
        "GELU of 1": (
            "nn.GELU()(1.0)",
            lambda: numbers(nn.GELU()(t([1.0])).asnumpy(), 6),
        ),
        "Linear(3, 5)'s weight": (
            "nn.Dense(3, 5)",
            lambda: tuple(nn.Dense(3, 5).weight.shape),
        ),
        "Linear(512, 256)'s weight": (
            "nn.Dense(512, 256)",
            lambda: spread(nn.Dense(512, 256).weight.asnumpy()),
        ),
        "Linear(512, 256)'s bias": (
            "nn.Dense(512, 256)",
            lambda: spread(nn.Dense(512, 8192).bias.asnumpy()),
        ),
        "Embedding(1000, 64)": (
            "nn.Embedding(1000, 64)",
            lambda: spread(nn.Embedding(1000, 64).embedding_table.asnumpy()),
        ),
        "Embedding of the padding's index": (
            "nn.Embedding(5, 3, padding_idx=0), weights of ones",
            lambda: numbers(embedding(t([0], ms.int32)).asnumpy()[0, 0]),
        ),
        "a new layer is training": ("nn.Dense", lambda: nn.Dense(2, 2).training),
        "Dropout(0.2) while training": (
            "nn.Dropout(p=0.2)",
            lambda: kept(drop(t(ONES)).asnumpy()),
        ),
        "Dropout(0.2) by its older name": (
            "nn.Dropout(keep_prob=0.2)",
            lambda: kept(nn.Dropout(keep_prob=0.2).set_train()(t(ONES)).asnumpy()),
        ),
        "softmax without an axis": (
            "nn.Softmax()(3 axes)",
            lambda: summed(nn.Softmax()(t(CUBE)).asnumpy()),
        ),
        "softmax of 0, -1000": (
            "ops.softmax",
            lambda: numbers(ops.softmax(t(FAR)).asnumpy(), 3),
        ),
        "softmax of bfloat16": (
            "ops.softmax",
            lambda: of(ops.softmax(t(FAR).astype(ms.bfloat16))),
        ),
        "cross entropy of 0, -1000, label 1": (
            "ops.cross_entropy",
            lambda: loss(FAR, [1]),
        ),
        "cross entropy, labels 1, -100": (
            "ops.cross_entropy",
            lambda: loss(LOGITS, LABELS),
        ),
        "cross entropy, all labels -100": (
            "ops.cross_entropy",
            lambda: loss(LOGITS[1:], LABELS[1:]),
        ),
        "AdamW: betas, eps, decay": (
            "nn.AdamWeightDecay",
            lambda: numbers(
                [u[n].default for n in ("beta1", "beta2", "eps", "weight_decay")]
            ),
        ),
        "AdamW: w = 1 after a step of 0.001": (
            "nn.AdamWeightDecay, gradient 0.01",
            stepped,
        ),
        "round": ("ops.round", lambda: numbers(ops.round(t(HALVES)).asnumpy())),
        "argmax of 1 3 3 2": ("argmax", lambda: int(t(TIES).argmax())),
        "argmax of 1 nan 3": ("argmax", lambda: int(t(NAN).argmax())),
        "-7 // 2, -7 % 2": (
            "//, %",
            lambda: numbers([int(t(-7) // t(2)), int(t(-7) % t(2))]),
        ),
        "127.9, 200.7, -200.7 as int8": (
            "astype(int8)",
            lambda: numbers(t(WIDE).astype(ms.int8).asnumpy()),
        ),
        "dtype of 1.0, of 1": ("Tensor", lambda: f"{of(t(1.0))} {of(t(1))}"),
        "float32 + int32": (
            "+",
            lambda: of(t(np.ones(1, np.float32)) + t(np.ones(1, np.int32))),
        ),
        "std of 1, 3": (
            "Tensor.std",
            lambda: numbers(t(np.array([1, 3], np.float32)).std().asnumpy()),
        ),
        "split(6 numbers, 2)": (
            "ops.split",
            lambda: f"{len(ops.split(t(np.arange(6)), 2))} parts",
        ),
        "attention takes": (
            "ops.flash_attention_score",
            lambda: mindspore_attention(ms, ops),
        ),
        "RoPE's fused kernel turns": (
            "ops.rotary_position_embedding, as documented",
            lambda: {"0": "i with i + D/2"}[
                said(ops.rotary_position_embedding, "mode")
            ],
        ),
        "cross entropy's newer form": (
            "mint.nn.functional.cross_entropy",
            lambda: mint.nn.functional.cross_entropy(t(LOGITS), t([1, 2])).asnumpy(),
        ),
    }


def mindspore_attention(ms, ops) -> str:
    """It has no kernel on a CPU, and says so."""
    x = ms.Tensor(np.zeros((2, 7, 48), np.float16))
    return ops.flash_attention_score(x, x, x, 6, input_layout="BSH")[3].asnumpy()


def record(whose: str, folder: Path) -> None:
    """Ask one framework everything."""
    version, asked = {
        "torch": in_torch,
        "paddle": in_paddle,
        "mindspore": in_mindspore,
    }[whose]()
    answers = {thing: [call, answer(ask)] for thing, (call, ask) in asked.items()}
    text = json.dumps({"version": version, "answers": answers}, indent=1)
    (folder / f"{whose}.json").write_text(text)


def floored(low, q, k, v, mask):
    """Attention with the softmax of max(x - max x, low)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    future = scores.new_ones(scores.shape[-2:]).triu(1).bool()
    scores = scores.masked_fill(future, -1e4)
    return (scores - scores.amax(-1, True)).clamp(min=low).softmax(-1) @ v


def effects() -> dict[tuple[str, str], float]:
    """(Thing, framework) → the largest change of the block's logits, over the largest.

    The block has PyTorch's defaults, but for the one that is changed.
    """
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from llmlab.models import llama
    from llmlab.models.attention import sdpa

    golden = ROOT / "tests/chips/golden/port_inputs.safetensors"
    data = {name: x.float() for name, x in load_file(golden).items()}
    h, seed = data.pop("h"), data.pop("grad of logits")
    T, d, H = h.shape[1], h.shape[2], 6
    shape = dict(vocab_size=61, hidden_size=d, intermediate_size=80)
    shape |= dict(num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=2)

    def block(eps: float = torch.finfo().eps) -> llama.Llama:
        model = llama.Llama(llama.LlamaConfig(**shape, rms_norm_eps=eps))
        model.load_state_dict(data)
        return model

    def logits(model=None, h=h, **kwargs):
        return (model or block())(inputs_embeds=h, **kwargs).detach()

    def gated(act) -> torch.Tensor:
        """The MLP with another activation."""
        model = block()
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x: mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
        return logits(model)

    def unturned() -> torch.Tensor:
        """W_q and W_o are square: nothing refuses them the wrong way round."""
        model = block()
        attention = model.model.layers[0].self_attn
        for linear in (attention.q_proj, attention.o_proj):
            linear.weight.data = linear.weight.data.T
        return logits(model)

    def over_heads(q, k, v, mask):
        """(batch, heads, tokens, channels) read as (batch, tokens, heads, channels)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa(q, k, v, None).transpose(1, 2)

    def neighbours() -> torch.Tensor:
        """RoPE turns 2i with 2i + 1, the weights as they are."""
        half = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
        cos, sin = (f(half).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))

        def turned(x):
            swapped = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos + swapped * sin

        # the model's own angles are set to 0
        model = block()
        model.model.theta.zero_()
        return logits(
            model, attention=lambda q, k, v, m: sdpa(turned(q), turned(k), v, m)
        )

    def stepped(rule) -> torch.Tensor:
        """After one step of 0.001."""
        model = block()
        model(inputs_embeds=h).backward(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(1e-3 * rule(p, p.grad))
        return logits(model)

    def corrected(p, g):
        return g / (g.abs() + 1e-8) + 0.01 * p

    def uncorrected(p, g):
        return 0.1 * g / ((0.001 * g * g).sqrt() + 1e-6)

    padded = h.clone()
    padded[:, 0] = 0
    tied = block()
    tied.lm_head.weight.data = tied.model.embed_tokens.weight.data
    base = logits()
    pairs = {
        ("RMSNorm epsilon", "paddle"): (base, logits(block(1e-5))),
        ("RMSNorm epsilon", "mindspore"): (base, logits(block(1e-6))),
        ("GELU of 1", "mindspore"): (
            gated(F.gelu),
            gated(lambda x: F.gelu(x, approximate="tanh")),
        ),
        ("Linear(3, 5)'s weight", "paddle"): (base, unturned()),
        ("Embedding of the padding's index", "paddle"): (base, logits(h=padded)),
        ("a Llama's head is its embedding", "paddle"): (base, logits(tied)),
        ("softmax of 0, -1000", "paddle"): (
            logits(attention=partial(floored, -1e9)),
            logits(attention=partial(floored, -64.0)),
        ),
        ("attention takes", "paddle"): (base, logits(attention=over_heads)),
        ("RoPE's fused kernel turns", "paddle"): (base, neighbours()),
        ("AdamW: w = 1 after a step of 0.001", "mindspore"): (
            stepped(corrected),
            stepped(uncorrected),
        ),
    }
    return {
        key: float((there - here).abs().max() / here.abs().max())
        for key, (here, there) in pairs.items()
    }


def table(folder: Path) -> None:
    """All answers, and what some of them do to the block."""
    every = {
        whose: json.loads((folder / f"{whose}.json").read_text())
        for whose in ("torch", "paddle", "mindspore")
    }
    names = {"torch": "PyTorch", "paddle": "Paddle", "mindspore": "MindSpore"}
    changes = effects()
    ours = every["torch"]["answers"]
    with FILE.open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write(["thing", "framework", "call", "value", "torch", "effect"])
        for whose, data in every.items():
            name = f"{names[whose]} {data['version'].split('+')[0]}"
            for thing, (call, value) in data["answers"].items():
                reference = ours.get(thing, ["", ""])[1]
                effect = changes.get((thing, whose))
                shown = "" if effect is None else f"{effect:.2g}"
                write([thing, name, call, value, reference, shown])


if __name__ == "__main__":
    step, where = sys.argv[1], Path(sys.argv[2])
    table(where) if step == "table" else record(step, where)
