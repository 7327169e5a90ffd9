"""Disk, host, device with real files: what is read when, what a lost file breaks, and what unloading frees."""

from __future__ import annotations

import select
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, ConfigError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request
from peft_dist.patches.lora_layers import SelectiveLinear
from peft_dist.runner import adapter_store
from peft_dist.runner.adapter_tensors import inspect_adapter
from peft_dist.runner.replica import Replica, build_replica
from tests.tiny_models import make_model, random_adapter, target_modules

NUM_ADAPTERS = 5
WEIGHTS = "adapter_model.safetensors"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = [5, 6, 7, 8]
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers")
    model = make_model("llama", folder / "base")
    for number in range(NUM_ADAPTERS):
        random_adapter(model, folder / f"a{number}", 4 + number, 8.0, target_modules("llama"), seed=number)
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[int]]:
    """What each adapter answers when there is room for all."""
    names = [f"a{number}" for number in range(NUM_ADAPTERS)]
    with LLM(root / "base", {name: root / name for name in names}, device="cpu", num_blocks=64) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([PROMPT] * NUM_ADAPTERS, greedy, names, use_tqdm=False)
    answers = {name: output.outputs[0].token_ids for name, output in zip(names, outputs, strict=True)}
    assert len({tuple(tokens) for tokens in answers.values()}) == NUM_ADAPTERS
    return answers


@contextmanager
def replica(root: Path, **options: object) -> Iterator[Replica]:
    options = {"device": "cpu", "num_blocks": 64, "num_threads": 1, **options}
    config = EngineConfig(str(root / "base"), **options)  # type: ignore[arg-type]
    made = build_replica(config)
    yield made
    made.close()


def request_of(name: str, spec: AdapterSpec | None, num_tokens: int = NUM_TOKENS) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return Request(name, list(PROMPT), params, 0, 0.0, spec)


def finish(served: Replica) -> dict[str, tuple[list[int], str | None]]:
    """Run until nothing is left; tokens and error by request."""
    got: dict[str, tuple[list[int], str | None]] = {}
    engine = served.engine
    while engine.has_work:
        note(got, engine.step(0.0))
        engine.scheduler.adapters.check()
        if engine.waits_for_load:
            assert select.select([served.fileno()], [], [], 60)[0], "a load got lost"
    served.store.pool.check()
    return got


def note(got: dict[str, tuple[list[int], str | None]], progress: Sequence[SequenceProgress]) -> None:
    for item in progress:
        tokens, _ = got.get(item.request_id, ([], None))
        got[item.request_id] = (tokens + item.token_ids, item.error)


def ask(served: Replica, *specs: AdapterSpec) -> list[tuple[list[int], str | None]]:
    for number, spec in enumerate(specs):
        served.engine.add_request(request_of(f"r{number}", spec))
    got = finish(served)
    return [got[f"r{number}"] for number in range(len(specs))]


def register_all(served: Replica, root: Path) -> list[AdapterSpec]:
    return [served.load_adapter(f"a{number}", root / f"a{number}") for number in range(NUM_ADAPTERS)]


def num_used_pages(served: Replica) -> int:
    pool = served.store.pool
    return sum(layer.pages.capacity - layer.pages.num_free for layer in pool._layers)


def test_registering_reads_nothing_into_memory_and_use_fills_the_tiers(root, expected) -> None:
    with replica(root, max_loras=2) as served:
        specs = register_all(served, root)
        manager, host = served.engine.scheduler.adapters, served.store.host
        assert host.num_bytes == 0 and num_used_pages(served) == 0 and manager.resident == []
        for spec in specs:
            assert ask(served, spec) == [(expected[spec.name], None)]
        assert (host.hits, host.misses) == (0, NUM_ADAPTERS)
        assert host.num_bytes == sum(spec.num_bytes for spec in specs)
        assert manager.resident == [spec.content_hash for spec in specs[-2:]]
        # Device, then host; the disk is not asked again.
        assert ask(served, specs[-1], specs[0]) == [(expected["a4"], None), (expected["a0"], None)]
        assert (host.hits, host.misses) == (1, NUM_ADAPTERS)
        assert manager.evictions == NUM_ADAPTERS - 2 + 1


