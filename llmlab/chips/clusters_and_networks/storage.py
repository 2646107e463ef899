"""Checkpoints: bytes, and the bandwidth that they find on their way to storage.

    T = max( B / (w · b),  B / (w · b / o),  B / s )

    B  bytes of the checkpoint      w  hosts that write     b  bytes per second of each
    o  oversubscription of the network between them         s  of the storage, together

Simplified: all hosts write equally much, at once, and nobody else uses the storage.
"""

from __future__ import annotations

from llmlab.chips.checked import counts, positive

# bytes per parameter of a checkpoint to go on from: weights in bf16, and in fp32 the
# master copy and Adam's two moments
TRAINING = 2 + 4 + 4 + 4


def checkpoint_bytes(parameters: float, each: float = TRAINING) -> float:
    """Bytes of a checkpoint."""
    positive(parameters=parameters, each=each)
    return parameters * each


def write_seconds(
    bytes: float,
    writers: int,
    host: float,
    storage: float,
    oversubscription: float = 1.0,
) -> tuple[float, str]:
    """(seconds at least, what limits: "hosts", "network" or "storage").

    Args:
        host: bytes per second of each host's card.
        oversubscription: how much less the network carries than all hosts' cards.
    """
    counts(writers=writers)
    positive(bytes=bytes, host=host, storage=storage)
    if not oversubscription >= 1:
        raise ValueError(f"oversubscription={oversubscription} must be at least 1")
    rates = {
        "hosts": writers * host,
        "network": writers * host / oversubscription,
        "storage": storage,
    }
    limit = min(rates, key=rates.__getitem__)
    return bytes / rates[limit], limit


def share_lost(seconds: float, every: float) -> float:
    """The share of time that goes into checkpoints, if training waits for each."""
    positive(seconds=seconds, every=every)
    return seconds / (seconds + every)
