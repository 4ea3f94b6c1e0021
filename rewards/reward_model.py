"""A reward model as a reward: a Hugging Face sequence classifier reads prompt and completion, its logit 0 is the score.

    r = logits(template(prompt, completion))[0]

Source: reward models of Stiennon et al. (arXiv 2009.01325) and their use in trainers. Each sequence is run at its own
length among others of a batch, padded on the right under a mask.
Left out: scores per step, and any sharing of memory with the policy: it holds its own weights where it runs, from its
first call on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.probes import plain_prompt


class RewardModel:
    """See `reward_model`, which makes one."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.__name__ = options["name"]
        self._model, self._tokenizer, self._options = model, tokenizer, options

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """One score per completion."""
        import torch

        model, tokenizer = self._loaded()
        rows = [self._ids(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        pad = model.config.pad_token_id
        size = self._options["batch_size"] if pad is not None else 1  # without one, the last token cannot be found
        scores: list[float] = []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            width = max(map(len, batch))
            ids = torch.full((len(batch), width), pad or 0)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(row)] = torch.tensor(row)
                mask[place, : len(row)] = 1
            with torch.inference_mode():
                logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            scores += logits[:, 0].double().tolist()
        return scores

    def _ids(self, tokenizer: Any, prompt: Any, completion: Any) -> list[int]:
        text, special = self._text(tokenizer, prompt, plain_prompt(completion))
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        limit = self._options["max_length"] or getattr(self._model.config, "max_position_embeddings", None) or len(ids)
        if len(ids) > limit:
            raise ValueError(f"{self.__name__}: {len(ids)} tokens (want at most {limit}, what the reward model reads)")
        return ids

    def _text(self, tokenizer: Any, prompt: Any, completion: str) -> tuple[str, bool]:
        """The text to judge, and whether special tokens are still to be added."""
        if self._options["template"] is not None:
            return self._options["template"](prompt, completion), True
        if getattr(tokenizer, "chat_template", None):
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            messages = [*before, {"role": "assistant", "content": completion}]
            return tokenizer.apply_chat_template(messages, tokenize=False), False
        return plain_prompt(prompt) + completion, True

    def _loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer, loaded at the first call."""
        if isinstance(self._model, str):
            try:
                import torch
                import transformers
            except ImportError as error:
                raise ImportError(f"{self.__name__}: a reward model wants torch and transformers ({error})") from None
            device = self._options["device"]
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            name = self._model
            kind = transformers.AutoModelForSequenceClassification
            model = kind.from_pretrained(name, dtype=self._options["dtype"], revision=self._options["revision"])
            if self._tokenizer is None:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=self._options["revision"])
            self._model = model.to(device).eval()
        return self._model, self._tokenizer


def reward_model(
    model: Any,
    tokenizer: Any = None,
    *,
    template: Callable[[Any, str], str] | None = None,
    name: str = "reward_model",
    **options: Any,
) -> RewardModel:
    """A sequence classifier as a batch reward; its first logit, as it is.

    Args:
        model: folder or hub id, or a model (then with `tokenizer`; it is put into evaluation mode).
        tokenizer: None: the one beside the weights.
        template: (prompt, completion text) → text to judge; None: the tokenizer's chat template, else both joined.
        name: in the metrics.
        options: batch_size = 8 sequences at once; max_length = None, tokens beyond which a completion is a fault (the
            model's own limit); device = "auto"; dtype = "auto"; revision = None, a commit on the hub.

    Raises:
        TypeError: an unknown option, or a model without tokenizer.

    >>> reward_model("some/reward-model", name="helpful").__name__
    'helpful'
    """
    known = {"batch_size": 8, "max_length": None, "device": "auto", "dtype": "auto", "revision": None}
    if unknown := sorted(options.keys() - known.keys()):
        raise TypeError(f"reward_model: no option {unknown[0]!r} (there are {', '.join(known)})")
    if not isinstance(model, str):
        if tokenizer is None:
            raise TypeError("reward_model: tokenizer is None (want the tokenizer of the model)")
        model.eval()
    return RewardModel(model, tokenizer, {**known, **options, "template": template, "name": name})
