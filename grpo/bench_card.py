"""A GPU of a given size, its memory while something runs, and how much of its arithmetic a step used.

    model FLOPs = x·P·T + 6·A·T + x·V·H·N + 6·L·D·T²     T tokens, N scored, x = 6 trained, 4 frozen

P: weights of the linear layers without head; A: of adapters; D: heads × head_dim; a product costs 2 forward, 2 for the
input's gradient, 2 for the weight's where it is trained; causal attention 2·D·T² forward and twice that backward.
Recomputation counts as no work. MFU is against the rate of a large matrix product in the same run.
Left out of a cap: the CUDA context and other processes; `outside_gib` says how much they take.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo.bench_models import Case
from grpo.bench_step import num_prompt
from grpo.errors import InputError, RunError
from grpo.ledger import GIB, MemoryMeter
from grpo.model.adapter import base_of

FORMULA = "x·P·T + 6·A·T + x·V·H·N + 6·L·D·T², x = 6 where the weights are trained, 4 where frozen"
_LASTING_GIB = 0.25  # what libraries keep from their first call on: cuBLAS 0.07 on an H100


class Card:
    """A device, on which torch may reserve `size` bytes (None: all there is) inside a `with` block.

    Raises:
        InputError: `size` on a device without an allocator to cap, or more than the device has; on entering the block,
            less than this process already holds there.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.size = device, size
        self._meter = MemoryMeter()
        self._held: float | None = None  # on entering the block
        if size is not None and device.type != "cuda":
            raise InputError(f"a card of {size / 1e9:g} GB on {device} (want a CUDA device, or lengths to measure)")
        if size is not None and size > self._total():
            raise InputError(f"a card of {size / 1e9:g} GB on a device of {self._total() / 1e9:.1f} GB (want less)")

    @property
    def dtype(self) -> torch.dtype:
        """Of the models on it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def capacity_gib(self) -> float:
        """What torch may reserve; without a cap, what other users of the device leave."""
        if self.size is not None:
            return self.size / GIB
        if self.device.type != "cuda":
            return math.inf
        free, _ = torch.cuda.mem_get_info(self.device)
        return (free + torch.cuda.memory_reserved(self.device)) / GIB

    def memory_info(self, device: Any = None) -> tuple[int, int]:
        """(free, total) bytes, as `torch.cuda.mem_get_info` says of a whole device, of a card with a size."""
        assert self.size is not None
        return max(0, self.size - torch.cuda.memory_reserved(self.device)), self.size

    def _total(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def __enter__(self) -> Card:
        if self.size is not None:
            self.clean()  # what is cached would count, and stay for good once anything lasting is put into it
            held = torch.cuda.memory_reserved(self.device)
            if held > self.size:
                raise InputError(
                    f"a card of {self.size / 1e9:g} GB, of which this process already holds {held / 1e9:.1f} GB"
                )
            torch.cuda.set_per_process_memory_fraction(self.size / self._total(), self.device)
        self._held = self.held_gib()
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None
        if self.size is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def clean(self) -> None:
        """Everything that is no longer used goes back to the device; peaks start anew."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        self._meter.peaks()

    def check_empty(self) -> None:
        """Raises `RunError` where more is allocated than when the block was entered: figures would count it."""
        held = self.held_gib()
        if held is not None and self._held is not None and held > self._held + _LASTING_GIB:
            raise RunError(f"{held - self._held:.2f} GiB of the GPU are still held by what ran before")

    def synchronize(self) -> None:
        """Wait for the device."""
        self._meter.synchronize()

    def held_gib(self) -> float | None:
        """What torch has allocated now; None on a CPU."""
        return round(torch.cuda.memory_allocated(self.device) / GIB, 4) if self.device.type == "cuda" else None

    def peaks(self) -> dict[str, float]:
        """GiB since `clean`: peak_gib, reserved_gib and pinned_gib of torch on CUDA, and outside_gib, what else is in
        use on the device now; on a CPU peak_gib alone, the process's resident memory."""
        found = {kind: size / GIB for kind, size in (self._meter.peaks() | self._meter.others()).items()}
        names = {"allocated": "peak", "reserved": "reserved", "pinned": "pinned", "others": "outside"}
        if self.device.type != "cuda":
            names = {"resident": "peak"}
        return {f"{names[kind]}_gib": round(size, 4) for kind, size in found.items() if kind in names}


@dataclass(frozen=True)
class Rate:
    """What a step is set against: the FLOP/s of a large matrix product."""

    flops: float

    @staticmethod
    def of(card: Card) -> Rate:
        """Best of those that fit into a second, 8192 cubed in bf16 (a tenth, 256 cubed in fp32 on a CPU)."""
        size, seconds = (8192, 1.0) if card.device.type == "cuda" else (256, 0.1)
        a, b = (torch.randn(size, size, device=card.device, dtype=card.dtype) for _ in range(2))
        start, best = time.perf_counter(), math.inf
        while time.perf_counter() - start < seconds or best == math.inf:
            card.synchronize()
            begun = time.perf_counter()
            for _ in range(4):
                a @ b
            card.synchronize()
            best = min(best, (time.perf_counter() - begun) / 4)
        return Rate(2 * size**3 / best)


def model_flops(model: nn.Module, case: Case) -> int:
    """Of one step over all rows (see the top of this file)."""
    causal: Any = base_of(model)
    config, head = causal.config, causal.get_output_embeddings()
    linears = [m for m in causal.modules() if isinstance(m, nn.Linear) and m is not head]
    adapters = {id(m) for name, m in causal.named_modules() if "lora_" in name}
    base = sum(m.in_features * m.out_features for m in linears if id(m) not in adapters)
    adapter = sum(m.in_features * m.out_features for m in linears if id(m) in adapters)
    factor = 6 if case.training == "full" else 4
    tokens, scored = case.length, case.length - num_prompt(case.length)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    products = factor * base * tokens + 6 * adapter * tokens + factor * head.weight.numel() * scored
    return case.rows * (products + 6 * config.num_hidden_layers * width * tokens**2)
