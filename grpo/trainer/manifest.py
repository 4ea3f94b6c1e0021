"""The JSON of a checkpoint: MANIFEST.json, which says what a whole checkpoint is, and what state.json can hold.

The manifest lists every file with size and sha256, and carries the hash of itself: it is written in one canonical way,
so that not one byte of it can change unnoticed. Left out: compatibility with other schema versions (there is one).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo.errors import clip
from grpo.trainer.tensor_file import CheckpointError, FileFacts, open_regular

SCHEMA = 1
FORMAT = "leangrpo checkpoint"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
FILE_STEM = re.compile(r"[a-z][a-z0-9_]{0,40}")

_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Manifest:
    """What a verified manifest says. `files` has state.json and `<stem>.safetensors` by name."""

    run_id: str
    step: int
    config_hash: str
    files: dict[str, FileFacts]


def manifest_bytes(files: Mapping[str, FileFacts], *, run_id: str, step: int, config_hash: str) -> bytes:
    """The text of a manifest."""
    listed = {name: asdict(facts) for name, facts in files.items()}
    identity = {"run_id": run_id, "step": step, "config_hash": config_hash}
    return seal({"format": FORMAT, "schema": SCHEMA, **identity, "files": listed})


def seal(body: Mapping[str, Any]) -> bytes:
    """`body` and the hash of its own canonical text, in the one way in which it is written."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, verified to the last byte.

    Raises:
        CheckpointError: it is missing, unreadable, damaged, or of another format or schema.
    """
    path = folder / MANIFEST
    try:
        descriptor, _ = open_regular(path)
        try:
            text = os.read(descriptor, _MAX_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    body = parse_json(path, text)
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not the manifest of a checkpoint")
    if body.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: schema is {clip(body.get('schema'))} (this version reads {SCHEMA})")
    body.pop("sha256", None)
    manifest = _manifest(body)
    if manifest is None or seal(body) != text:
        raise CheckpointError(f"{path}: is damaged")
    return manifest


def _manifest(body: Mapping[str, Any]) -> Manifest | None:
    """None if something in it is not what it should be: names and sizes are used, so they are checked."""
    try:
        files = {name: FileFacts(**facts) for name, facts in body["files"].items()}
        manifest = Manifest(body["run_id"], body["step"], body["config_hash"], files)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    stems = [name.removesuffix(".safetensors") for name in files if name != STATE]
    plain = all(f"{stem}.safetensors" in files and FILE_STEM.fullmatch(stem) for stem in stems)
    return manifest if plain and STATE in files and type(manifest.step) is int and manifest.step >= 0 else None


def json_problem(value: Any, path: str) -> str | None:
    """Why `value` would not come back from JSON as it is, in words that name the place; None if it would.

    Floats come back to the last bit. A tuple passes, and comes back as a list.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value} (want a finite number)"
    if value is None or isinstance(value, str | int | float):
        return None
    if isinstance(value, list | tuple):
        children = [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    elif isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            return f"{path} has the key {clip(repr(odd[0]))} (want text)"
        children = [(f"{path}.{key}", child) for key, child in value.items()]
    else:
        return f"{path} is {clip(repr(value))} (want a JSON value)"
    return next((problem for name, child in children if (problem := json_problem(child, name))), None)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without NaN or Infinity. Raises `CheckpointError` naming `path`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
