"""One Llama block with its last norm and head, in Paddle and in MindSpore.

What they compute is kept in tests/chips/golden/port_*.safetensors.

Each step in its own environment, from the repository's root:

    python scripts/golden/port_block_goldens.py inputs       numpy, safetensors
    python scripts/golden/port_block_goldens.py paddle       paddlepaddle 3.3.1
    python scripts/golden/port_block_goldens.py paddleformers    paddleformers 1.2.0
    python scripts/golden/port_block_goldens.py mindspore    mindspore 2.10.0,
                                                             safetensors, numpy<2

`inputs` draws the weights under Hugging Face's names, embeddings h and the gradient of
the logits, in fp16; the others compute in fp32. Parameters and their gradients are kept
under the names and in the layouts of each framework. The map from ours is not taken
from the package here, but written out: a test compares the two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).resolve().parents[2] / "tests/chips/golden"
INPUTS = FOLDER / "port_inputs.safetensors"
SHAPE = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,  # PaddleFormers ties where nothing is said
)
B, T, d, f, D, V = 2, 7, 48, 80, 8, 61
BLOCK = "model.layers.0."


def inputs() -> None:
    """Draw everything."""
    dice = np.random.default_rng(9)
    shapes = {
        "self_attn.q_proj": (6 * D, d),
        "self_attn.k_proj": (2 * D, d),
        "self_attn.v_proj": (2 * D, d),
        "self_attn.o_proj": (d, 6 * D),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    every = {f"{BLOCK}{name}.weight": shape for name, shape in shapes.items()}
    every |= {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    every |= {"lm_head.weight": (V, d)}
    data = {}
    for name, shape in every.items():
        drawn = dice.standard_normal(shape)
        data[name] = 1 + 0.3 * drawn if len(shape) == 1 else drawn / shape[1] ** 0.5
    data["h"] = dice.standard_normal((B, T, d))
    data["grad of logits"] = dice.standard_normal((B, T, V))
    data = {name: x.astype(np.float16) for name, x in data.items()}
    save_file(data, INPUTS, metadata={"shape": json.dumps(SHAPE)})


def given() -> tuple[dict, np.ndarray, np.ndarray]:
    """Weights, h and the gradient of the logits, in fp32."""
    data = {name: x.astype(np.float32) for name, x in load_file(INPUTS).items()}
    return data, data.pop("h"), data.pop("grad of logits")


def angles() -> np.ndarray:
    """RoPE's angles, (T, D), half and half."""
    theta = 10000.0 ** (-np.arange(0, D, 2, dtype=np.float32) / D)
    half = np.arange(T, dtype=np.float32)[:, None] * theta
    return np.concatenate([half, half], -1)


def keep(whose: str, found: dict, versions: dict) -> None:
    """Write one framework's file."""
    found = {n: np.ascontiguousarray(x, dtype=np.float32) for n, x in found.items()}
    metadata = {"versions": json.dumps(versions)}
    save_file(found, FOLDER / f"port_{whose}.safetensors", metadata=metadata)


def in_paddle() -> None:
    """In paddle.nn: Linear keeps (in, out), attention wants (B, T, heads, D)."""
    import paddle
    import paddle.nn.functional as F
    from paddle import nn

    weights, h, seed = given()
    turn = [paddle.to_tensor(f(angles()))[None, :, None] for f in (np.cos, np.sin)]

    def rotate(x):
        x1, x2 = paddle.chunk(x, 2, axis=-1)
        return x * turn[0] + paddle.concat([-x2, x1], axis=-1) * turn[1]

    layers = {}
    for name, value in weights.items():
        if name == "model.embed_tokens.weight":
            continue  # h is given
        if value.ndim == 1:
            layer = paddle.create_parameter([d], "float32")
            layer.set_value(value)
        else:
            layer = nn.Linear(*value.shape[::-1], bias_attr=False)
            layer.weight.set_value(value.T)
        layers[name] = layer

    def linear(name, x):
        return layers[f"{BLOCK}{name}.weight"](x)

    def norm(name, x):
        # F.rms_norm has no kernel on a CPU
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * layers[name]

    x = paddle.to_tensor(h, stop_gradient=False)
    normed = norm(f"{BLOCK}input_layernorm.weight", x)
    q, k, v = (
        linear(f"self_attn.{n}_proj", normed).reshape([B, T, -1, D]) for n in "qkv"
    )
    mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    y = x + linear("self_attn.o_proj", mixed.reshape([B, T, -1]))
    normed = norm(f"{BLOCK}post_attention_layernorm.weight", y)
    wide = F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    y = y + linear("mlp.down_proj", wide)
    logits = layers["lm_head.weight"](norm("model.norm.weight", y))
    logits.backward(paddle.to_tensor(seed))
    found = {"logits": logits.numpy(), "grad h": x.grad.numpy()}
    for name, layer in layers.items():
        weight = layer if name.endswith("norm.weight") else layer.weight
        found[f"grad {name}"] = weight.grad.numpy()
    keep("paddle", found, {"paddlepaddle": paddle.__version__})


