"""Floors and doors: imports only go down, each heavy library has one door, and only the top floor talks to the world.

`violations` works on source text, so that each rule is shown to fail on a few lines that break it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Every module and package directly below grpo/, and its floor. A package's floor is that of all its modules.
FLOORS = {
    **dict.fromkeys(
        [
            "batch",
            "config",
            "config_reading",
            "errors",
            "sizes",
            "ledger",
            "packing",
            "seeds",
            "trl_names",
            "algorithm",
        ],
        0,
    ),
    **dict.fromkeys(["bench_search", "bench_table"], 0),
    **dict.fromkeys(["kernels"], 1),
    **dict.fromkeys(["planner", "plan_parts", "plan_update", "plan_rollout", "plan_report"], 2),
    **dict.fromkeys(["model", "optim", "bench_models", "bench_step", "bench_card"], 2),
    **dict.fromkeys(["rollout", "scoring", "reward_calls", "reward_isolation", "reward_loading"], 3),
    **dict.fromkeys(["reward_import", "reward_placement", "reward_pool", "reward_served", "reward_spec", "data"], 3),
    **dict.fromkeys(["reward_arguments", "reward_prefill"], 3),
    **dict.fromkeys(["trainer", "sft", "export", "evaluate", "check_rewards"], 4),
    **dict.fromkeys(["cli", "__main__", "demo"], 5),
    **dict.fromkeys(["bench", "bench_process", "bench_try", "bench_peers", "bench_unsloth"], 5),
}
TOP = 5  # also the package `grpo` itself: it offers names of every floor
WITHOUT_CONFIG = ("grpo.algorithm", "grpo.kernels")

DOORS = {
    "vllm": ["grpo.rollout.vllm_*"],
    "peft": ["grpo.model.adapter"],
    "bitsandbytes": ["grpo.model.load", "grpo.optim", "grpo.bench_models"],
    "wandb": ["grpo.trainer.metrics"],
    "trackio": ["grpo.trainer.metrics"],
    "tensorboard": ["grpo.trainer.metrics"],
    "tensorboardX": ["grpo.trainer.metrics"],
    "torch.utils.tensorboard": ["grpo.trainer.metrics"],
    "datasets": ["grpo.data", "grpo.bench_peers"],
    "trl": ["grpo.bench_peers"],
    "unsloth": ["grpo.bench_unsloth"],
    "triton": ["grpo.kernels.*_triton"],
}
TALKERS = ["grpo.cli", "grpo.__main__", "grpo.demo"]
# reward_isolation compares the environment before and after a reward; it takes no value from it. rewards.worker hands
# an allowlist of it on to its processes.
# vLLM takes some of its settings from the environment alone, when it is first imported.
ENVIRONMENT_READERS = [*TALKERS, "grpo.reward_isolation", "rewards.worker", "grpo.rollout.vllm_start"]
PRINTERS = [*TALKERS, "grpo.trainer.metrics", "grpo.trainer.console"]
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True)
class Import:
    """`name` may end in something that is no module: the last part of `from a import b`."""

    name: str
    line: int
    lazy: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING:`


def within(name, package):
    return name == package or name.startswith(package + ".")


def is_type_checking(test):
    return ast.unparse(test).split(".")[-1] == "TYPE_CHECKING"


def names_in(node: ast.AST, home: list[str]) -> Iterator[str]:
    """What one statement or call imports, seen from the package `home`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = home[: len(home) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        yield from (base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def imports_of(module: str, tree: ast.AST, is_package: bool = False) -> list[Import]:
    """Every import of a module, relative ones resolved, and `import_module("…")` of a literal."""
    home = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        yield from (Import(name, node.lineno, lazy, typing) for name in names_in(node, home))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = node.body if isinstance(node, ast.If) and is_type_checking(node.test) else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy, typing or child in guarded)

    return list(walk(tree, False, False))


def floor_of(module: str) -> int | None:
    """None for a module that the table does not know."""
    parts = module.split(".")
    return TOP if len(parts) == 1 else FLOORS.get(parts[1])


def target_floor(name: str) -> int:
    """Floor of what an import names; a name that is no module comes from the package `grpo`."""
    return TOP if (floor := floor_of(name)) is None else floor


def floor_problem(module: str, found: Import) -> str | None:
    if not within(module, "grpo") or not within(found.name, "grpo") or found.typing or module == "grpo":
        return None
    if any(within(module, room) for room in WITHOUT_CONFIG) and within(found.name, "grpo.config"):
        return "imports grpo.config: the maths and the kernels take plain values"
    here, there = floor_of(module), target_floor(found.name)
    if here is not None and there > here:
        return f"imports {found.name}: floor {here} may not import floor {there}"
    return None


def ground_problem(module: str, found: Import) -> str | None:
    if within(module, "rewards") and within(found.name, "grpo"):
        return f"imports {found.name}: rewards stands alone"
    if within(module, "grpo") and within(found.name, "rewards") and not (found.lazy or found.typing):
        return f"imports {found.name} at module level: grpo loads rewards by name only"
    return None


def door_problem(module: str, found: Import) -> str | None:
    for library, doors in DOORS.items():
        if within(found.name, library) and not found.typing and not opens(module, doors):
            return f"imports {found.name}: only {' and '.join(doors)} may"
    if within(found.name, "rich") and not found.typing and module not in PRINTERS:
        return f"imports {found.name}: only {', '.join(PRINTERS)} may print"
    return None


def opens(module: str, doors: list[str]) -> bool:
    return any(fnmatchcase(module, door) for door in doors)


def call_problems(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Reads of the environment and prints in places that may not."""
    alias = {a.asname or a.name: a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            used = [f"os.{a.name}" for a in node.names if a.name in ENVIRONMENT]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = [f"os.{node.attr}"] if alias.get(node.value.id) == "os" and node.attr in ENVIRONMENT else []
        else:
            used = []
        if used and module not in ENVIRONMENT_READERS:
            yield node.lineno, f"uses {used[0]}: only {', '.join(ENVIRONMENT_READERS)} may"
        if isinstance(node, ast.Call) and is_print(node.func, alias) and module not in PRINTERS:
            yield node.lineno, f"calls {ast.unparse(node.func)}: only {', '.join(PRINTERS)} may print"


def is_print(function: ast.AST, alias: dict[str, str]) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "print"
    text = ast.unparse(function).split(".")
    streams = ("stdout", "stderr", "__stdout__", "__stderr__")
    return len(text) == 3 and alias.get(text[0]) == "sys" and text[1] in streams and text[2].startswith("write")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` with this source does against the rules: one line each, `module:line: what`."""
    tree = ast.parse(source)
    if within(module, "grpo") and floor_of(module) is None:
        return [f"{module}:1: has no floor: add {module.split('.')[1]!r} to FLOORS in tests/test_floors.py"]
    found = []
    for one in imports_of(module, tree, is_package):
        for rule in (floor_problem, ground_problem, door_problem):
            if (problem := rule(module, one)) is not None:
                found.append((one.line, problem))
    return [f"{module}:{line}: {problem}" for line, problem in sorted({*found, *call_problems(module, tree)})]


def house() -> dict[str, Path]:
    """Module name to file, of everything in the two packages."""
    files = {}
    for path in sorted([*(ROOT / "grpo").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@pytest.mark.parametrize("module", house())
def test_the_house_keeps_its_floors_and_doors(module):
    path = house()[module]
    assert violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_no_module_waits_for_itself():
    """No cycle among the imports that run when a module is imported, also within a floor."""
    files = house()
    edges = {
        module: {target for one in imports_of(module, ast.parse(path.read_text()), path.name == "__init__.py")
                 if not (one.lazy or one.typing) and (target := real_module(one.name, files)) not in (None, module)}
        for module, path in files.items()
    }  # fmt: skip
    assert cycle(edges) is None


def real_module(name, files):
    """The file that `a.b.c` is in: itself, or where the name c is defined or offered."""
    return name if name in files else name.rpartition(".")[0] if name.rpartition(".")[0] in files else None


def cycle(edges):
    """One cycle as a list of nodes, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        path.append(node)
        found = next((c for target in sorted(edges.get(node, ())) if (c := visit(target))), None)
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(edges) if (c := visit(node))), None)


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


ALLOWED = [
    ("grpo.packing", "from grpo.batch import TokenBatch"),
    ("grpo.config", "from grpo.algorithm.recipes import RECIPES"),
    ("grpo.optim", "from grpo.config import OptimizerConfig"),
    ("grpo.trainer.loop", "import grpo.rollout.engine\nfrom grpo import packing"),
    (
        "grpo.batch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo.trainer.loop import GRPOTrainer",
    ),
    ("grpo.algorithm.kl", "import typing\nif typing.TYPE_CHECKING:\n    from grpo.config import ObjectiveConfig"),
    ("grpo.algorithm.kl", "from . import surrogates"),
    ("grpo", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from grpo.trainer.loop import GRPOTrainer"),
    ("grpo.cli", "from grpo import GRPOConfig\nimport os, sys\nos.environ['A']\nprint(1)\nsys.stdout.write('a')"),
    ("grpo.scoring", "def f():\n    import rewards\n    import importlib\n    importlib.import_module('rewards.code')"),
    ("grpo.rollout.vllm_engine", "from vllm import LLM"),
    ("grpo.kernels.rope_triton", "import triton\nimport triton.language as tl"),
    ("grpo.model.load", "def f():\n    from bitsandbytes.nn import Linear4bit"),
    ("grpo.data", "def f():\n    import datasets"),
    ("grpo.model.policy", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel"),
    ("grpo.trainer.metrics", "import wandb\nprint(1)"),
    ("grpo.trainer.console", "from rich.table import Table"),
    ("grpo.trainer.base", "import sys\nConsole(sys.stdout)\nself.print(1)\nfile.write('a')\nsys.stdout.isatty()"),
    ("grpo.trainer.report", "import os\nos.path.exists('a')\nos.fsync(1)\nenviron = {}\nself.environ"),
    ("rewards.math", "from rewards.extract import boxed\nimport re\nimport datasetsx"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_is_allowed_passes(module, source):
    assert violations(module, source) == []


FORBIDDEN = [
    # floors
    ("grpo.batch", "import grpo.kernels.logprobs", "floor 0 may not import floor 1"),
    ("grpo.packing", "from grpo.kernels import token_logprobs", "floor 0 may not import floor 1"),
    ("grpo.kernels.logprobs", "from grpo.model.load import load_model", "floor 1 may not import floor 2"),
    ("grpo.model.policy", "from grpo.rollout.engine import Sampling", "floor 2 may not import floor 3"),
    ("grpo.rollout.hf_engine", "from grpo.trainer.update import update", "floor 3 may not import floor 4"),
    ("grpo.trainer.loop", "from grpo import cli", "floor 4 may not import floor 5"),
    ("grpo.trainer.loop", "from grpo import GRPOConfig", "floor 4 may not import floor 5"),
    ("grpo.trainer.loop", "import grpo", "floor 4 may not import floor 5"),
    ("grpo.scoring", "def f():\n    from grpo.sft import SFTTrainer", "grpo.scoring:2: imports grpo.sft"),
    ("grpo.model.policy", "from ..trainer import loop", "imports grpo.trainer.loop: floor 2 may not import floor 4"),
    ("grpo.model.policy", "from ..trainer.loop import x", "floor 2 may not import floor 4"),
    ("grpo.data", "import importlib\nimportlib.import_module('grpo.demo')", "floor 3 may not import floor 5"),
    (
        "grpo.data",
        "try:\n    import grpo.trainer.loop\nexcept ImportError:\n    pass",
        "floor 3 may not import floor 4",
    ),
    ("grpo.data", "class A:\n    import grpo.trainer", "floor 3 may not import floor 4"),
    ("grpo.data", "if TYPE_CHECKING:\n    pass\nelse:\n    import grpo.trainer", "floor 3 may not import floor 4"),
    ("grpo.data", "if not TYPE_CHECKING:\n    import grpo.trainer", "floor 3 may not import floor 4"),
    ("grpo.helpers", "x = 1", "has no floor: add 'helpers' to FLOORS in tests/test_floors.py"),
    ("grpo.helpers.deep", "x = 1", "has no floor: add 'helpers' to FLOORS in tests/test_floors.py"),
    ("grpo.batch", "import grpo.helpers", "floor 0 may not import floor 5"),
    # config stays out of the maths
    ("grpo.algorithm.kl", "from grpo.config import ObjectiveConfig", "take plain values"),
    ("grpo.kernels.logprobs", "def f():\n    from grpo import config", "take plain values"),
    # two grounds
    ("rewards.math", "from grpo.errors import InputError", "rewards stands alone"),
    ("rewards.math", "def f():\n    import grpo", "rewards stands alone"),
    ("grpo.scoring", "import rewards", "grpo loads rewards by name only"),
    ("grpo.demo", "from rewards import math_accuracy", "grpo loads rewards by name only"),
    # doors
    ("grpo.rollout.hf_engine", "def f():\n    import vllm", "only grpo.rollout.vllm_* may"),
    ("grpo.cli", "from vllm.sampling_params import SamplingParams", "only grpo.rollout.vllm_* may"),
    ("grpo.model.policy", "from peft import PeftModel", "only grpo.model.adapter may"),
    (
        "grpo.model.policy",
        "import bitsandbytes as bnb",
        "only grpo.model.load and grpo.optim and grpo.bench_models may",
    ),
    ("grpo.trainer.loop", "import wandb", "only grpo.trainer.metrics may"),
    ("grpo.trainer.loop", "import trackio", "only grpo.trainer.metrics may"),
    ("grpo.trainer.loop", "from torch.utils.tensorboard import SummaryWriter", "only grpo.trainer.metrics may"),
    ("grpo.trainer.loop", "from torch.utils import tensorboard", "only grpo.trainer.metrics may"),
    ("grpo.trainer.build", "from datasets import Dataset", "only grpo.data and grpo.bench_peers may"),
    ("grpo.kernels.logprobs", "import triton", "only grpo.kernels.*_triton may"),
    ("grpo.model.rope_triton", "import triton.language", "only grpo.kernels.*_triton may"),
    ("rewards.judge", "__import__('vllm')", "only grpo.rollout.vllm_* may"),
    # the environment
    ("grpo.config", "import os\nos.environ['A']", "uses os.environ"),
    ("grpo.trainer.metrics", "import os\nos.getenv('A')", "uses os.getenv"),
    ("grpo.kernels.logprobs", "import os as system\nsystem.environ.get('A')", "uses os.environ"),
    ("grpo.data", "from os import environ", "uses os.environ"),
    ("rewards.code", "import os\nos.environ", "uses os.environ"),
    # printing
    ("grpo.trainer.loop", "def f():\n    print('a')", "grpo.trainer.loop:2: calls print"),
    ("grpo.data", "import sys\nsys.stderr.write('a')", "calls sys.stderr.write"),
    ("grpo.data", "import sys as s\ns.stdout.writelines(['a'])", "calls s.stdout.writelines"),
    ("grpo.trainer.base", "from rich.console import Console", "may print"),
    ("grpo.trainer.base", "def f():\n    import rich", "may print"),
    ("rewards.math", "print(1)", "calls print"),
]


@pytest.mark.parametrize(("module", "source", "problem"), FORBIDDEN)
def test_each_rule_fails_on_what_breaks_it(module, source, problem):
    found = violations(module, source)
    assert len(found) == 1, found
    assert problem in found[0]


def test_a_relative_import_in_a_package_starts_at_the_package():
    assert violations("grpo.model", "from ..trainer import loop", is_package=True) == [
        "grpo.model:1: imports grpo.trainer.loop: floor 2 may not import floor 4"
    ]
    assert violations("grpo.model", "from . import policy", is_package=True) == []


# --- light imports -------------------------------------------------------------------------------------------

HEAVY = ["torch", "triton", "vllm", "bitsandbytes", "wandb", "peft", "datasets", "transformers"]


def run(program):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["grpo", "rewards"])
def test_the_packages_import_without_any_heavy_library(package):
    if not (ROOT / package / "__init__.py").exists():
        pytest.skip(f"{package}/__init__.py does not exist yet")
    run(f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\nimport {package}")


@pytest.mark.parametrize("package", ["grpo", "rewards", "grpo.config", "grpo.errors", "grpo.ledger", "grpo.batch"])
def test_the_packages_import_no_heavy_library_where_there_is_one(package):
    if not any((ROOT / name).exists() for name in (f"{package.replace('.', '/')}.py", f"{package}/__init__.py")):
        pytest.skip(f"{package} does not exist yet")
    run(f"import sys\nimport {package}\nfound = set({HEAVY}) & set(sys.modules)\nassert not found, found")
