"""Which GPU this host has, asked of NVIDIA's driver itself: building a plan needs no PyTorch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """The GPU that plans are built on.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, such as (9, 0).
    """

    name: str
    capability: tuple[int, int]

    @property
    def variant(self) -> str:
        """Name of the config variant of this kind of GPU, such as ``sm90``."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def load_driver() -> Any:
    """NVIDIA's driver library, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def first_gpu() -> Gpu | None:
    """The first GPU that this process may use, or None."""
    driver = load_driver()
    count, device = ctypes.c_int(), ctypes.c_int()
    if (
        driver is None
        or driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or not count.value
        or driver.cuDeviceGet(ctypes.byref(device), 0)
    ):
        return None
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]))
