"""Damaged and dangerous weight files, and what the content hash tells apart."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_files import PICKLE_NAME, SAFETENSORS_NAME
from peft_dist.runner.adapter_hash import LEAF_BYTES, content_hash
from peft_dist.runner.adapter_modules import ModuleShape, describe_modules
from peft_dist.runner.adapter_tensors import LoadedAdapter, inspect_adapter, load_adapter
from peft_dist.runner.adapter_weights import open_weights
from tests.tiny_models import FAMILIES, random_adapter

MODEL = FAMILIES["llama"]()
MODULES = describe_modules(MODEL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_adapter(MODEL, tmp_path / "adapter", r=4)


def load_it(folder: Path, name: str = "a", **options: Any) -> LoadedAdapter:
    adapter = load_adapter(name, folder, MODULES, **options)
    options.pop("pin_memory", None)
    assert inspect_adapter(name, folder, MODULES, **options) == adapter.spec
    return adapter


def content(folder: Path) -> str:
    return load_it(folder).spec.content_hash


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def as_file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Safetensors files.


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated(folder, keep):
    path = folder / SAFETENSORS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="again"):
        load_it(folder)


def test_trailing_bytes(folder):
    with (folder / SAFETENSORS_NAME).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(AdapterError, match="its header says"):
        load_it(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10) + b"{}",
        as_file(b"no json"),
        as_file(b"[]"),
        as_file(b'{"a":' * 50_000),
        as_file({"a": 1}),
        as_file({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
        as_file({"a": {**ENTRY, "shape": [2.5]}}, bytes(8)),
        as_file({"a": {**ENTRY, "shape": [2**70]}}, bytes(8)),
        as_file({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
        as_file({"a": {**ENTRY, "data_offsets": [0, 800]}}, bytes(8)),
        as_file({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
        as_file({"a": {**ENTRY, "more": 1}}, bytes(8)),
        as_file({"a": ENTRY, "b": ENTRY}, bytes(8)),
        as_file({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
        as_file(b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}", bytes(16)),
    ],
    ids=str,
)
def test_damaged_headers(tmp_path, data):
    (tmp_path / SAFETENSORS_NAME).write_bytes(data)
    with pytest.raises(AdapterError, match=SAFETENSORS_NAME), open_weights(tmp_path, False):
        pass


def read_ours(folder: Path) -> dict[str, torch.Tensor]:
    with open_weights(folder, False) as file:
        return file.read()


TENSOR = st.tuples(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.lists(st.integers(0, 5), max_size=3)
).map(lambda drawn: torch.randn(drawn[1]).to(drawn[0]))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.dictionaries(st.text(min_size=1, max_size=8), TENSOR, max_size=6))
def test_intact_files_read_as_the_library_reads_them(tmp_path, tensors):
    tensors.pop("__metadata__", None)
    save_file(tensors, tmp_path / SAFETENSORS_NAME)
    ours = read_ours(tmp_path)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name], tensor)


INTACT = save({"a": torch.ones(2, 3), "b": torch.ones(5).half(), "c": torch.ones(0, 4).bfloat16()})


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.integers(0, len(INTACT)), st.integers(0, 3), st.binary(max_size=3))
def test_damage_never_goes_further_than_the_library_lets_it(tmp_path, at, removed, inserted):
    damaged = INTACT[:at] + inserted + INTACT[at + removed :]
    (tmp_path / SAFETENSORS_NAME).write_bytes(damaged)
    try:
        ours = read_ours(tmp_path)
    except AdapterError:
        return
    try:
        theirs = load(damaged)
    except safetensors.SafetensorError as error:
        # Text that is no JSON to one reader may be to another; shapes, types and places are what counts.
        pytest.fail(f"read a file that the library refuses: {error}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)


def test_tensors_at_odd_addresses(tmp_path):
    header = {
        "odd": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [2, 10]},
    }
    values = torch.tensor([[1.5], [-2.0]])
    (tmp_path / SAFETENSORS_NAME).write_bytes(as_file(header, bytes(2) + values.numpy().tobytes()))
    assert torch.equal(read_ours(tmp_path)["a"], values)


# Pickles.


def to_pickle(folder: Path, content: object = None) -> None:
    torch.save(content or load_file(folder / SAFETENSORS_NAME), folder / PICKLE_NAME)
    (folder / SAFETENSORS_NAME).unlink()


def test_no_weights(folder):
    (folder / SAFETENSORS_NAME).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing.*--allow-pickle"):
        load_it(folder)


def test_pickle_is_refused_unless_allowed(folder):
    expected = content(folder)
    to_pickle(folder)
    with pytest.raises(AdapterError, match=r"is a pickle.*--allow-pickle"):
        load_it(folder)
    assert load_it(folder, allow_pickle=True).spec.content_hash == expected


def test_safetensors_win_over_a_pickle(folder):
    (folder / PICKLE_NAME).write_bytes(b"not even a pickle")
    load_it(folder, allow_pickle=True)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_never_runs_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    to_pickle(folder, {"a": _Trap()})
    with pytest.raises(AdapterError, match=PICKLE_NAME):
        load_it(folder, allow_pickle=True)
    assert not (folder / "trapped").exists()


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"garbage", pickle.dumps([1, 2]), b"\x80\x02", b"\x80\x02.", b"\x80\x02}q\x00."], ids=str
)
def test_damaged_pickles(folder, data):
    to_pickle(folder)
    (folder / PICKLE_NAME).write_bytes(data)
    with pytest.raises(AdapterError, match=PICKLE_NAME):
        load_it(folder, allow_pickle=True)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
def test_truncated_pickles(folder, cut):
    to_pickle(folder)
    whole = (folder / PICKLE_NAME).read_bytes()
    (folder / PICKLE_NAME).write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(AdapterError, match=PICKLE_NAME):
        load_it(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "more than named tensors"),
        ({"a": [1]}, "more than named tensors"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2).to(torch.int8)}, "int8"),
    ],
)
def test_pickles_of_other_things(folder, content, words):
    to_pickle(folder, content)
    with pytest.raises(AdapterError, match=words):
        load_it(folder, allow_pickle=True)


# The content hash.


def test_hash_is_of_the_content_alone(folder, tmp_path):
    first = load_it(folder)
    other = shutil.copytree(folder, tmp_path / "other")
    set_config(other, base_model_name_or_path="elsewhere", inference_mode=False, lora_dropout=0.5, revision="x")
    tensors = load_file(other / SAFETENSORS_NAME)
    save_file(tensors, other / SAFETENSORS_NAME, metadata={"format": "pt", "note": "saved again"})
    again = load_it(other, name="b")
    assert again.spec.content_hash == first.spec.content_hash
    assert (again.spec.name, again.spec.path) == ("b", str(other))


def test_hash_ignores_how_the_same_thing_is_written(folder):
    expected = content(folder)
    set_config(folder, r=64, rank_pattern={"q_proj": 4, "v_proj": 4}, lora_alpha=1, alpha_pattern={".*": 8})
    assert content(folder) == expected


@pytest.mark.parametrize("change", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.*": 9}}])
def test_hash_tells_scalings_apart(folder, change):
    expected = content(folder)
    set_config(folder, **change)
    assert content(folder) != expected


def test_hash_tells_weights_places_and_types_apart(folder):
    tensors = load_file(folder / SAFETENSORS_NAME)
    key = next(iter(tensors))
    seen = {content(folder)}
    changed = tensors[key].clone()
    changed[1, 1] = torch.nextafter(changed[1, 1], torch.tensor(9.0))
    moved = {name.replace("layers.0", "layers.x").replace("layers.1", "layers.0"): t for name, t in tensors.items()}
    for variant in (
        {**tensors, key: changed},
        {name.replace("layers.x", "layers.1"): t for name, t in moved.items()},
        {name: t.bfloat16() for name, t in tensors.items()},
        {name: t for name, t in tensors.items() if "layers.0" not in name},
    ):
        save_file(variant, folder / SAFETENSORS_NAME)
        seen.add(content(folder))
    assert len(seen) == 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2 * LEAF_BYTES), max_size=6), st.integers(0, 6 * LEAF_BYTES))
def test_hash_does_not_see_how_the_stream_is_cut(cuts, size):
    data = memoryview(bytes(range(251)) * (size // 251 + 1))[:size]
    edges = sorted({0, size, *(min(cut, size) for cut in cuts)})
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    assert content_hash(b"x", pieces) == content_hash(b"x", [data])
    assert content_hash(b"y", pieces) != content_hash(b"x", pieces)
    if size:
        assert content_hash(b"x", [data[:-1]]) != content_hash(b"x", [data])


def test_num_bytes(folder):
    size = sum(tensor.nbytes for tensor in load_file(folder / SAFETENSORS_NAME).values())
    assert load_it(folder).spec.num_bytes == size


def test_checking_an_adapter_holds_little_of_it_in_memory(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    wide = {name: ModuleShape("linear", 1 << 16, 1 << 10)}
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(256, 1 << 16),
        f"base_model.model.{name}.lora_B.weight": torch.ones(1 << 10, 256),
    }
    save_file(tensors, tmp_path / SAFETENSORS_NAME)
    settings = {"peft_type": "LORA", "r": 256, "lora_alpha": 256, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    del tensors
    expected = load_adapter("big", tmp_path, wide).spec
    assert expected.num_bytes > 64 << 20
    # Lets the peak begin anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    assert inspect_adapter("big", tmp_path, wide) == expected
    assert peak_memory() - before < 24 << 20


def peak_memory() -> int:
    """Bytes of this process that were in memory at once, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
