"""FlashAttention: exact attention that never stores its scores.

    online_softmax   a softmax over keys that come in pieces, and how pieces merge
    forward          the tile loop: which tiles, which masks; O and the log-sum-exp
    backward         the gradients, with the probabilities computed again
    attention        both as one function for autograd, and for `Llama`
    traffic          bytes to and from the large memory: counted loops, closed forms
    decoding         few queries, many keys: the keys are split (flash decoding)
    triton_kernel    the forward pass for a GPU; import it yourself, for it needs Triton

Start with `online_softmax`.
"""

from llmlab.inference.flash_attention import traffic
from llmlab.inference.flash_attention.attention import (
    FILE,
    FlashAttention,
    flash_attention,
    standard_attention,
)
from llmlab.inference.flash_attention.backward import backward, score_gradient
from llmlab.inference.flash_attention.decoding import split_keys
from llmlab.inference.flash_attention.forward import causal_tiles, forward
from llmlab.inference.flash_attention.online_softmax import (
    finish,
    merge,
    online_softmax,
    start,
)

__all__ = [
    "FILE",
    "FlashAttention",
    "backward",
    "causal_tiles",
    "finish",
    "flash_attention",
    "forward",
    "merge",
    "online_softmax",
    "score_gradient",
    "split_keys",
    "standard_attention",
    "start",
    "traffic",
]
