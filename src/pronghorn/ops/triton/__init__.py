"""Triton kernels: each computes what its twin in ``plain.py`` says, on GPU tensors, with 64-bit offsets.

Only ``ops/select.py`` chooses them. Importing this package needs Triton; no GPU is touched before a launch.
"""
