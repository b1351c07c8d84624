"""GPUs that are known."""

from clm_dist.devices import DEVICES, device_of


def test_every_device_is_found_by_the_name_of_its_driver() -> None:
    names = {
        "NVIDIA B200": "b200",
        "NVIDIA H200": "h200",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H100 NVL": "h100-nvl",
        "NVIDIA H100 80GB HBM3": "h100-80",
        "NVIDIA A100-PCIE-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10": "a10",
        "Tesla V100-SXM2-16GB": "v100-16",
        "Tesla V100-SXM2-32GB": "v100-32",
        "Tesla T4": "t4",
    }
    assert {name: found.name for name in names if (found := device_of(name))} == names
    assert {device.name for device in DEVICES} == set(names.values())
    others = ("CPU", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert [device_of(name) for name in others] == [None] * len(others)
    h100, t4 = (next(device for device in DEVICES if device.name == name) for name in ("h100-80", "t4"))
    # TF32 has half of bf16's peak, and GPUs without it compute in fp32.
    assert (h100.peak_flops("bf16"), h100.peak_flops("tf32"), h100.peak_flops("fp32")) == (989e12, 494.5e12, 67e12)
    assert t4.peak_flops("tf32") == t4.peak_flops("fp32")
