"""From what a user wrote (YAML, overrides, flat and foreign names) to the sections of `config.py`; problems in a line.

Knows no knob by name, but for rewards given as a list and the defaults of a recipe.
Left out: what values are allowed (config.py), which foreign names there are (trl_names.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from grpo.algorithm.recipes import RECIPES
from grpo.errors import InputError, clip
from grpo.trl_names import FLAT_ALIASES, translate, translate_sft

Model = type[BaseModel]


class _UniqueKeyLoader(yaml.SafeLoader):
    """safe_load that refuses the second of two equal keys instead of keeping it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; duplicate keys, a missing file and other shapes are an `InputError`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (want a YAML configuration)")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}: not valid YAML{where}: {clip(problem)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: holds {type(values).__name__} (want sections: `model: …`, `data: …`)")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in `values`, the value read as YAML. Raises `InputError`."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"override {clip(override)!r} has no value (want section.key=value)")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {clip(override)!r}: {clip(text)!r} is not valid YAML") from None
    *parents, leaf = path.split(".")
    here = values
    for name in parents:
        if here.get(name) is None:
            here[name] = {}
        elif isinstance(here[name], list) and name == "rewards":
            here[name] = {"functions": here[name]}
        if not isinstance(here[name], dict):
            raise InputError(f"override {clip(override)!r}: {name} is not a section")
        here = here[name]
    here[leaf] = value


# --- names ---------------------------------------------------------------------------------------------------


def _sections(cls: Model) -> dict[str, Model]:
    found: dict[str, Model] = {}
    for name, field in cls.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found[name] = candidate
    return found


def flat_names(cls: Model) -> dict[str, str]:
    """Flat name → dotted path. A leaf keeps its own name when no alias of `trl_names` renames it."""
    names: dict[str, str] = {}
    renamed = {path: alias for alias, path in FLAT_ALIASES.items()}
    for section, model in _sections(cls).items():
        for leaf in model.model_fields:
            path = f"{section}.{leaf}"
            flat = renamed.get(path, leaf)
            if flat not in cls.model_fields:
                if flat in names:
                    raise AssertionError(f"flat name {flat} means both {names[flat]} and {path}")
                names[flat] = path
    return names


def known_paths(cls: Model) -> list[str]:
    """Every dotted path of the configuration."""
    sections = _sections(cls)
    own = [name for name in cls.model_fields if name not in sections]
    return own + [f"{name}.{leaf}" for name, model in sections.items() for leaf in model.model_fields]


def nested(cls: Model, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Flat and foreign names → sections. Returns (values, notes, problems)."""
    values, notes, problems = (translate if "rollout" in cls.model_fields else translate_sft)(dict(values))
    flat, sections = flat_names(cls), _sections(cls)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "rewards" and isinstance(value, list):
            found[name] = {"functions": value}
        elif name in sections and isinstance(value, Mapping):
            found[name] = {**found.get(name, {}), **value}
        elif name in cls.model_fields:
            found[name] = value
        elif name in flat:
            section, leaf = flat[name].split(".")
            if leaf in (values.get(section) or {}):
                problems.append(f"{name} is given twice (flat and in {section})")
            found[section] = {**(found.get(section) or {}), leaf: value}
        else:
            problems.append(_unknown(cls, name))
    if isinstance(found.get("rewards"), dict):
        found["rewards"] = _reward_entries(found["rewards"])
    if isinstance(found.get("objective"), dict):
        found["objective"] = _recipe_defaults(found["objective"])
    return (
        {
            name: {} if name in sections and name != "adapter" and value is None else value
            for name, value in found.items()
        },
        notes,
        problems,
    )


def _reward_entries(section: dict[str, Any]) -> dict[str, Any]:
    functions = section.get("functions")
    if not isinstance(functions, list):
        return section
    return {
        **section,
        "functions": [{"function": entry} if isinstance(entry, str) else entry for entry in functions],
    }


def _recipe_defaults(section: dict[str, Any]) -> dict[str, Any]:
    recipe = RECIPES.get(section.get("recipe", "dapo")) if isinstance(section.get("recipe", "dapo"), str) else None
    return {**dict(recipe.defaults), **section} if recipe else section


def _unknown(cls: Model, path: str) -> str:
    nearest = nearest_name(path, [*cls.model_fields, *known_paths(cls), *flat_names(cls)])
    return f"{path} is unknown" + (f" (did you mean {nearest}?)" if nearest else "")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`: the same leaf in another section first, then the nearest spelling."""
    known = list(known)
    leaf = name.rsplit(".", 1)[-1]
    leaves: dict[str, str] = {}
    for candidate in known:
        leaves.setdefault(candidate.rsplit(".", 1)[-1], candidate)
    same_section = [k for k in known if "." in name and k.rpartition(".")[0] == name.rpartition(".")[0]]
    for pool in (same_section, known):
        if close := difflib.get_close_matches(name, pool, n=1, cutoff=0.75):
            return close[0]
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return leaves[close[0]] if close else None


_WANT = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
    "missing": "a value",
    "finite_number": "a finite number",
    "none_required": "null",
    "model_type": "a section with keys",
}
_TYPE_WANT = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
}


def line(cls: Model, detail: ErrorDetails) -> str:
    """One of pydantic's errors in a line: the path, the value, what is wanted."""
    # A union adds the tried type's name to the location; only names of the configuration are shown.
    parts = [part for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
    parts = [part for part in parts if part not in ("str", "int", "float", "bool")]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    path = path.replace("rewards.functions[", "rewards[")
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown(cls, path)
    want = _WANT.get(kind, "").format(**detail.get("ctx", {}))
    if not want:
        want = next((text for prefix, text in _TYPE_WANT.items() if kind.startswith(prefix)), "")
    if not want:
        want = detail["msg"].removeprefix("Value error, want ")
    value = "missing" if kind == "missing" else clip(repr(detail["input"]))
    return f"{path} is {value} (want {want})"
