"""One thread for each worker: many small tensors, and `pytest -n` already uses the cores.

Without a GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is first imported.
"""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
