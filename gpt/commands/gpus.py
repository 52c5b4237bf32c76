"""GPUs that ``gpt plan`` knows by name: memory, peak, and where the numbers are from."""

from typing import NamedTuple

from gpt.config import Gpu
from gpt.device import PEAK_FLOPS


class Kind(NamedTuple):
    """A kind of GPU."""

    name: str
    known_as: str
    """Its key in :data:`gpt.device.PEAK_FLOPS`: dense bfloat16 products."""
    memory: float
    """In bytes."""
    source: str
    """The maker's data sheet."""

    @property
    def peak(self) -> float:
        """FLOP/s of dense bfloat16 matrix products."""
        return PEAK_FLOPS[self.known_as]


GPUS: dict[Gpu, Kind] = {
    "a100": Kind(
        "A100 80 GB SXM", "A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 80e9, "NVIDIA A100 data sheet"
    ),
    "a100-40gb": Kind(
        "A100 40 GB", "A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 40e9, "NVIDIA A100 data sheet"
    ),
    "b200": Kind("B200 SXM", "B200", 180e9, "NVIDIA DGX B200 data sheet"),
    "h100": Kind("H100 SXM", "H100 80GB HBM3", 80e9, "NVIDIA H100 data sheet"),
    "h100-pcie": Kind("H100 PCIe", "H100 PCIe", 80e9, "NVIDIA H100 data sheet"),
    "h200": Kind("H200 SXM", "H200", 141e9, "NVIDIA H200 data sheet"),
    "l4": Kind("L4", "L4", 24e9, "NVIDIA L4 data sheet"),
    "l40s": Kind("L40S", "L40S", 48e9, "NVIDIA L40S data sheet"),
    "rtx3090": Kind("RTX 3090", "RTX 3090", 24e9, "NVIDIA Ampere GA102 whitepaper"),
    "rtx4090": Kind("RTX 4090", "RTX 4090", 24e9, "NVIDIA Ada GPU architecture whitepaper"),
    "rtx5090": Kind("RTX 5090", "RTX 5090", 32e9, "NVIDIA RTX Blackwell whitepaper"),
}
"""By the values of ``--gpu``."""
USABLE = 0.92
"""The part of a GPU's memory that tensors get; CUDA and gaps between blocks take the rest."""
