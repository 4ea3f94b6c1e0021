"""The house: imports only go down, one library has one door, and only the doors read the environment or print.

The checker is a function over source text, so that each rule is also shown to fail on a source that breaks it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    0: ["grpo.batch", "grpo.errors", "grpo.seeds", "grpo.config", "grpo.trl_names", "grpo.algorithm", "grpo.packing", "grpo.ledger"],
    1: ["grpo.kernels"],
    2: ["grpo.model", "grpo.optim"],
    3: ["grpo.rollout", "grpo.scoring", "grpo.reward_loading", "grpo.reward_calls", "grpo.reward_isolation", "grpo.data"],
    4: ["grpo.trainer", "grpo.sft", "grpo.evaluate"],
    5: ["grpo.cli", "grpo.__main__", "grpo.demo"],
}  # fmt: skip
DOORS = {
    "vllm": ["grpo.rollout.vllm_engine"],
    "peft": ["grpo.model.adapter"],
    "bitsandbytes": ["grpo.model.load", "grpo.optim"],
    "wandb": ["grpo.trainer.metrics"],
    "datasets": ["grpo.data"],
    "triton": ["grpo.kernels"],
}
SCREENS = ["grpo.cli", "grpo.__main__", "grpo.demo"]
READS_ENVIRONMENT = [*SCREENS, "grpo.reward_isolation"]  # the last compares it, to see what a reward has changed
PRINTS = [*SCREENS, "grpo.trainer.metrics", "grpo.trainer.console"]
NOT_FOR_MATHS = "grpo.config"


def floor_of(module):
    for floor, rooms in FLOORS.items():
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return floor
    return None


def imports_of(tree):
    """(module, line, whether it is at module level and not under TYPE_CHECKING) of every import."""
    lazy, typing_only = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy |= {id(child) for child in ast.walk(node)}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "grpo"]
        for name in names:
            yield name, node.lineno, id(node) not in lazy, id(node) in typing_only


def problems_of(module, source):
    """Every rule that `source`, as `module`, breaks: one line each."""
    tree, found = ast.parse(source), []
    own = floor_of(module)
    if own is None and module not in ("grpo",) and not module.startswith("rewards"):
        found.append(f"{module}: has no floor (add it to FLOORS)")
    for name, line, at_module_level, typing_only in imports_of(tree):
        top = name.split(".")[0]
        where = f"{module}:{line}: imports {name}"
        if module.startswith("rewards") and top == "grpo":
            found.append(f"{where} (rewards stands alone)")
        if module.startswith("grpo") and top == "rewards" and at_module_level:
            found.append(f"{where} (grpo imports rewards only inside a function)")
        if top == "grpo" and not typing_only and own is not None:
            other = floor_of(name)
            if other is not None and other > own:
                found.append(f"{where} (floor {own} may not import floor {other})")
        if name.startswith(NOT_FOR_MATHS) and module.startswith(("grpo.algorithm", "grpo.kernels")):
            found.append(f"{where} (the maths does not know the configuration)")
        if top in DOORS and not typing_only and not any(module == d or module.startswith(f"{d}.") for d in DOORS[top]):
            found.append(f"{where} (its door is {DOORS[top][0]})")
        if top == "triton" and at_module_level and not module.endswith("_triton"):
            found.append(f"{where} (at module level only in *_triton.py)")
    return found + effects_of(module, tree)


def effects_of(module, tree):
    found = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if text in ("os.environ", "os.getenv") and module not in READS_ENVIRONMENT:
            found.append(f"{module}:{node.lineno}: reads the environment")
        if isinstance(node, ast.Call) and text.startswith(("print(", "sys.stdout.write(")) and module not in PRINTS:
            found.append(f"{module}:{node.lineno}: prints")
    return found


def modules():
    for package in ("grpo", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def test_the_house_stands():
    found = [problem for name, path in modules() for problem in problems_of(name, path.read_text())]
    assert not found, "\n".join(found)


BROKEN = {
    "an import that goes up": ("grpo.packing", "from grpo.model.policy import Policy", "floor 0 may not import floor 2"),
    "a lazy import that goes up": ("grpo.data", "def f():\n    import grpo.trainer.loop", "floor 3 may not import floor 4"),
    "a submodule named through the package": ("grpo.kernels.x", "from grpo import sft", "floor 1 may not import floor 4"),
    "maths that knows the configuration": ("grpo.algorithm.kl", "import grpo.config", "does not know the configuration"),
    "a library through the wrong door": ("grpo.trainer.loop", "def f():\n    import peft", "its door is grpo.model.adapter"),
    "triton at module level": ("grpo.kernels.logprobs", "import triton", "only in *_triton.py"),
    "rewards inside": ("grpo.scoring", "import rewards", "only inside a function"),
    "the trainer inside rewards": ("rewards.scorers", "def f():\n    from grpo import batch", "rewards stands alone"),
    "the environment": ("grpo.model.load", "import os\nos.environ['A'] = '1'", "reads the environment"),
    "a print": ("grpo.trainer.loop", "print('x')", "prints"),
    "a room without a floor": ("grpo.brandnew", "", "has no floor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_can_fail(case):
    module, source, wanted = BROKEN[case]
    assert any(wanted in problem for problem in problems_of(module, source))


def test_types_may_be_named_upwards():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo.trainer.loop import GRPOTrainer"
    assert problems_of("grpo.trainer.state", source) == [] and problems_of("grpo.packing", source) == []


BLOCKED = "torch triton vllm bitsandbytes wandb peft datasets transformers"


def test_importing_the_packages_needs_nothing_heavy():
    code = f"""
import sys
for name in {BLOCKED.split()!r}:
    sys.modules[name] = None
import grpo, rewards
import grpo.config, grpo.errors, grpo.cli, grpo.algorithm.recipes
grpo.GRPOConfig(num_generations=4)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