def in_paddleformers() -> None:
    """PaddleFormers' own LlamaForCausalLM."""
    import paddle
    import paddleformers
    from paddleformers.transformers import LlamaConfig, LlamaForCausalLM

    weights, h, seed = given()
    # its fused RMSNorm has no kernel on a CPU
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, fuse_rms_norm=False))
    linears = [name for name in weights if "_proj" in name]
    ours = {n: x.T if n in linears else x for n, x in weights.items()}
    theirs = {n: list(x.shape) for n, x in model.state_dict().items()}
    assert theirs == {n: list(x.shape) for n, x in ours.items()}, theirs
    model.set_state_dict({n: paddle.to_tensor(x) for n, x in ours.items()})
    x = paddle.to_tensor(h, stop_gradient=False)
    logits = model(input_ids=None, inputs_embeds=x)[0]
    logits.backward(paddle.to_tensor(seed))
    found = {"logits": logits.numpy(), "grad h": x.grad.numpy()}
    for name, weight in model.named_parameters():
        if "embed_tokens" not in name:  # h is given
            found[f"grad {name}"] = weight.grad.numpy()
    versions = {"paddlepaddle": paddle.__version__}
    versions |= {"paddleformers": paddleformers.__version__}
    keep("paddleformers", found, versions)


def in_mindspore() -> None:
    """In mindspore: nn.Dense keeps (out, in); the names are MindFormers'."""
    import mindspore as ms
    from mindspore import mint, nn
    from mindspore.mint.nn import functional as F

    ms.set_device("CPU")
    weights, h, seed = given()
    cos, sin = (ms.Tensor(f(angles())) for f in (np.cos, np.sin))

    def rotate(x):
        x1, x2 = mint.chunk(x, 2, dim=-1)
        return x * cos + mint.cat([-x2, x1], dim=-1) * sin

    def dense(wide, out):
        return nn.Dense(wide, out, has_bias=False)

    class RMSNorm(nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = ms.Parameter(ms.Tensor(np.ones(d, np.float32)))

        def construct(self, x):
            # ops.rms_norm has no kernel on a CPU
            square = (x * x).mean(-1, keep_dims=True)
            return x * mint.rsqrt(square + 1e-5) * self.weight

    class Attention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.wq, self.wo = dense(d, 6 * D), dense(6 * D, d)
            self.wk, self.wv = dense(d, 2 * D), dense(d, 2 * D)

        def construct(self, x):
            q, k, v = (
                layer(x).reshape(B, T, -1, D).swapaxes(1, 2)
                for layer in (self.wq, self.wk, self.wv)
            )
            # mint.repeat_interleave has no kernel on a CPU
            k, v = (
                y.unsqueeze(2).broadcast_to((B, 2, 3, T, D)).reshape(B, 6, T, D)
                for y in (rotate(k), v)
            )
            scores = mint.matmul(rotate(q), k.swapaxes(2, 3)) / D**0.5
            future = mint.triu(mint.ones((T, T)), 1).bool()
            shares = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            mixed = mint.matmul(shares, v).swapaxes(1, 2).reshape(B, T, -1)
            return self.wo(mixed)

    class FeedForward(nn.Cell):
        def __init__(self):
            super().__init__()
            self.w1, self.w3, self.w2 = dense(d, f), dense(d, f), dense(f, d)

        def construct(self, x):
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    class Layer(nn.Cell):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.ffn_norm = RMSNorm(), RMSNorm()
            self.attention, self.feed_forward = Attention(), FeedForward()

        def construct(self, x):
            x = x + self.attention(self.attention_norm(x))
            return x + self.feed_forward(self.ffn_norm(x))

    class Model(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers, self.norm_out = nn.CellList([Layer()]), RMSNorm()

        def construct(self, x):
            return self.norm_out(self.layers[0](x))

    class Llama(nn.Cell):
        def __init__(self):
            super().__init__()
            self.model, self.lm_head = Model(), dense(d, V)

        def construct(self, x):
            return self.lm_head(self.model(x))

    names = {  # MindFormers' convert_weight.py
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.norm": "model.norm_out",
    }
    state = {}
    for name, value in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = ms.Parameter(ms.Tensor(value))
    state.pop("model.embed_tokens.weight")  # h is given
    net = Llama()
    missing, extra = ms.load_param_into_net(net, state, strict_load=True)
    assert not missing and not extra, (missing, extra)
    parameters = net.trainable_params()

    def loss(x):
        logits = net(x)
        return (logits * ms.Tensor(seed)).sum(), logits

    step = ms.value_and_grad(loss, 0, parameters, has_aux=True)
    (_, logits), (of_h, of_weights) = step(ms.Tensor(h))
    found = {"logits": logits.asnumpy(), "grad h": of_h.asnumpy()}
    for p, grad in zip(parameters, of_weights, strict=True):
        found[f"grad {p.name}"] = grad.asnumpy()
    keep("mindspore", found, {"mindspore": ms.__version__})


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    steps = {"inputs": inputs, "paddle": in_paddle, "mindspore": in_mindspore}
    steps["paddleformers"] = in_paddleformers
    steps[sys.argv[1]]()
