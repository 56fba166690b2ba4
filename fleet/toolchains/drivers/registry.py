"""The toolchains there are. One more is one more file and one more line here."""

from __future__ import annotations

from agent.contract.manifest import Toolchain
from fleet.errors import ProfileError
from fleet.toolchains.drivers.base import ToolchainDriver
from fleet.toolchains.drivers.llamacpp import LlamaCpp
from fleet.toolchains.drivers.mlx import Mlx
from fleet.toolchains.drivers.onnx_genai import OnnxGenai
from fleet.toolchains.drivers.onnx_qnn import OnnxQnn
from fleet.toolchains.drivers.openvino import OpenVino

DRIVERS: dict[Toolchain, ToolchainDriver] = {
    driver.name: driver for driver in (OnnxGenai(), OpenVino(), LlamaCpp(), Mlx(), OnnxQnn())
}


def driver_of(name: Toolchain) -> ToolchainDriver:
    """Return the driver of a toolchain.

    Raises:
        ProfileError: there is none.
    """
    if name not in DRIVERS:
        raise ProfileError(f"no toolchain is named {name}; there are {', '.join(DRIVERS)}")
    return DRIVERS[name]
