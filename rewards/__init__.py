"""Reward functions, extractors and scorers for reinforcement learning on verifiable tasks.

    rewards: [{function: "rewards:math_accuracy"}]           in a configuration
    from rewards import math_accuracy, boxed, Score          in Python

Stands alone: needs no torch and nothing of the trainer. Factories make a reward from arguments (`code_tests`, `judge`,
`reward_model`); adapters take functions written for other trainers (`from_verl`, …). Beside what is listed here:
`rewards.tasks` (generated problems), `rewards.worker` (processes that can be killed), `rewards.sandbox`.
"""

from rewards.adapters import from_openrlhf, from_reasoning_gym, from_verifiers, from_verl
from rewards.blocks import fenced_code, json_text
from rewards.check import check
from rewards.code import code_tests
from rewards.combine import clip, extracted, gate, product, route, schedule, weighted_sum
from rewards.countdown import countdown
from rewards.extract import after_think, all_boxed, answer_part, boxed, hash_answer, last_number, xml_tag
from rewards.formats import partial_tags, strict_tags, think_answer_format, think_format
from rewards.json_schema import json_schema
from rewards.judge import judge
from rewards.language import language_share
from rewards.length import length_cosine, length_linear, shorter_correct, soft_overlong
from rewards.math_equality import math_equal, math_verify_accuracy
from rewards.repetition import token_repetition, word_repetition
from rewards.reward_model import reward_model
from rewards.score import Score
from rewards.scorers import exact_match, find_answer, math_accuracy, numeric, parse_number
from rewards.text import f1, multiple_choice, regex_match, squad_exact
from rewards.tools import tool_call

__all__ = [
    # scorers
    "math_accuracy",
    "math_verify_accuracy",
    "math_equal",
    "numeric",
    "exact_match",
    "f1",
    "squad_exact",
    "multiple_choice",
    "regex_match",
    "json_schema",
    "tool_call",
    "countdown",
    # factories: arguments in, a reward out
    "code_tests",
    "judge",
    "reward_model",
    # functions written for other trainers
    "from_verl",
    "from_openrlhf",
    "from_verifiers",
    "from_reasoning_gym",
    # formats
    "think_answer_format",
    "think_format",
    "strict_tags",
    "partial_tags",
    # shape of the text
    "length_linear",
    "length_cosine",
    "soft_overlong",
    "shorter_correct",
    "token_repetition",
    "word_repetition",
    "language_share",
    # combinators
    "weighted_sum",
    "product",
    "gate",
    "clip",
    "schedule",
    "route",
    "extracted",
    # before a run
    "check",
    # extractors
    "Score",
    "boxed",
    "all_boxed",
    "xml_tag",
    "after_think",
    "answer_part",
    "hash_answer",
    "last_number",
    "find_answer",
    "parse_number",
    "fenced_code",
    "json_text",
]
