"""GPUs: their memory, bandwidth and peaks."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU, from its maker's data sheet."""

    name: str
    """As `--gpu` takes it."""
    words: tuple[str, ...]
    """What is in the name that the driver gives it."""
    memory_bytes: float
    """What the driver shows, which is a little less than the data sheet's."""
    half_flops: float
    """Dense peak in bf16, or in fp16 for GPUs without bf16; FLOP/s."""
    single_flops: float
    """Peak in fp32 without tensor cores."""
    link: float
    """Bytes a second in one direction to the other GPUs of a host: NVLink, or PCIe where there is none."""
    has_bf16: bool = True
    tf32_flops: float | None = None
    """Peak in TF32; None for half of `half_flops`, or that of fp32 where there is no TF32."""

    def peak_flops(self, precision: str) -> float:
        """The peak for `train.precision`."""
        if precision == "tf32":
            return self.tf32_flops or (self.half_flops / 2 if self.has_bf16 else self.single_flops)
        return self.single_flops if precision == "fp32" else self.half_flops


_MIB = 2**20
# NVIDIA's data sheets of each; dense figures, without sparsity. What lies first is found first.
DEVICES = (
    Device("b200", ("B200",), 183359 * _MIB, 2250e12, 80e12, 900e9),
    Device("h200", ("H200",), 143771 * _MIB, 989e12, 67e12, 450e9),
    Device("h100-pcie", ("H100 PCIe",), 81559 * _MIB, 756e12, 51e12, 64e9),
    Device("h100-nvl", ("H100 NVL",), 95830 * _MIB, 835e12, 60e12, 300e9),
    Device("h100-80", ("H100",), 81559 * _MIB, 989e12, 67e12, 450e9),
    Device("a100-40", ("A100", "40GB"), 40536 * _MIB, 312e12, 19.5e12, 300e9),
    Device("a100-80", ("A100",), 81920 * _MIB, 312e12, 19.5e12, 300e9),
    Device("l40s", ("L40S",), 46068 * _MIB, 362e12, 91.6e12, 32e9),
    Device("l4", ("L4",), 23034 * _MIB, 121e12, 30.3e12, 32e9),
    Device("a10", ("A10",), 23028 * _MIB, 125e12, 31.2e12, 32e9),
    Device("v100-16", ("V100", "16GB"), 16384 * _MIB, 125e12, 15.7e12, 150e9, has_bf16=False),
    Device("v100-32", ("V100",), 32510 * _MIB, 125e12, 15.7e12, 150e9, has_bf16=False),
    Device("t4", ("T4",), 15360 * _MIB, 65e12, 8.1e12, 16e9, has_bf16=False),
)


def device_of(driver_name: str) -> Device | None:
    """The GPU of a driver's name, such as `NVIDIA H100 80GB HBM3`; None for others, and for a part of one."""
    if "MIG" in driver_name:
        return None
    # Whole words: an L40 is not an L4, nor an RTX A1000 an A100.
    return next((one for one in DEVICES if all(re.search(rf"\b{w}\b", driver_name) for w in one.words)), None)
