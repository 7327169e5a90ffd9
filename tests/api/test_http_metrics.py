"""``/metrics`` as Prometheus and routers read it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from peft_dist.api.options import ServerOptions
from peft_dist.core.errors import ConfigError
from peft_dist.core.messages import AdapterResidency, ReplicaDetail
from tests.api.http_support import BASE, BODIES, CHAT, COMPLETIONS, ScriptedClient, serving
from tests.api.metrics_support import FAMILIES, HISTOGRAMS, Scrape, adapter

BUSY = ReplicaDetail(
    merged_adapter="hash-sql",
    num_steps=10,
    num_merged_steps=4,
    num_switches=3,
    switch_seconds=0.25,
    waiting={"hash-sql": 2, "hash-json": 1},
    running={"": 5, "hash-sql": 1},
    policy={"alpha": 0.5},
    credits={"hash-sql": -1.5, "hash-json": 1.5},
    adapters=[
        AdapterResidency("hash-sql", "device", 8, 100),
        AdapterResidency("hash-json", "host", 16, 200),
    ],
    num_adapter_loads=7,
    num_adapter_evictions=6,
)
STATES = ("starting", "ready", "draining", "drained", "unreached", "dead")
FINISHED = "peft_dist:sequences_finished_total"
ERRORS = "peft_dist:request_errors_total"
NASTY = [
    'quo"te',
    "back\\slash",
    "new\nline",
    "\\n",
    "tab\t,comma",
    "{a='b'} 1",
    "naïve 😀\u2028",
    "\udc80bytes",
    "re\rturn",
]


def test_content_type(http: httpx.Client) -> None:
    assert http.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_every_metric_is_there_before_any_request(http: httpx.Client) -> None:
    scrape = Scrape.of(http)
    assert {name: kind for name, kind in scrape.types.items() if not name.endswith("_created")} == FAMILIES
    assert set(scrape.by(FINISHED, "finish_reason").values()) == {0}
    assert {scrape.value(f"peft_dist:{name}_count") for name in HISTOGRAMS} == {0}
    assert scrape.by("peft_dist:merged_adapter_info", "adapter") == {}
    assert scrape.value("peft_dist:merged", replica="0") == 0


def test_before_the_first_replica(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.replicas = list  # type: ignore[method-assign]
    scrape = Scrape.of(http)
    assert set(FAMILIES) <= set(scrape.types)
    assert scrape.by("peft_dist:replicas", "state") == {(state,): 0 for state in STATES}
    assert scrape.value("vllm:num_requests_running", model_name="", engine="0") == 0


def test_what_a_replica_tells(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.detail = BUSY
    scrape = Scrape.of(http)
    assert scrape.value("peft_dist:merged", replica="0") == 1
    assert scrape.value("peft_dist:merged_adapter_info", replica="0", adapter="sql") == 1
    assert scrape.value("peft_dist:requests_waiting", replica="0") == 2
    assert scrape.value("peft_dist:kv_cache_usage_ratio", replica="0") == 0.75
    assert scrape.value("peft_dist:adapters_served") == 2
    assert scrape.value("peft_dist:switches_total", replica="0") == 3
    assert scrape.value("peft_dist:switch_seconds_total", replica="0") == 0.25
    assert scrape.by("peft_dist:steps_total", "mode") == {("merged",): 4, ("unmerged",): 6}
    assert scrape.value("peft_dist:adapter_loads_total", replica="0") == 7
    assert scrape.value("peft_dist:adapter_evictions_total", replica="0") == 6
    assert scrape.value("peft_dist:policy", replica="0", name="alpha") == 0.5
    running, waiting = "peft_dist:adapter_requests_running", "peft_dist:adapter_requests_waiting"
    assert scrape.by(running, "adapter") == {("__base__",): 5, ("sql",): 1, ("json",): 0}
    assert scrape.by(waiting, "adapter") == {("__base__",): 0, ("sql",): 2, ("json",): 1}
    assert scrape.by("peft_dist:adapter_credit", "adapter") == {("sql",): -1.5, ("json",): 1.5}
    assert scrape.by("peft_dist:resident_adapters", "tier") == {("device",): 1, ("host",): 1, ("disk",): 0}
    sizes = scrape.by("peft_dist:adapter_bytes", "adapter", "tier", "rank")
    assert sizes == {("sql", "device", "8"): 100, ("json", "host", "16"): 200}
    assert "hash-" not in scrape.text


def test_what_routers_read(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.detail, engine.resident = BUSY, ["hash-json", "hash-sql"]
    engine.loaded["alias"] = adapter("alias", "sql")
    engine.loaded["a,b"] = adapter("a,b", "json")
    before = time.time()
    scrape = Scrape.of(http)
    labels = {"model_name": BASE, "engine": "0"}
    assert scrape.value("vllm:num_requests_waiting", **labels) == 2
    assert scrape.value("vllm:num_requests_running", **labels) == 0
    assert scrape.value("vllm:kv_cache_usage_perc", **labels) == 0.75
    assert scrape.value("vllm:gpu_cache_usage_perc", **labels) == 0.75
    assert scrape.value("vllm:cache_config_info", block_size="16", num_gpu_blocks="1000", engine="0") == 1
    names = "max_lora", "running_lora_adapters", "waiting_lora_adapters"
    [(adapters, when)] = scrape.by("vllm:lora_requests_info", *names).items()
    assert adapters == ("8", "alias,json,sql", "alias,json,sql")
    assert before <= when <= time.time()


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_requests_are_counted(http: httpx.Client, route: str, stream: bool) -> None:
    before = Scrape.of(http)
    assert http.post(route, json={**BODIES[route], "stream": stream, "n": 2}).status_code == 200
    after = Scrape.of(http)
    assert after.by(FINISHED, "finish_reason") == {("stop",): 0, ("length",): 2, ("abort",): 0, ("error",): 0}
    assert after.value("peft_dist:sequences_admitted_total") == 2
    assert after.value("peft_dist:generation_tokens_total") == 8
    assert after.value("peft_dist:prompt_tokens_total") > 0
    assert after.value("peft_dist:time_to_first_token_seconds_count") == 2
    assert after.value("peft_dist:inter_token_latency_seconds_count") == 6
    assert after.value("peft_dist:e2e_request_latency_seconds_count") == 2
    assert after.value("peft_dist:e2e_request_latency_seconds_sum") > 0
    grown = after.counters()
    assert all(grown[key] >= value for key, value in before.counters().items())


def test_several_prompts_and_a_stop_string(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": ["hello", "world"], "max_tokens": 30, "stop": "w"}
    usage = http.post(COMPLETIONS, json=body).json()["usage"]
    scrape = Scrape.of(http)
    assert scrape.value(FINISHED, finish_reason="stop") == 2
    assert scrape.value("peft_dist:prompt_tokens_total") == usage["prompt_tokens"]
    assert scrape.value("peft_dist:generation_tokens_total") == usage["completion_tokens"]


def test_nothing_drawn_has_no_first_token(http: httpx.Client) -> None:
    assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "max_tokens": 0, "echo": True}).status_code == 200
    scrape = Scrape.of(http)
    assert scrape.value("peft_dist:time_to_first_token_seconds_count") == 0
    assert scrape.value("peft_dist:e2e_request_latency_seconds_count") == 1


def test_a_client_that_goes_away(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.hang_at = 2
    body = {**BODIES[COMPLETIONS], "max_tokens": 9, "stream": True, "n": 2}
    with http.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())
        assert engine.hanging.wait(60)
        assert Scrape.of(http).value("peft_dist:sequences_admitted_total") == 2
    assert engine.closed_early.wait(60) and engine.idle.wait(10)
    scrape = Scrape.of(http)
    assert scrape.value(FINISHED, finish_reason="abort") == 2
    assert scrape.value("peft_dist:e2e_request_latency_seconds_count") == 0
    assert scrape.by(ERRORS, "code") == {}


def test_a_failing_sequence(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.fail_at = 1
    assert http.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 500
    scrape = Scrape.of(http)
    assert scrape.value(FINISHED, finish_reason="error") == 1
    assert scrape.by(ERRORS, "code") == {("500",): 1}


def test_refusals(engine: ScriptedClient) -> None:
    options = ServerOptions(api_keys=("secret",), max_body_bytes=1000)
    with serving(engine, options) as url, httpx.Client(base_url=url) as http:
        assert http.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 401
        http.headers["Authorization"] = "Bearer secret"
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "model": "nobody"}).status_code == 404
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "top_p": 7}).status_code == 400
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "user": "x" * 2000}).status_code == 413
        engine.full = True
        # The batch is refused as a whole, its first prompt included.
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "prompt": ["a", "b"]}).status_code == 429
        assert http.get("/nothing").status_code == 404
        scrape = Scrape.of(http)
    assert scrape.by(ERRORS, "code") == {(code,): 1 for code in ("400", "401", "404", "413", "429")}
    assert scrape.value("peft_dist:sequences_admitted_total") == 0
    assert set(scrape.by(FINISHED, "finish_reason").values()) == {0}


def test_after_the_replica_was_lost(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.detail, engine.resident = BUSY, ["hash-sql"]
    before = Scrape.of(http)
    engine.die_at = 1
    assert http.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 503
    engine.health_error = "Replica 0 was killed by SIGKILL."
    after = Scrape.of(http)
    assert after.by("peft_dist:replicas", "state") == {(state,): state == "dead" for state in STATES}
    assert after.by("peft_dist:merged", "replica") == {}, "what a dead replica last said is not so any more"
    assert after.value(FINISHED, finish_reason="error") == 1
    assert after.value("vllm:num_requests_waiting", model_name=BASE, engine="0") == 0
    assert after.by("vllm:lora_requests_info", "running_lora_adapters").keys() == {("",)}
    grown = after.counters()
    assert all(grown[key] >= value for key, value in before.counters().items())


def test_labels_are_bounded(engine: ScriptedClient) -> None:
    names = [f"a{i:03}" for i in range(500)]
    hashes = [adapter(name).content_hash for name in names]
    engine.loaded = {name: adapter(name) for name in names}
    engine.detail = ReplicaDetail(
        merged_adapter="hash-a499",
        waiting=dict.fromkeys(hashes[:300], 1) | {"hash-a123": 9},
        running=dict.fromkeys(hashes[200:], 2) | {"hash-a450": 8},
        credits=dict.fromkeys(hashes, 0.5),
        adapters=[AdapterResidency(content_hash, "host", 4, 10) for content_hash in hashes],
    )
    engine.resident = hashes[100:200]
    with serving(engine, ServerOptions(metrics_max_adapters=10)) as url, httpx.Client(base_url=url) as http:
        scrape = Scrape.of(http)
    labels = scrape.label_values("adapter")
    assert len(labels) == 12 and {"__base__", "__other__", "a499", "a450", "a123"} <= labels
    waiting = scrape.by("peft_dist:adapter_requests_waiting", "adapter")
    assert sum(waiting.values()) == 308 and waiting["__other__",] > 250
    assert sum(scrape.by("peft_dist:adapter_requests_running", "adapter").values()) == 606
    assert sum(scrape.by("peft_dist:adapter_credit", "adapter").values()) == 250
    assert scrape.value("peft_dist:resident_adapters", replica="0", tier="host") == 500
    assert sum(scrape.by("peft_dist:adapter_bytes", "adapter").values()) == 5000
    for lists in scrape.by("vllm:lora_requests_info", "running_lora_adapters", "waiting_lora_adapters"):
        assert all(len(names.split(",")) <= 10 and "__" not in names for names in lists)
    assert len(scrape.text) < 40_000


def test_the_adapters_asked_for_last_are_named(engine: ScriptedClient) -> None:
    engine.loaded = {name: adapter(name) for name in "abcdef"}
    with serving(engine, ServerOptions(metrics_max_adapters=2)) as url, httpx.Client(base_url=url) as http:
        for name in "fcfd":
            assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "model": name}).status_code == 200
        assert Scrape.of(http).label_values("adapter") == {"__base__", "__other__", "d", "f"}


def test_none_is_named_when_none_shall_be(engine: ScriptedClient) -> None:
    engine.detail, engine.resident = BUSY, ["hash-sql"]
    with serving(engine, ServerOptions(metrics_max_adapters=0)) as url, httpx.Client(base_url=url) as http:
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "model": "sql"}).status_code == 200
        scrape = Scrape.of(http)
    assert scrape.label_values("adapter") == {"__base__", "__other__"}
    assert scrape.by("vllm:lora_requests_info", "running_lora_adapters").keys() == {("",)}
    with pytest.raises(ConfigError, match="metrics_max_adapters"):
        ServerOptions(metrics_max_adapters=-1)


def test_names_of_any_kind(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.loaded = {name: adapter(name, str(i)) for i, name in enumerate([*NASTY, "__other__"])}
    engine.detail = ReplicaDetail(
        running={f"hash-{i}": i for i in range(len(engine.loaded))}, merged_adapter="hash-2", credits={"hash-1": 1.0}
    )
    engine.resident = [f"hash-{i}" for i in range(len(engine.loaded))]
    running = Scrape.of(http).by("peft_dist:adapter_requests_running", "adapter")
    shown = [name.replace("\udc80", "\\udc80") for name in NASTY]
    assert [running[name,] for name in shown] == list(range(len(NASTY)))
    assert Scrape.of(http).by("peft_dist:merged_adapter_info", "adapter") == {("new\nline",): 1}


def test_content_with_several_names_and_with_none(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.loaded = {"first": adapter("first", "x"), "second": adapter("second", "x")}
    engine.detail = ReplicaDetail(running={"hash-x": 3, "hash-gone": 2}, waiting={"hash-left": 1})
    scrape = Scrape.of(http)
    running = scrape.by("peft_dist:adapter_requests_running", "adapter")
    assert running == {("__base__",): 0, ("first",): 3, ("__unloaded__",): 2}
    assert scrape.value("peft_dist:adapter_requests_waiting", replica="0", adapter="__unloaded__") == 1
    assert scrape.value("peft_dist:adapters_served") == 2
    assert "hash-" not in scrape.text


def test_histograms_know_no_adapters(http: httpx.Client) -> None:
    for model in (BASE, "sql", "json"):
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "model": model}).status_code == 200
    scrape = Scrape.of(http)
    of_histograms = {n for n, kind in scrape.types.items() if kind == "histogram"}
    labels = {label for name, ls in scrape.samples for label, _ in ls if any(name.startswith(n) for n in of_histograms)}
    assert labels == {"le", "model_name", "engine"}, "the last two are vLLM's, and have one value each"
    assert scrape.value("peft_dist:request_queue_seconds_count") == 3
    assert scrape.value("vllm:request_queue_time_seconds_count", model_name=BASE, engine="0") == 3
    assert scrape.value("peft_dist:time_to_first_token_seconds_count") == 3


def test_servers_of_one_process_count_for_themselves(http: httpx.Client) -> None:
    with serving(ScriptedClient()) as url, httpx.Client(base_url=url) as other:
        assert other.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 200
        assert Scrape.of(other).value("peft_dist:sequences_admitted_total") == 1
    assert Scrape.of(http).value("peft_dist:sequences_admitted_total") == 0


def test_scrapes_at_once(engine: ScriptedClient, url: str) -> None:
    engine.detail = BUSY
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: httpx.get(f"{url}/metrics", timeout=100).text, range(24)))
    assert {len(Scrape(text).samples) for text in texts} == {len(Scrape(texts[0]).samples)}
