"""The engines that people use, and how a training run survives a dead rank.

    engines   one small Llama trained by each engine, with equal losses
    composed  one model and torch's parts applied to it in torchtitan's order
    elastic   checkpoints, restarts, and how often to save

Start with `engines`.
"""

from llmlab.parallelism.frameworks.engines import loss_of

__all__ = ["loss_of"]
