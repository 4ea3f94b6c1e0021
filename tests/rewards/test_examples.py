"""The worked examples in every docstring run, and importing the package is light."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import rewards

MODULES = ["rewards", *(f"rewards.{info.name}" for info in pkgutil.iter_modules(rewards.__path__))]
# Machinery whose example would start a process.
WITHOUT_EXAMPLES = {"rewards", "rewards.worker", "rewards.worker_main", "rewards.worker_frames"}


@pytest.mark.parametrize("name", MODULES)
def test_worked_examples(name):
    failures, tried = doctest.testmod(importlib.import_module(name))
    assert failures == 0
    assert tried > 0 or name in WITHOUT_EXAMPLES


def test_every_public_function_has_a_worked_example():
    for name in rewards.__all__:
        assert ">>>" in (getattr(rewards, name).__doc__ or ""), name


def test_import_is_light():
    """No torch, numpy or grpo; ≤ 0.2 s of CPU time over an empty interpreter."""
    code = (
        "import sys, time; start = time.process_time(); import rewards; seconds = time.process_time() - start; "
        "print(seconds, *sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'grpo', 'sympy'}))"
    )
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy
    assert float(seconds) <= 0.2
