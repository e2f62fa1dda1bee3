"""What a machine can do, by its published rates, and what of it a run is taken to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spg.core.rules import NotNegative, Positive, Probability, checked

GIB = 2**30


@checked
@dataclass(frozen=True)
class Hardware:
    """A device, by its published numbers.

    Attributes:
        name: What it is called.
        device: Kind of device, which decides the operations that torch takes.
        memory_gib: Memory, as CUDA reports it, in GiB.
        bf16_tflops: Dense matrix products in bfloat16 with sums in float32, 10^12 operations a second.
        fp32_tflops: The same in float32, as torch computes it by default (no TF32).
        bandwidth_gb_s: Memory read or written, 10^9 bytes a second.
        link_gb_s: What one process can send to the others, 10^9 bytes a second.
    """

    name: str
    device: Literal["cuda", "cpu"]
    memory_gib: Positive
    bf16_tflops: Positive
    fp32_tflops: Positive
    bandwidth_gb_s: Positive
    link_gb_s: Positive

    @property
    def memory(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * GIB


@checked
@dataclass(frozen=True)
class Assumptions:
    """What is assumed of a run, since nothing published says it.

    Attributes:
        products: Share of the published rate that matrix products reach.
        bandwidth: Share of the published bandwidth that operations reach.
        launch_us: Microseconds that the host takes for an operation, which a fast device waits for.
        context_gib: Memory that the device's libraries take, in GiB.
        fragments: Share of a pass's own memory that the allocator loses between tensors.
    """

    products: Probability
    bandwidth: Probability
    launch_us: NotNegative
    context_gib: NotNegative
    fragments: NotNegative

    def seconds(self, hardware: Hardware, operations: float, moved: float, single: bool) -> float:
        """Return the seconds of one operation: the longest of computing, moving and launching.

        Args:
            hardware: Where it runs.
            operations: Multiplications and additions.
            moved: Bytes read and written.
            single: Whether products are in float32.
        """
        rate = hardware.fp32_tflops if single else hardware.bf16_tflops
        computing = operations / (rate * 1e12 * self.products)
        moving = moved / (hardware.bandwidth_gb_s * 1e9 * self.bandwidth)
        return max(computing, moving, self.launch_us * 1e-6)