def test_a_registration_has_only_to_put_in_what_the_inspection_made(root, expected, monkeypatch) -> None:
    with replica(root) as made:
        before = dict(made.runner.model.named_modules())
        specs = [made.inspect_adapter(name, root / name, allow_pickle=False) for name in ("a0", "a1")]
        assert dict(made.runner.model.named_modules()) == before, "the model may be running"
        with monkeypatch.context() as patch:
            patch.setattr(SelectiveLinear, "wrap", None)
            for spec in specs:
                made.register_adapter(spec)
        assert ask(made, *specs) == [(expected["a0"], None), (expected["a1"], None)]


def test_an_inspection_starts_no_team_of_threads(root, monkeypatch) -> None:
    """Whoever asks: beside other programs on the same cores each of its thousands of small operators waited for one."""
    found: list[int] = []

    def noting(*arguments, **options):
        found.append(torch.get_num_threads())
        return inspect_adapter(*arguments, **options)

    monkeypatch.setattr(adapter_store, "inspect_adapter", noting)
    before = torch.get_num_threads()
    with replica(root) as made:
        torch.set_num_threads(2)
        try:
            made.load_adapter("a0", root / "a0")
            assert found == [1] and torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("depth", [0, 1])
def test_without_host_memory_everything_comes_from_disk(root, expected, depth) -> None:
    with replica(root, max_loras=1, adapter_host_memory=0, depth=depth) as served:
        specs = register_all(served, root)
        answers = ask(served, *specs, *specs)
        assert answers == [(expected[spec.name], None) for spec in specs * 2]
        assert served.store.host.num_bytes == 0 and served.store.host.hits == 0


def test_the_device_budget_decides_who_fits(root, expected) -> None:
    with replica(root, adapter_device_memory=12 * bytes_of_a_row(root)) as served:
        specs = register_all(served, root)
        assert {layer.pages.capacity for layer in served.store.pool._layers} == {3}
        # Ranks 4 and 5 to 8 take one page and two: at most two adapters of them together.
        answers = ask(served, *specs)
        assert answers == [(expected[spec.name], None) for spec in specs]
        assert len(served.engine.scheduler.adapters.resident) <= 2


def bytes_of_a_row(root: Path) -> int:
    with replica(root) as served:
        rows = served.store.pool.num_rows
        register_all(served, root)
        assert rows
        return served.store.pool.num_bytes // rows


def test_an_adapter_larger_than_the_device_is_refused_when_it_is_registered(root, tmp_path) -> None:
    each = bytes_of_a_row(root)
    with replica(root, adapter_device_memory=4 * each) as served:
        spec = served.load_adapter("a0", root / "a0")
        with pytest.raises(AdapterError, match=r"'a1' has rank 5 .* 2 pages of 4 rows.*adapter_device_memory"):
            served.load_adapter("a1", root / "a1")
        assert served.store.registered == [spec.content_hash] == list(served.engine.adapters)
    with pytest.raises(ConfigError, match="holds no page"):
        build_replica(EngineConfig(str(root / "base"), device="cpu", adapter_device_memory=3 * each))


@pytest.mark.parametrize("change", ["rewritten", "damaged", "gone"])
def test_a_file_that_changes_or_vanishes_fails_its_own_requests_alone(root, expected, tmp_path, change) -> None:
    folder = shutil.copytree(root / "a0", tmp_path / "a0")
    with replica(root, max_loras=1, adapter_host_memory=0) as served:
        lost, other = served.load_adapter("lost", folder), served.load_adapter("a1", root / "a1")
        if change == "rewritten":
            shutil.copy(root / "a2" / WEIGHTS, folder)
            shutil.copy(root / "a2" / "adapter_config.json", folder)
        elif change == "damaged":
            (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
        else:
            shutil.rmtree(folder)
        (tokens, error), *fine = ask(served, lost, other, other)
        assert tokens == [] and error is not None and f"adapter 'lost' in {folder}" in error
        assert {"rewritten": "have changed", "damaged": "again", "gone": "is missing"}[change] in error
        assert fine == [(expected["a1"], None)] * 2
        assert num_used_pages(served) == pages_of(other), "a failed load keeps no pages"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "a0", folder)
        assert ask(served, lost) == [(expected["a0"], None)], "the file is back"


