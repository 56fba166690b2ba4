"""The toolchains there are. One more is one more file and one more line here."""

from __future__ import annotations

from agent.contract.manifest import Toolchain
from fleet.errors import ProfileError
from fleet.toolchains.base import ToolchainDriver
from fleet.toolchains.llamacpp import LlamaCpp
from fleet.toolchains.mlx import Mlx
from fleet.toolchains.onnx_genai import OnnxGenai
from fleet.toolchains.openvino import OpenVino

DRIVERS: dict[Toolchain, ToolchainDriver] = {
    driver.name: driver for driver in (OnnxGenai(), OpenVino(), LlamaCpp(), Mlx())
}


def driver_of(name: Toolchain) -> ToolchainDriver:
    """The driver of a toolchain.

    Raises:
        ProfileError: there is none.
    """
    if name not in DRIVERS:
        raise ProfileError(f"no toolchain is named {name}; there are {', '.join(DRIVERS)}")
    return DRIVERS[name]
