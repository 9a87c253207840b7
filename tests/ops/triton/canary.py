"""Tensors between NaN canaries: a kernel that writes outside its buffer, or uses what is there, fails."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MARGIN = 67


class Guarded:
    """``tensor`` is a view into a longer buffer of NaN; ``check`` says whether the margins are whole."""

    def __init__(self, values: torch.Tensor, gap: int = 3) -> None:
        rows = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values[None]
        width = rows.shape[-1] + gap
        self.buffer = torch.full((2 * MARGIN + rows.shape[0] * width,), float("nan"), device=DEVICE)
        self.buffer = self.buffer.to(values.dtype)
        inner = self.buffer[MARGIN : MARGIN + rows.shape[0] * width].view(rows.shape[0], width)
        self.rows = inner[:, : rows.shape[-1]]
        self.rows.copy_(rows)
        self.tensor = self.rows if values.dim() > 1 else self.rows[0]

    def check(self) -> None:
        touched = torch.ones_like(self.buffer, dtype=torch.bool)
        touched[MARGIN:-MARGIN].view(self.rows.shape[0], -1)[:, : self.rows.shape[-1]] = False
        assert self.buffer[touched].isnan().all(), "a value outside the tensor was written"


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def close_to_truth(fast: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, factor: float = 1.5) -> None:
    """The fast result is no further from the float64 truth than the plain one of its dtype, times ``factor``.

    Both may be off by one rounding of the result's own dtype.
    """
    assert fast.dtype == plain.dtype and fast.shape == plain.shape
    assert fast.isfinite().all()
    own = (plain.double() - truth).abs().max()
    eps = torch.finfo(fast.dtype).eps if fast.dtype.is_floating_point else 0
    bound = factor * own + eps * truth.abs().max()
    error = (fast.double() - truth).abs().max()
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"
