"""leangrpo: train reasoning models with GRPO on the GPU you already have.

    from grpo import GRPOConfig, GRPOTrainer

Importing this package is instant; torch and transformers are imported with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.config import GRPOConfig, SFTConfig
    from grpo.errors import InputError, RunError
    from grpo.planner import plan
    from grpo.sft import SFTTrainer
    from grpo.trainer.loop import GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "InputError", "RunError", "SFTConfig", "SFTTrainer", "plan"]

_HOMES = {
    "GRPOConfig": "grpo.config",
    "SFTConfig": "grpo.config",
    "GRPOTrainer": "grpo.trainer.loop",
    "SFTTrainer": "grpo.sft",
    "InputError": "grpo.errors",
    "RunError": "grpo.errors",
    "plan": "grpo.planner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
