"""`prefill`: the reasoning tag that the prompt has already opened, so that no completion begins with it.

    chat prompts  what the chat template writes behind the assistant's header, from `<think>` on
    text prompts  what stands from a last `<think>` on at the end of the prompt itself

A strict format reward that is not given it scores 0 for ever. Source: reproduced with open-r1#637.
Left out: templates that open another tag.
"""

from __future__ import annotations

import re
from typing import Any

OPENED = "<think>"
_AT_THE_END = re.compile(r"<think>\s*\Z")


def prefill_of(tokenizer: Any, prompt: Any) -> str:
    """What is written of the completion itself by the prompt (text) or the chat template (messages), "" for nothing.

    Args:
        tokenizer: with a chat template; None for text.
        prompt: text, or chat messages.
    """
    if isinstance(prompt, str):
        return prefill_in(prompt, "")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return ""
    messages = list(prompt)
    bare = tokenizer.apply_chat_template(messages, tokenize=False)
    ready = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    header = ready.removeprefix(bare)
    place = header.find(OPENED)
    return "" if place < 0 else header[place:]


def prefill_in(prompt: Any, of_template: str) -> str:
    """That of one prompt: `of_template` for chat messages; text says itself whether it ends in an opened tag."""
    if not isinstance(prompt, str):
        return of_template
    found = _AT_THE_END.search(prompt[-1000:])
    return found.group() if found else ""
