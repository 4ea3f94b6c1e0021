"""Every name of vLLM that the engine touches, with the parameters it passes: the first thing to fail when the pin moves."""

import importlib
import importlib.util
import inspect

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]

CALLS = [
    ("vllm.entrypoints.llm", "LLM.__init__", "model skip_tokenizer_init trust_remote_code revision dtype enforce_eager "
     "hf_overrides gpu_memory_utilization kv_cache_memory_bytes quantization"),
    ("vllm.entrypoints.llm", "LLM.generate", "prompts sampling_params use_tqdm lora_request"),
    ("vllm.entrypoints.llm", "LLM.sleep", "level mode"),
    ("vllm.entrypoints.llm", "LLM.wake_up", "tags"),
    ("vllm.entrypoints.llm", "LLM.collective_rpc", "method"),
    ("vllm.entrypoints.llm", "LLM.reset_prefix_cache", ""),
    ("vllm.engine.arg_utils", "EngineArgs.__init__", "max_model_len max_num_seqs max_num_batched_tokens logprobs_mode "
     "enable_sleep_mode enable_prefix_caching generation_config load_format enable_lora max_loras max_lora_rank "
     "lora_target_modules"),
    ("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", "request_ids internal"),
    ("vllm.lora.lora_model", "LoRAModel.from_lora_tensors", "lora_model_id tensors peft_helper device dtype "
     "model_vocab_size weights_mapper"),
    ("vllm.lora.peft_helper", "PEFTHelper.from_dict", "config_dict"),
    ("vllm.lora.peft_helper", "PEFTHelper.validate_legal", "lora_config"),
    ("vllm.lora.model_manager", "LoRAModelManager.activate_adapter", "lora_id"),
    ("vllm.lora.model_manager", "LoRAModelManager.add_adapter", ""),
    ("vllm.lora.model_manager", "LoRAModelManager.remove_adapter", ""),
    ("vllm.device_allocator.sleep_mode_backend", "SleepModeBackend.suspend", "level"),
    ("vllm.device_allocator.sleep_mode_backend", "SleepModeBackend.resume", "tags"),
    ("vllm.device_allocator.cumem", "CuMemAllocator.get_instance", ""),
    ("vllm.device_allocator.cumem", "CuMemAllocator.wake_up", "tags"),
    ("vllm.device_allocator.cumem", "unmap_and_release", "allocation_handle"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "path", "parameters"), CALLS, ids=[path for _, path, _ in CALLS])
def test_a_call_has_the_parameters_that_are_passed(module, path, parameters):
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    known = inspect.signature(found).parameters
    assert not set(parameters.split()) - set(known), sorted(known)


def test_fields_of_requests_and_answers():
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, RequestOutput

    wanted = {"n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop_token_ids", "logprobs",
              "flat_logprobs", "prompt_logprobs", "detokenize", "ignore_eos"}  # fmt: skip
    assert wanted <= set(inspect.signature(SamplingParams).parameters)
    request = LoRARequest("a", 1, "/nonexistent")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("a", 1, "/nonexistent")
    assert {"token_ids", "logprobs", "finish_reason"} <= set(inspect.signature(CompletionOutput).parameters)
    assert {"outputs", "prompt_logprobs", "num_cached_tokens"} <= set(inspect.signature(RequestOutput).parameters)
