"""One thread for each worker: many small tensors, and `pytest -n` already uses the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
