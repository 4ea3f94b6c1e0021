"""Starting vLLM in this process: which version, on which device, with which arguments.

vLLM pins torch exactly and changes its inside between versions, so one version is accepted and another is refused. The
process's generators and matmul precision stay as they were. Left out: what the engine then does (vllm_engine.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from grpo.errors import InputError, clip
from grpo.model.load import make_nf4_tables
from grpo.plan_rollout import BATCHED_TOKENS
from grpo.rollout.vllm_weights import check_rank
from grpo.seeds import generators_kept
from grpo.sizes import format_bytes

TESTED = "0.26.0"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # an engine's adapter slots have one of these


@dataclass(frozen=True)
class VLLMOptions:
    """What an engine is started with.

    `source` is a folder or hub id of full weights; `adapter_rank` None means full fine-tuning; `adapter_targets` are
    the last parts of the adapted modules' names; `kv_cache_bytes` is the budget of the KV cache and `kv_cache_room` the
    largest that should fit (planner.py), named when the engine does not start. With `share_weights` sleep keeps the
    weights on the GPU, for `share_base`.
    """

    source: str
    dtype: str
    max_length: int
    max_sequences: int
    kv_cache_bytes: int
    adapter_rank: int | None = None
    adapter_targets: tuple[str, ...] = ()
    kv_cache_room: int = 0
    share_weights: bool = False
    load_in_4bit: bool = False
    cuda_graphs: bool = True
    revision: str | None = None
    trust_remote_code: bool = False


def start(options: VLLMOptions) -> Any:
    """`vllm.LLM`, awake. Raises `InputError` as `check_vllm` does, and where it does not fit."""
    check_vllm()
    free, total = torch.cuda.mem_get_info()
    arguments: dict[str, Any] = {
        "model": options.source,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": options.max_length,
        "max_num_seqs": options.max_sequences,
        "max_num_batched_tokens": max(BATCHED_TOKENS, options.max_sequences),
        "logprobs_mode": "processed_logprobs",
        "enable_sleep_mode": True,
        "enable_prefix_caching": True,
        "enforce_eager": not options.cuda_graphs,
        # The check at start asks for this share of the card to be free, whatever the cache is given.
        "gpu_memory_utilization": max(0.01, int(free / total * 1000 - 5) / 1000),
        "kv_cache_memory_bytes": options.kv_cache_bytes,
    }
    if options.adapter_rank is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": check_rank(options.adapter_rank, _RANKS),
            "lora_target_modules": list(options.adapter_targets) or None,
        }
    if options.load_in_4bit:
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    else:  # the head's products in float32, as the trainer forms them
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    precision = torch.get_float32_matmul_precision()
    if options.load_in_4bit:
        make_nf4_tables()  # made while vLLM loads, they would lie in the pool that sleep unmaps
    try:
        with generators_kept():
            from vllm import LLM

            return LLM(**arguments)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"rollout.engine is 'vllm', which did not start with a KV cache of {format_bytes(options.kv_cache_bytes)} "
            f"({free_memory()}, about {format_bytes(max(0, options.kv_cache_room))} of it for the cache; want less "
            f"rollout.kv_cache or rollout.max_sequences): {clip(error, 300)}"
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)


def check_vllm() -> None:
    """Raise `InputError` where vLLM cannot run: no CUDA device, absent, or another version than the tested one."""
    if not torch.cuda.is_available():
        raise InputError("rollout.engine is 'vllm' but there is no CUDA device (want rollout.engine: hf)")
    # vLLM reads these when it is first imported and has no other way to be told.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise InputError("VLLM_ENABLE_V1_MULTIPROCESSING is set (want 0: the engine shares memory with the trainer)")
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"rollout.engine is 'vllm' but vllm cannot be imported: {clip(error, 200)} (want vllm {TESTED}: "
            "pip install 'leangrpo[vllm]', or rollout.engine: hf)"
        ) from error
    if vllm.__version__.split("+")[0] != TESTED:
        raise InputError(f"vllm is {vllm.__version__} (want {TESTED}, the version the vllm engine was tested with)")


def free_memory() -> str:
    """Of the current device, for messages: `60.00 GiB of 80.00 GiB free`."""
    free, total = torch.cuda.mem_get_info()
    return f"{format_bytes(free)} of {format_bytes(total)} free"
