"""The squares in which H.264 codes a frame, each with a quality of its own."""

from __future__ import annotations

__all__ = ["BLOCK", "grid"]

BLOCK = 16  # pixels of a side; H.265 quantises in such steps too


def grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a frame's macroblocks; those at the lower and the right edge may reach beyond it."""
    return -(-height // BLOCK), -(-width // BLOCK)
