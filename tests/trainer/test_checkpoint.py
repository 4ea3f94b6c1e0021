"""The checkpoint format: every bit comes back, and nothing but a whole checkpoint of ours is read or removed."""

import hashlib
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from grpo.errors import InputError, RunError
from grpo.trainer import tensor_file
from grpo.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    SaveError,
    clean_leftovers,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from grpo.trainer.manifest import seal

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {"run_id": "run-1", "config_hash": "c0ffee"}


def bits(tensor):
    """What equality means here: dtype, shape and every byte (NaN payloads and −0 included)."""
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Syncing costs time here; its order is tested in test_checkpoint_faults.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def assert_same(got, want):
    assert got.step == want.step
    assert got.state == want.state
    assert {f: list(t) for f, t in got.tensors.items()}.keys() == want.tensors.keys()
    for file, tensors in want.tensors.items():
        assert got.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert bits(got.tensors[file][name]) == bits(tensor), f"{file}/{name}"


def small(step, value=None):
    """A checkpoint whose numbers all say which step it is."""
    value = float(step) if value is None else value
    tensors = {
        "policy": {"weights/a": torch.full((3, 2), value, dtype=torch.bfloat16), "weights/b": torch.tensor(value)},
        "optimizer": {"optimizer/a/exp_avg": torch.full((3, 2), value)},
    }
    return Checkpoint(step, tensors, {"step": step, "value": value})


def save(run_dir, checkpoint, **options):
    return save_checkpoint(run_dir, checkpoint, **IDENTITY, **options)


def steps_in(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def hostile_tensors():
    shared = torch.arange(12.0)
    return {
        "fp32": torch.randn(5, 7),
        "fp64": torch.randn(3, dtype=torch.float64),
        "fp16": torch.randn(3).half(),
        "bf16": torch.randn(33).bfloat16(),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "fp8 wide": torch.randn(9).to(torch.float8_e5m2),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.tensor([-(2**31)], dtype=torch.int32),
        "int16": torch.tensor([-300, 300], dtype=torch.int16),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255, 7], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "0-d": torch.tensor(3.25, dtype=torch.float64),
        "0-d bool": torch.tensor(True),
        "empty": torch.empty(0),
        "empty 2-d": torch.empty(4, 0, 2, dtype=torch.int64),
        "one": torch.ones(1, 1, 1),
        "transposed": torch.randn(4, 6).t(),
        "strided": torch.arange(40)[3::8],
        "expanded": torch.tensor([1.5]).expand(4, 3),
        "whole": shared,
        "view of whole": shared[4:9],
        "tied": shared,
        "reversed": torch.arange(5).flip(0),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "odd values": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, -float("inf")]),
        "nan payload": torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32).view(torch.float32),
        'nested/näme " \\ \n': torch.tensor([1, 2]),
        "": torch.tensor([3]),
    }


