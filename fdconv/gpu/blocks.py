"""Sizes of the blocks that kernels cut their work into. Nothing here needs Triton."""

from __future__ import annotations

PROGRAMS = 1024
"""Programs that keep a large GPU busy; with fewer blocks than this, the samples are shared out among programs too."""


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`: Triton has no other block sizes."""
    return 1 << (size - 1).bit_length()


def number_of_blocks(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def samples_each(samples: int, blocks: int) -> int:
    """How many samples one program goes through: all, unless that leaves the device idle."""
    return number_of_blocks(samples, min(samples, number_of_blocks(PROGRAMS, blocks)))
