"""Reward functions, extractors and scorers for reinforcement learning on verifiable tasks.

    rewards: [{function: "rewards:math_accuracy"}]           in a configuration
    from rewards import math_accuracy, boxed, Score          in Python

Stands alone: needs no torch and nothing of the trainer. Left out until later: code, judges, reward models, adapters,
combinators, symbolic algebra and generated tasks.
"""

from rewards.extract import after_think, all_boxed, boxed, hash_answer, last_number, xml_tag
from rewards.formats import think_answer_format
from rewards.score import Score
from rewards.scorers import exact_match, find_answer, math_accuracy, numeric, parse_number

__all__ = [
    "math_accuracy",
    "numeric",
    "exact_match",
    "think_answer_format",
    "Score",
    "boxed",
    "all_boxed",
    "xml_tag",
    "after_think",
    "hash_answer",
    "last_number",
    "find_answer",
    "parse_number",
]