@pytest.mark.parametrize("chunk", [16, 2**24], ids=["many chunks", "one chunk"])
def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(tensor_file, "_CHUNK", chunk)
    want = Checkpoint(7, {"optimizer": hostile_tensors(), "rollouts": {}, "rng": {"torch": torch.get_rng_state()}}, {})
    path = save(tmp_path, want)
    got = load_checkpoint(path)
    assert_same(got, want)
    held = got.tensors["optimizer"]
    assert held["whole"].data_ptr() != held["tied"].data_ptr()
    held["whole"].zero_()  # memory of its own: writing to one changes no other
    assert held["view of whole"].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_the_files_are_plain_safetensors(tmp_path):
    tensors = {name: tensor for name, tensor in hostile_tensors().items() if name != ""}
    path = save(tmp_path, Checkpoint(1, {"optimizer": tensors}, {})) / "optimizer.safetensors"
    with safetensors.safe_open(path, "pt") as file:  # the reference implementation of the format
        assert set(file.keys()) == set(tensors)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert bits(tensor) == bits(tensors[name]), name
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    data = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for name, entry in header.items():  # aligned, so that a reader may map them
        assert (data + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_it_reads_what_the_safetensors_package_writes(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([1, 2], dtype=torch.int8), "c": torch.randn(5).bfloat16()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    facts = tensor_file.FileFacts(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    got = tensor_file.read_tensors(path, facts)
    assert {name: bits(tensor) for name, tensor in got.items()} == {n: bits(t) for n, t in tensors.items()}


def test_state_comes_back_exactly(tmp_path):
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16, 123456789.123456789, 2.0, 3.0e-5]
    state = {
        "floats": floats,
        "ints": [0, -1, 2**63, 10**40],
        "text": ["", 'ü 漢 \U0001f600 \ud800 \x00 \n "', "NaN"],
        "nested": {"": {"a.b": [None, True, False, [], {}]}},
    }
    got = load_checkpoint(save(tmp_path, Checkpoint(0, {}, state))).state
    assert got == state
    assert [struct.pack("<d", value) for value in got["floats"]] == [struct.pack("<d", value) for value in floats]
    assert [type(value) for value in got["floats"]] == [float] * len(floats)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [1.0, {"kl": float("nan")}]}, r"state.a\[1\].kl is nan"),
        ({"a": float("-inf")}, "state.a is -inf"),
        ({"a": {1: 2}}, "state.a has the key 1"),
        ({"a": (1, {2})}, r"state.a\[1\] is \{2\}"),
        ({"a": torch.tensor(1)}, r"state.a is tensor\(1\)"),
    ],
)
def test_state_that_would_not_come_back_is_refused_by_name(tmp_path, value, problem):
    save(tmp_path, small(1))
    with pytest.raises(RunError, match=f"step_000002 was not saved: {problem}"):
        save(tmp_path, Checkpoint(2, {}, value))
    assert steps_in(tmp_path) == ["step_000001"]


