"""What accelerators have to give, from their makers' data sheets."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")

# Dense tensor-core peak of one device in FLOP/s at half precision. The first name that occurs in
# torch.cuda.get_device_name() counts. What is not listed has no MFU.
HALF_PEAK = {
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}

# Memory of the same devices in the makers' gigabytes, of the largest one where several share a name.
MEMORY_GB = {
    "B200": 180,
    "GH200": 96,
    "H200": 141,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "H100": 80,
    "H800": 80,
    "A100": 80,
    "A800": 80,
    "A40": 48,
    "A30": 24,
    "A10G": 24,
    "A10": 24,
    "L40S": 48,
    "L40": 48,
    "L4": 24,
    "V100": 32,
    "T4": 16,
}

NO_BFLOAT16 = ("V100", "T4")  # older than Ampere


def listed(name: str, table: dict[str, Value]) -> Value | None:
    """The value of the first entry that occurs in `name`; None where none does."""
    return next((value for known, value in table.items() if known in name), None)
