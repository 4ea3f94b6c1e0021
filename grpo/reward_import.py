"""From the name of a reward function to the function: "module:function" or "path/file.py:function".

A file is run once for each content, so that an edited one is another module. Left out: what the function is given
(reward_loading.py).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.errors import InputError, clip


def describe(value: object, limit: int = 200) -> str:
    """What came from user code, as one printable line: a repr, or an exception's type and text. Never raises."""
    try:
        text = (
            f"{type(value).__name__}: {value}".removesuffix(": ") if isinstance(value, BaseException) else repr(value)
        )
    except Exception:  # the boundary to user code: its __str__ or __repr__
        text = f"{type(value).__name__} that cannot be shown"
    return "".join(letter if letter.isprintable() else "�" for letter in clip(text, limit))


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message: the known name most like `name`, or nothing."""
    close = difflib.get_close_matches(name, [str(each) for each in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def resolve(text: str, label: str) -> Any:
    """What `text` names. Raises `InputError` starting with `label` when that cannot be imported or is not there."""
    where, colon, attribute = text.rpartition(":")
    if not (colon and where and attribute):
        raise InputError(f'{label}: is not the name of a function (want "module:function" or "path/file.py:function")')
    is_file = where.endswith(".py") or "/" in where
    module = _load_file(Path(where).expanduser(), label) if is_file else _load_module(where, label)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            source = getattr(module, "__file__", None) or where
            raise InputError(f"{label}: {source} has no {attribute!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """`folders` first on sys.path, as after `python -m`; later last, for imports inside functions, hiding nothing."""
    names = [str(folder) for folder in folders]
    sys.path[:0] = names
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        yield
    finally:
        for name in names:
            with suppress(ValueError):  # the imported code may have removed it
                sys.path.remove(name)
        sys.path.extend(name for name in names if name not in sys.path)


def _load_module(name: str, label: str) -> ModuleType:
    with _importable(Path.cwd()), _import_errors(label, _files_here(name)):
        return importlib.import_module(name)


class _FreshSource(importlib.machinery.SourceFileLoader):
    """Reads the source itself: a bytecode cache is keyed by whole seconds and may be that of the text before."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError(f"no bytecode cache for {path}")


def _load_file(path: Path, label: str) -> ModuleType:
    """The module in `path`, run once for each content: an edited file is a new module."""
    path = path.resolve()
    if path.suffix != ".py" or not path.is_file():
        what = "is not a .py file" if path.is_file() else "no such file"
        near = nearest(path.name, [each.name for each in path.parent.glob("*.py")])
        raise InputError(f"{label}: {path}: {what}{near}")
    key = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"_reward_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{key}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, _FreshSource(name, str(path)))
    assert spec is not None and spec.loader is not None  # the loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their classes up there
    try:
        with _importable(path.parent, Path.cwd()), _import_errors(label):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _import_errors(label: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the boundary to user code: a module without a main guard may even sys.exit()
        raise InputError(f"{label}: import failed: {describe(error)}{hint}") from error


def _files_here(name: str) -> str:
    top = name.partition(".")[0]
    here = [path.stem if path.suffix == ".py" else path.name for path in Path.cwd().iterdir()]
    return "" if top in here else nearest(top, here)