@pytest.mark.parametrize("file", ["policy", "adapter"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_never_committed(tmp_path, file, bad, dtype):
    save(tmp_path, small(1))
    tensor = torch.zeros(1000, dtype=torch.float64)
    tensor[[0, 617, 999][int(torch.randint(3, ()))]] = bad
    tensors = {"good": torch.ones(3), "count": torch.tensor([1]), "bad.weight": tensor.to(dtype)}
    with pytest.raises(RunError, match="step_000002 was not saved: bad.weight has values that are not finite"):
        save(tmp_path, Checkpoint(2, {file: tensors}, {}))
    assert steps_in(tmp_path) == ["step_000001"]
    save(tmp_path, Checkpoint(2, {"rollouts": tensors}, {}))  # log-probs of masked tokens may be −inf


def test_large_finite_weights_pass(tmp_path):
    tensors = {"a": torch.full((1000,), 3e38), "b": torch.full((9,), 65504.0).half(), "c": torch.tensor([448.0])}
    tensors["c"] = tensors["c"].to(torch.float8_e4m3fn)
    assert_same(load_checkpoint(save(tmp_path, c := Checkpoint(2, {"policy": tensors}, {}))), c)


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_a_tensor_without_a_safetensors_form_is_refused(tmp_path, tensor):
    with pytest.raises(TypeError, match="odd: .* cannot be written"):
        save(tmp_path, Checkpoint(1, {"policy": {"odd": tensor}}, {}))
    assert steps_in(tmp_path) == []


# --- the folder ----------------------------------------------------------------------------------------------


def test_the_folder_is_what_the_manifest_says(tmp_path):
    path = save(tmp_path, small(12))
    assert path == tmp_path / "checkpoints" / "step_000012"
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert {k: manifest[k] for k in ("schema", "step", "run_id", "config_hash")} == {
        "schema": 1,
        "step": 12,
        **IDENTITY,
    }
    for name, facts in manifest["files"].items():
        data = (path / name).read_bytes()
        assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {member.name for member in path.iterdir()} == {*manifest["files"], "MANIFEST.json"}
    assert {stat.S_IMODE(member.stat().st_mode) for member in path.iterdir()} == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("precious", "link"):
        with pytest.raises(FileExistsError):
            tensor_file.write_file(tmp_path / name, [b"x"])
    assert (tmp_path / "precious").read_text() == "data"
    assert not (tmp_path / "nowhere").exists()


def test_nothing_saved_is_none_and_only_names_of_ours_are_looked_at(tmp_path):
    assert newest_checkpoint(tmp_path, report=pytest.fail) is None
    for name in ("best", "step_5", "step_000009.bak", ".tmp-step_000009-1", ".del-step_000009-1", "xstep_000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path, report=pytest.fail) is None
    save(tmp_path, small(3))
    assert_same(newest_checkpoint(tmp_path, report=pytest.fail), small(3))


def test_the_newest_is_by_number_and_the_newest_two_are_kept(tmp_path):
    for step in (5, 90, 999_999, 1_000_000):
        save(tmp_path, small(step))
    assert steps_in(tmp_path) == ["step_1000000", "step_999999"]
    assert newest_checkpoint(tmp_path, report=pytest.fail).step == 1_000_000
    save(tmp_path, small(1_000_001), keep=1)
    assert steps_in(tmp_path) == ["step_1000001"]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, small(2_000_000), keep=0)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, small(1))
    save(tmp_path, small(2, value=1.0))
    for value in (2.0, 3.0):
        save(tmp_path, small(2, value=value), keep=2)
        assert steps_in(tmp_path) == ["step_000001", "step_000002"]
        assert_same(newest_checkpoint(tmp_path, report=pytest.fail), small(2, value=value))


def test_a_future_that_was_given_up_is_removed_and_does_not_count(tmp_path):
    for step in (10, 20):
        save(tmp_path, small(step), keep=1)
    save(tmp_path, small(15), keep=1)  # resumed from somewhere before 20
    assert steps_in(tmp_path) == ["step_000015"]


def test_prune_leaves_everything_that_is_not_wholly_ours(tmp_path):
    for step in range(1, 7):
        save(tmp_path, small(step), keep=9)
    folder = tmp_path / "checkpoints"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    elsewhere = save(tmp_path / "other run", small(5))
    (folder / "step_000001" / "notes.txt").write_text("mine")
    (folder / "step_000002" / "MANIFEST.json").unlink()
    (folder / "step_000003" / "policy.safetensors").unlink()
    (folder / "step_000003" / "policy.safetensors").symlink_to(outside / "data")
    (folder / "step_000004" / "sub").mkdir()
    (folder / "step_000000").symlink_to(elsewhere)
    (folder / "step_000777").write_text("a file")
    save(tmp_path, small(8), keep=1)
    left = ["step_000000", "step_000001", "step_000002", "step_000003", "step_000004", "step_000008", "step_000777"]
    assert steps_in(tmp_path) == left
    assert (outside / "data").read_text() == "precious"
    assert (folder / "step_000000").is_symlink()
    assert_same(load_checkpoint(elsewhere), small(5))


def test_what_stands_in_the_place_of_a_step_is_moved_aside_once_and_never_deleted(tmp_path):
    path = save(tmp_path, small(2))
    (path / "MANIFEST.json").write_text("damaged")
    save(tmp_path, small(2, value=5.0))
    assert steps_in(tmp_path) == ["step_000002", "step_000002.old"]
    with pytest.raises(SaveError, match="step_000002.old is in the way and not a checkpoint of ours"):
        save(tmp_path, small(2, value=6.0))
    assert steps_in(tmp_path) == ["step_000002", "step_000002.old"]
    assert_same(newest_checkpoint(tmp_path, report=pytest.fail), small(2, value=5.0))


def test_leftovers_go_and_nothing_else_does(tmp_path):
    path = save(tmp_path, small(1))
    folder = path.parent
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    for name in (".tmp-step_000002-123", ".del-step_000001-9", ".del-step_000003.old-9"):
        (folder / name).mkdir()
        (folder / name / "policy.safetensors").write_bytes(b"half")
    (folder / ".del-step_000001-9" / "link").symlink_to(outside / "data")
    stays = [".tmp-step_000002", ".tmp-mine-1", ".git", "step_000004.old", ".tmp-step_000005-1"]
    for name in stays:
        (folder / name).mkdir()
    (folder / ".tmp-step_000005-1" / "subfolder").mkdir()
    (folder / ".tmp-step_000006-1").symlink_to(outside)
    (folder / ".tmp-step_000007-1").write_text("a file")
    removed = clean_leftovers(tmp_path)
    assert [p.name for p in removed] == [".del-step_000001-9", ".del-step_000003.old-9", ".tmp-step_000002-123"]
    assert steps_in(tmp_path) == sorted([*stays, ".tmp-step_000006-1", ".tmp-step_000007-1", "step_000001"])
    assert (outside / "data").read_text() == "precious"
    assert clean_leftovers(tmp_path / "nothing here") == []


def test_a_run_folder_may_be_a_link_but_not_what_is_below(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert save(tmp_path / "run", small(1)) == tmp_path / "disk" / "checkpoints" / "step_000001"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    for refused in (
        lambda: save(tmp_path / "other", small(2)),
        lambda: clean_leftovers(tmp_path / "other"),
        lambda: newest_checkpoint(tmp_path / "other", report=pytest.fail),
    ):
        with pytest.raises(InputError, match="checkpoints: is a symbolic link"):
            refused()
    assert steps_in(tmp_path / "disk") == ["step_000001"]


@pytest.mark.parametrize("run_id", ["..", "a/b", "", "a b"])
def test_run_ids_are_plain_names(tmp_path, run_id):
    with pytest.raises(InputError, match="run id"):
        save_checkpoint(tmp_path, small(1), run_id=run_id, config_hash="")


@pytest.mark.parametrize("stem", ["../policy", "a/b", "", "MANIFEST", ".hidden", "policy.safetensors"])
def test_file_stems_are_plain_names(tmp_path, stem):
    with pytest.raises(ValueError, match="cannot be used"):
        save(tmp_path, Checkpoint(1, {stem: {}}, {}))
    assert not (tmp_path / "checkpoints").exists()


# --- loading -------------------------------------------------------------------------------------------------


def rewrite(path, **changes):
    """The manifest changed by someone who can also seal it."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]
    (path / "MANIFEST.json").write_bytes(seal({**manifest, **changes}))


def files_of(path, **changes):
    return {**json.loads((path / "MANIFEST.json").read_text())["files"], **changes}


def in_policy(path, data):
    (path / "policy.safetensors").write_bytes(data)


def as_link(file):
    def change(path):
        (path / file).rename(path.parent.parent / "moved")
        (path / file).symlink_to(path.parent.parent / "moved")

    return change


def as_pipe(path):
    (path / "policy.safetensors").unlink()
    os.mkfifo(path / "policy.safetensors")


DAMAGES = {
    "policy is a link": (as_link("policy.safetensors"), "policy.safetensors: is a symbolic link"),
    "manifest is a link": (as_link("MANIFEST.json"), "MANIFEST.json: is a symbolic link"),
    "state is a link": (as_link("state.json"), "state.json: is a symbolic link"),
    "policy is a pipe": (as_pipe, "policy.safetensors: is not a regular file"),
    "policy missing": (lambda path: (path / "policy.safetensors").unlink(), "policy.safetensors: No such file"),
    "state missing": (lambda path: (path / "state.json").unlink(), "state.json: No such file"),
    "manifest missing": (lambda path: (path / "MANIFEST.json").unlink(), "MANIFEST.json: No such file"),
    "policy empty": (lambda path: in_policy(path, b""), "policy.safetensors: has 0 bytes"),
    "policy longer": (
        lambda p: in_policy(p, (p / "policy.safetensors").read_bytes() + b"x"),
        "policy.safetensors: has",
    ),
    "policy zeroed": (
        lambda p: in_policy(p, bytes((p / "policy.safetensors").stat().st_size)),
        "policy.safetensors: header is damaged",
    ),
    "swapped": (
        lambda p: (p / "optimizer.safetensors").replace(p / "policy.safetensors"),
        "optimizer.safetensors: No such|policy.safetensors: has",
    ),
    "manifest not JSON": (lambda p: (p / "MANIFEST.json").write_text("{"), "MANIFEST.json: is not valid JSON"),
    "manifest a list": (lambda p: (p / "MANIFEST.json").write_text("[1]"), "MANIFEST.json: is not a JSON object"),
    "manifest too deep": (lambda p: (p / "MANIFEST.json").write_text("[" * 10**5), "MANIFEST.json: is not valid JSON"),
    "other format": (lambda p: rewrite(p, format="x"), "MANIFEST.json: is not the manifest of a checkpoint"),
    "newer schema": (lambda p: rewrite(p, schema=2), r"MANIFEST.json: schema is 2 \(this version reads 1\)"),
    "step is text": (lambda p: rewrite(p, step="1"), "MANIFEST.json: is damaged"),
    "file above": (
        lambda p: rewrite(p, files=files_of(p, **{"../../x.safetensors": {"size": 1, "sha256": "0" * 64}})),
        "MANIFEST.json: is damaged",
    ),
    "pickle in the list": (
        lambda p: rewrite(p, files=files_of(p, **{"optimizer.pt": {"size": 1, "sha256": "0" * 64}})),
        "MANIFEST.json: is damaged",
    ),
    "odd size": (
        lambda p: rewrite(p, files=files_of(p, **{"policy.safetensors": {"size": -1, "sha256": "0" * 64}})),
        "MANIFEST.json: is damaged",
    ),
    "no state": (lambda p: rewrite(p, files={}), "MANIFEST.json: is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_skipped_and_with_strict_refused(tmp_path, damage):
    change, line = DAMAGES[damage]
    save(tmp_path, small(1))
    path = save(tmp_path, small(2))
    change(path)
    with pytest.raises(CheckpointError, match=line) as caught:
        load_checkpoint(path)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    said = []
    assert_same(newest_checkpoint(tmp_path, report=said.append), small(1))
    assert said == [f"skipped a checkpoint: {caught.value}"]
    with pytest.raises(CheckpointError, match=line):
        newest_checkpoint(tmp_path, strict=True, report=pytest.fail)


def sealed(path, header, data=b"", pad=b""):
    """policy.safetensors with this header and right hashes: only the layout itself is wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = struct.pack("<Q", len(text) + len(pad)) + text + pad + data
    in_policy(path, file)
    facts = {"size": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    rewrite(path, files=files_of(path, **{"policy.safetensors": facts}))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_LAYOUTS = {
    "not JSON": (b"{", b""),
    "a list": ([1], b""),
    "entry is text": ({"a": "x"}, b"12345678"),
    "unknown dtype": ({"a": entry("F31")}, b"12345678"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, b"12345678"),
    "fractional shape": ({"a": entry(shape=(2.0,))}, b"12345678"),
    "shape too large": ({"a": entry(shape=(2**62,), offsets=(0, 2**64))}, b"12345678"),
    "too short": ({"a": entry(offsets=(0, 4))}, b"1234"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"1" * 20),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"1" * 12),
    "bytes left over": ({"a": entry()}, b"123456789"),
    "bytes missing": ({"a": entry()}, b"1234"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"),
    "too deep": (b"[" * 10**5, b""),
}


@pytest.mark.parametrize("kind", BAD_LAYOUTS)
def test_a_wrong_layout_is_refused_even_with_right_hashes(tmp_path, kind):
    path = save(tmp_path, small(1))
    sealed(path, *BAD_LAYOUTS[kind])
    with pytest.raises(CheckpointError, match="policy.safetensors: header is damaged"):
        load_checkpoint(path)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path):
    path = save(tmp_path, small(1))
    file = struct.pack("<Q", 2**60) + b"{}"
    in_policy(path, file)
    facts = {"size": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    rewrite(path, files=files_of(path, **{"policy.safetensors": facts}))
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        load_checkpoint(path)


def test_the_test_s_own_sealing_is_accepted(tmp_path):
    path = save(tmp_path, small(1))
    sealed(path, {"a": entry(shape=(2,)), "__metadata__": {"format": "pt"}}, struct.pack("<ff", 1.0, 2.0), pad=b"  ")
    assert load_checkpoint(path).tensors["policy"]["a"].tolist() == [1.0, 2.0]


def test_nan_in_state_json_is_not_json(tmp_path):
    path = save(tmp_path, small(1))
    (path / "state.json").write_bytes(b'{"a": NaN}')
    facts = {"size": 10, "sha256": hashlib.sha256(b'{"a": NaN}').hexdigest()}
    rewrite(path, files=files_of(path, **{"state.json": facts}))
    with pytest.raises(CheckpointError, match="state.json: is not valid JSON"):
        load_checkpoint(path)


def test_a_renamed_folder_loads_by_path_but_is_not_the_newest(tmp_path):
    save(tmp_path, small(1))
    path = save(tmp_path, small(2))
    path.rename(path.with_name("step_000900"))
    said = []
    assert_same(newest_checkpoint(tmp_path, report=said.append), small(1))
    assert said[0].endswith("step_000900: holds step 2 (want the step of its name)")
    assert_same(load_checkpoint(path.with_name("step_000900")), small(2))


def test_a_linked_folder_is_refused(tmp_path):
    path = save(tmp_path, small(1))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(CheckpointError, match="link: is a symbolic link"):
        load_checkpoint(tmp_path / "link")


def test_if_none_can_be_used_it_says_so_instead_of_starting_over(tmp_path):
    for step in (1, 2):
        (save(tmp_path, small(step)) / "state.json").write_text("{}")
    said = []
    with pytest.raises(CheckpointError, match="no checkpoint of 2 can be used .*step_000002/state.json"):
        newest_checkpoint(tmp_path, report=said.append)
    assert len(said) == 2


def test_it_reads_a_replaced_folder_when_its_successor_did_not_arrive(tmp_path):
    path = save(tmp_path, small(2))
    path.rename(path.with_name("step_000002.old"))
    assert_same(newest_checkpoint(tmp_path, report=pytest.fail), small(2))
    save(tmp_path, small(2, value=9.0))
    assert steps_in(tmp_path) == ["step_000002"]
    assert_same(newest_checkpoint(tmp_path, report=pytest.fail), small(2, value=9.0))


def test_loading_runs_no_code(tmp_path):
    """No unpickler is even made, in a process that hears of each one; the ear is tried on a pickle first."""
    want = save(tmp_path, Checkpoint(1, {"optimizer": hostile_tensors()}, {"a": 1}))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(print))
    program = f"""
import sys, pickle
import grpo.trainer.checkpoint as c
heard = []
sys.addaudithook(lambda event, args: heard.append(event) if event in {{"pickle.find_class", "exec", "compile"}} else None)
pickle.load(open({str(tmp_path / "evil.pkl")!r}, "rb"))
assert heard == ["pickle.find_class"], heard
import _pickle
class Refused:
    def __init__(self, *a, **k): raise AssertionError("an unpickler was made")
for module in (pickle, _pickle):
    module.Unpickler = module.load = module.loads = Refused
got = c.newest_checkpoint({str(tmp_path)!r}, report=print)
assert got.step == 1 and heard == ["pickle.find_class"], heard
"""
    assert want.exists()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_saving_needs_no_memory_for_a_second_copy(tmp_path):
    """256 MB in one tensor: the peak rises by chunks, not by copies. Loading holds the tensors once."""
    from grpo.ledger import Ledger, MemoryMeter

    if not MemoryMeter().source.startswith("peak"):
        pytest.skip("/proc/self/clear_refs is not writable here")
    tensor = torch.ones(2**26)
    save(tmp_path, small(1))
    ledger = Ledger()
    with ledger.phase("before"):
        pass
    with ledger.phase("save"):
        path = save(tmp_path, Checkpoint(2, {"policy": {"a": tensor}}, {}))
    with ledger.phase("load"):
        load_checkpoint(path)
    row = ledger.take()
    before = row["phase/before/peak_gib"]
    assert row["phase/save/peak_gib"] - before < 0.06
    assert 0.2 < row["phase/load/peak_gib"] - before < 0.31


@pytest.mark.gpu
def test_tensors_on_a_device_are_saved_without_a_second_copy_of_them(tmp_path):
    torch.cuda.init()
    tensors = {name: tensor.detach().cuda() for name, tensor in hostile_tensors().items()}
    tensors["transposed"] = torch.randn(6, 4, device="cuda").t()
    tensors["large"] = torch.randn(2**26, device="cuda").bfloat16()
    want = {name: tensor.cpu() for name, tensor in tensors.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path = save(tmp_path, Checkpoint(1, {"optimizer": tensors}, {}))
    assert torch.cuda.max_memory_allocated() - before < 2**20
    got = load_checkpoint(path).tensors["optimizer"]
    assert torch.equal(got["large"].view(torch.int16), want["large"].view(torch.int16))
    assert {n: bits(t) for n, t in got.items() if n != "large"} == {n: bits(t) for n, t in want.items() if n != "large"}
    tensors["large"][5] = float("nan")
    with pytest.raises(RunError, match="large has values that are not finite"):
        save(
            tmp_path,
            Checkpoint(2, {"policy": tensors | {"odd values": torch.ones(1), "nan payload": torch.ones(1)}}, {}),
        )
