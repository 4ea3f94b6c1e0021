"""Log-probs by one unchunked float64 log-softmax over full logits: slow, obvious, shares no code with grpo/kernels."""

import torch

from grpo.kernels import TokenLogprobs


def oracle(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0) -> TokenLogprobs:
    """As `token_logprobs`, float64 and differentiable throughout (entropy and lse too)."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None].double() if isinstance(temperature, torch.Tensor) else temperature)
    all_logprobs = torch.log_softmax(logits, dim=-1)
    chosen = all_logprobs.gather(1, targets.long()[:, None])[:, 0]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return TokenLogprobs(chosen, entropy, torch.logsumexp(logits, dim=-1))
