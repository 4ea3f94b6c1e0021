"""One thread per process: on a tiny model the default two are many times slower as soon as a core is shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which any test may do


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
