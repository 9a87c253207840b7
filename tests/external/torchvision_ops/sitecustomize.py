"""Lets torchvision from the package index be imported beside a torch without CUDA; for PYTHONPATH.

Its compiled operators are for CUDA and do not load there. Image processors need none of them, but torchvision
describes two as it is imported, which must be declared first.
"""

from __future__ import annotations

import torch

for name in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
