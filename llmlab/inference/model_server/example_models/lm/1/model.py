"""The course model in NumPy: the likeliest next token and its log-probability.

A Llama, forward only: B texts of T tokens, H query heads that share K key heads of D
channels. NumPy alone, so that it runs where no PyTorch is installed.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from safetensors.numpy import load_file


class TritonPythonModel:
    """IDS (B, T) → NEXT (B, 1), LOGPROB (B, 1)."""

    def initialize(self, args):
        """Read the weights."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(parameters["folder"]["string_value"])
        self.shape = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def execute(self, requests):
        """All requests in one forward pass."""
        batches = [
            pb_utils.get_input_tensor_by_name(request, "IDS").as_numpy()
            for request in requests
        ]
        logprobs = self.next_logprobs(np.concatenate(batches))
        best = logprobs.argmax(-1)
        at = 0
        answers = []
        for batch in batches:
            rows = slice(at, at + len(batch))
            at += len(batch)
            token = best[rows, None]
            value = np.take_along_axis(logprobs[rows], token, -1)
            tensors = [
                pb_utils.Tensor("NEXT", token.astype(np.int64)),
                pb_utils.Tensor("LOGPROB", value.astype(np.float32)),
            ]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers

    def next_logprobs(self, ids):
        """(B, T) → (B, vocabulary), after the last token."""
        embedding = self.weights["model.embed_tokens.weight"]
        h = embedding[ids]  # (B, T, d)
        for layer in range(self.shape["num_hidden_layers"]):
            block = f"model.layers.{layer}."
            h = h + self.attention(self.norm(h, block + "input_layernorm"), block)
            x = self.norm(h, block + "post_attention_layernorm")
            gate = self.linear(x, block + "mlp.gate_proj")
            up = self.linear(x, block + "mlp.up_proj")
            silu = gate / (1 + np.exp(-gate))
            h = h + self.linear(silu * up, block + "mlp.down_proj")
        logits = self.norm(h[:, -1], "model.norm") @ embedding.T  # tied head
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def linear(self, x, name):
        """X Wᵀ."""
        return x @ self.weights[name + ".weight"].T

    def norm(self, x, name):
        """RMSNorm."""
        square = (x * x).mean(-1, keepdims=True)
        eps = self.shape["rms_norm_eps"]
        return x / np.sqrt(square + eps) * self.weights[name + ".weight"]

    def attention(self, x, block):
        """Causal, grouped-query."""
        B, T, _ = x.shape
        H = self.shape["num_attention_heads"]
        K = self.shape["num_key_value_heads"]
        D = self.shape["head_dim"]

        def heads(name, n):
            y = self.linear(x, block + "self_attn." + name)
            return y.reshape(B, T, n, D).transpose(0, 2, 1, 3)  # (B, n, T, D)

        q = self.rotate(heads("q_proj", H))
        k = self.rotate(heads("k_proj", K)).repeat(H // K, axis=1)
        v = heads("v_proj", K).repeat(H // K, axis=1)
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D)  # (B, H, T, T)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return self.linear(
            out.transpose(0, 2, 1, 3).reshape(B, T, H * D), block + "self_attn.o_proj"
        )

    def rotate(self, x):
        """RoPE, the halves of a head turned against each other."""
        T, D = x.shape[-2:]
        rates = self.shape["rope_theta"] ** (-np.arange(0, D, 2) / D)
        angles = np.outer(np.arange(T), rates)
        cos = np.cos(angles).astype(np.float32)
        sin = np.sin(angles).astype(np.float32)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
