"""Quantization toolchains: a registry, one file a toolchain, and what surrounds a build."""
