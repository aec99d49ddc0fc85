"""Bound the sizes that a recipe can name: a number beyond is a mistake, found before it is used."""

from __future__ import annotations

# More than any machine holds. Without the bound the error would come from an allocator, or never.
MAX_SIZE = 2**20
MAX_BATCH = 2**16
MAX_TIMESTEPS = 10**6
