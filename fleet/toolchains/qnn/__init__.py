"""Phi as static graphs for Qualcomm's NPU: the network made ready, its graphs, and their compilation."""