def pages_of(spec: AdapterSpec) -> int:
    return sum(-(-rank // 4) for rank in spec.ranks.values())


def test_one_content_in_two_places_needs_only_one_of_them(root, expected, tmp_path) -> None:
    folder = shutil.copytree(root / "a0", tmp_path / "twin")
    with replica(root) as served:
        first, twin = served.load_adapter("a0", root / "a0"), served.load_adapter("twin", folder)
        assert first.content_hash == twin.content_hash
        shutil.rmtree(folder)
        assert ask(served, twin) == [(expected["a0"], None)]


def test_a_disk_that_hangs_fails_one_load_at_its_time_limit(root, expected, monkeypatch) -> None:
    release = threading.Event()
    with replica(root, adapter_load_timeout=3.0) as served:
        hanging, other = served.load_adapter("a0", root / "a0"), served.load_adapter("a1", root / "a1")
        read = served.store.read

        def hang(spec, sources):
            if spec.name == "a0":
                release.wait()
            return read(spec, sources)

        monkeypatch.setattr(served.store, "read", hang)
        (tokens, error), fine = ask(served, hanging, other)
        assert tokens == [] and error is not None and "'a0'" in error and "within 3 s" in error
        assert fine == (expected["a1"], None)
        assert num_used_pages(served) == pages_of(other)
        release.set()
        assert ask(served, hanging) == [(expected["a0"], None)]


def test_unloading_frees_host_and_device(root, expected) -> None:
    with replica(root) as served:
        specs = register_all(served, root)
        ask(served, *specs)
        host = served.store.host
        kept = [
            weakref.ref(tensor)
            for copy in host._copies.values()
            for w in copy.weights.values()
            for tensor in (w.A, w.B)
        ]
        assert kept and num_used_pages(served) == sum(map(pages_of, specs))
        for spec in specs:
            served.engine.forget_adapter(spec.content_hash)
        assert host.num_bytes == 0 and host.specs == [] and served.store.registered == []
        assert num_used_pages(served) == 0 and set(served.store.pool.weights) == {None}
        assert [ref for ref in kept if ref() is not None] == []
        with pytest.raises(ValueError, match="not registered"):
            served.engine.add_request(request_of("late", specs[0]))


@pytest.mark.parametrize("depth", [0, 1])
def test_running_requests_finish_on_the_weights_they_started_with(root, expected, tmp_path, depth) -> None:
    folder = shutil.copytree(root / "a0", tmp_path / "x")
    with replica(root, depth=depth) as served:
        old = served.load_adapter("x", folder)
        served.engine.add_request(request_of("old", old))
        got: dict[str, tuple[list[int], str | None]] = {}
        while not got:
            note(got, served.engine.step(0.0))
        # In the same folder, over the old files.
        shutil.copytree(root / "a1", folder, dirs_exist_ok=True)
        new = served.load_adapter("x", folder)
        served.engine.add_request(request_of("new", new))
        served.engine.forget_adapter(old.content_hash)
        for name, (tokens, error) in finish(served).items():
            before, _ = got.get(name, ([], None))
            got[name] = (before + tokens, error)
        assert got == {"old": (expected["a0"], None), "new": (expected["a1"], None)}
        assert served.store.registered == [new.content_hash] and num_used_pages(served) == pages_of(new)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("host", [0, 1 << 30])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_request_that_lost_its_slot_finishes_on_the_weights_it_started_with(
    root, expected, tmp_path, depth, host, device
) -> None:
    folder = shutil.copytree(root / "a0", tmp_path / "x")
    options = {"max_loras": 1, "adapter_host_memory": host, "max_adapter_wait": 0.3, "policy": "fcfs", "depth": depth}
    with replica(root, device=device, dtype="float32", **options) as served:
        old, other = served.load_adapter("x", folder), served.load_adapter("b", root / "a2")
        manager = served.engine.scheduler.adapters
        # As long as x1, which is older than b, runs, b cannot take its adapter's slot; then x2 loses it.
        for name, spec, num_tokens in (("x1", old, 1), ("b", other, NUM_TOKENS), ("x2", old, NUM_TOKENS)):
            served.engine.add_request(request_of(name, spec, num_tokens))
        got: dict[str, tuple[list[int], str | None]] = {}
        now = 0.0
        while manager.resident != [other.content_hash]:
            note(got, served.engine.step(now))
            now += 0.4 if got else 0.0
            if served.engine.waits_for_load:
                assert select.select([served.fileno()], [], [], 60)[0], "a load got lost"
        assert 0 < len(got["x2"][0]) < NUM_TOKENS, "it did not lose its slot while it ran"
        shutil.copytree(root / "a1", folder, dirs_exist_ok=True)
        new = served.load_adapter("x", folder)
        served.engine.add_request(request_of("new", new))
        served.engine.forget_adapter(old.content_hash)
        for name, (tokens, error) in finish(served).items():
            before, _ = got.get(name, ([], None))
            got[name] = (before + tokens, error)
        answers = {"x1": expected["a0"][:1], "b": expected["a2"], "x2": expected["a0"], "new": expected["a1"]}
        assert got == {name: (tokens, None) for name, tokens in answers.items()}
        assert served.store.host._kept == {} and old.content_hash not in served.store.registered


def test_weights_kept_for_a_replaced_adapter_outlast_the_host_budget(root, expected, tmp_path) -> None:
    """A queued request whose weights were on the host, not on the device, when its files changed."""
    folder = shutil.copytree(root / "a0", tmp_path / "x")
    with replica(root, max_loras=1) as served:
        old, other = served.load_adapter("x", folder), served.load_adapter("b", root / "a2")
        assert ask(served, old, other) == [(expected["a0"], None), (expected["a2"], None)]
        served.engine.add_request(request_of("b", other))
        served.engine.add_request(request_of("queued", old))
        shutil.copytree(root / "a1", folder, dirs_exist_ok=True)
        served.load_adapter("x", folder)
        with served.store.host._lock:
            served.store.host._trim(0)
        assert finish(served)["queued"] == (expected["a0"], None)
        assert served.store.host._kept == {}


def test_the_engines_thread_opens_no_file(root, expected) -> None:
    openers: list[int] = []
    watching = True

    def audit(event: str, arguments: tuple) -> None:
        if watching and event == "open" and WEIGHTS in str(arguments[0]):
            openers.append(threading.get_ident())

    with replica(root, max_loras=1, adapter_host_memory=0) as served:
        specs = register_all(served, root)
        sys.addaudithook(audit)
        assert ask(served, *specs) == [(expected[spec.name], None) for spec in specs]
        watching = False
    assert len(openers) == NUM_ADAPTERS and threading.get_ident() not in openers


def test_closing_while_a_load_hangs_does_not_wait(root, monkeypatch) -> None:
    release = threading.Event()
    with replica(root) as served:
        spec = served.load_adapter("a0", root / "a0")
        monkeypatch.setattr(served.store, "read", lambda *_: release.wait())
        served.engine.add_request(request_of("r", spec))
        served.engine.step(0.0)
    release.set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("host", [0, 1 << 30])
def test_on_a_gpu_adapters_take_turns_on_a_side_stream(root, expected, depth, host) -> None:
    config = EngineConfig(
        str(root / "base"),
        device="cuda",
        dtype="float32",
        num_blocks=64,
        max_loras=2,
        adapter_host_memory=host,
        depth=depth,
    )
    served = build_replica(config)
    specs = register_all(served, root)
    for _ in range(5):
        assert ask(served, *specs, *specs) == [(expected[spec.name], None) for spec in specs * 2]
    served.close()
