"""ZeRO-Offload: the optimizer's state lives in host memory, and Adam runs there.

Ren et al. 2021, https://arxiv.org/abs/2101.06840, section 3. Of the 16 bytes a
parameter, 12 are touched once per step and by Adam only. So w, m, v stay on the host.
Each unit's reduced gradient goes down as soon as it is there, and is summed there over
microbatches; after the step the new weights come up. Two bytes per parameter each way,
over PCIe:

               device                 host          PCIe a step, m microbatches
    stage 2    2Ψ weights             (12 + 2)Ψ/N   2mΨ/N down, 2Ψ/N up
    stage 3    2Ψ/N weights           (12 + 2)Ψ/N   2mΨ/N down, 2Ψ/N up

Stages 0 and 1 send their gradients down once, at the step. Simplified: nothing overlaps
here. The paper hides the transfers behind backward, and can hide the host's step behind
the next batch ("delayed parameter update"), which changes the training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Host:
    """The memory beside a device: `down` copies a tensor there, `up` copies one back,
    and both count what crosses PCIe.

    Where there is no accelerator both are copies within the same memory, and the count
    is what an accelerator would see.
    """

    def __init__(self) -> None:
        self.bytes_down = self.bytes_up = 0

    def down(self, x: Tensor) -> Tensor:
        """A copy in host memory."""
        self.bytes_down += x.numel() * x.element_size()
        return x.to("cpu", copy=True)

    def up(self, x: Tensor, device: torch.device) -> Tensor:
        """A copy on the device."""
        self.bytes_up += x.numel() * x.element_size()
        return x.to(device, copy=True)

    def clear(self) -> None:
        """Count from zero: the first copy of the weights, say, is not part of a
        step.
        """
        self.bytes_down = self.bytes_up = 0


@dataclass(frozen=True)
class HostSpeed:
    """One way over PCIe, and the host's memory, in bytes per second, for one rank.
    Default: PCIe 4.0 × 16, and 8 channels of DDR4-3200.
    """

    pcie: float = 32e9
    memory: float = 200e9


def offload_seconds(
    parameters: float, speed: HostSpeed | None = None
) -> dict[str, float]:
    """Seconds a step that a rank with this many parameters on its host spends, if
    nothing overlaps.

    Adam reads w, m, v and the gradient and writes w, m, v and the 16-bit weight: 12 + 2
    + 12 + 2 bytes per parameter.
    """
    speed = speed or HostSpeed()
    return {
        "gradients down": 2 * parameters / speed.pcie,
        "Adam on the host": 28 * parameters / speed.memory,
        "weights up": 2 * parameters / speed.pcie,
    }
