"""A real adapter from a hub, through the Hub's own client, in each way one can be named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_llm import make_tokenizer
from tests.e2e.test_serve import ROOT, Server
from tests.hub_server import Hub, HubRepo, serve_hub
from tests.tiny_models import make_model, random_adapter, target_modules

PROMPT = [5, 6, 7]
FILES = ("adapter_config.json", "adapter_model.safetensors")
# The Hub's client reads its settings when it is imported: LLM needs a process of its own.
OFFLINE = """
import json, sys
from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import AdapterError
folder, adapters, prompt = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
with LLM(f"{folder}/model", adapters, device="cpu", num_blocks=64, num_threads=1) as llm:
    outputs = llm.generate([prompt] * len(adapters), greedy, list(adapters), use_tqdm=False)
    answers = {output.adapter_name: output.outputs[0].token_ids for output in outputs}
    try:
        llm.load_adapter("org/none", "none")
    except AdapterError as error:
        answers["error"] = str(error)
print(json.dumps(answers))
"""


class HubServer(Server):
    """The command with its own replica and a hub within reach."""

    def __init__(self, folder: Path, work: Path, environment: dict[str, str], *options: str) -> None:
        own = (
            "--launcher",
            "plain",
            "--device",
            "cpu",
            "--threads",
            "1",
            "--num-blocks",
            "64",
            "--max-model-len",
            "64",
        )
        self._start(work, folder / "model", (*own, *options), environment)

    def tokens(self, model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def load(self, name: str, path: str) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    model = make_model("llama", root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for number in range(2):
        random_adapter(model, root / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    return root


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    old, new = ({file: (folder / name / file).read_bytes() for file in FILES} for name in ("a0", "a1"))
    with serve_hub({"org/x": HubRepo({"main": new, "v1": old})}) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**inherited, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """What the two revisions answer when they come from folders."""
    from peft_dist import LLM, SamplingParams

    adapters = {"v1": folder / "a0", "main": folder / "a1"}
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(folder / "model", adapters, device="cpu", num_blocks=64) as llm:
        outputs = llm.generate([PROMPT] * 3, greedy, [None, *adapters], use_tqdm=False)
    base, v1, main = (output.outputs[0].token_ids for output in outputs)
    assert len({tuple(base), tuple(v1), tuple(main)}) == 3
    return {"v1": v1, "main": main}


@pytest.mark.slow
def test_the_offline_interface(folder: Path, environment: dict[str, str], expected: dict[str, list[int]]) -> None:
    names = {"v1": "org/x@v1", "main": "org/x", "local": str(folder / "a0")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder), json.dumps(names), json.dumps(PROMPT)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert "org/none is neither a local folder nor on the Hub" in answers.pop("error")
    assert answers == {**expected, "local": expected["v1"]}


@pytest.mark.slow
def test_the_command_and_loads_over_http(
    folder: Path, hub: Hub, environment: dict[str, str], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    inside = tmp_path / "adapters"
    inside.mkdir()
    options = ["--adapter", "main=org/x", "--adapter-dir", str(inside), "--allow-hub-load"]
    server = HubServer(folder, tmp_path, environment, *options)
    try:
        server.until(server.port_file.exists)
        assert server.tokens("main") == expected["main"]
        assert server.load("v1", "org/x@v1").status_code == 200
        assert server.tokens("v1") == expected["v1"]
        for path, words in (
            ("org/none", "nor on the Hub"),
            ("org/x@v9", "revision"),
            (str(folder / "a0"), "leads out"),
        ):
            answer = server.load("bad", path)
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.slow
def test_loads_over_http_ask_no_hub_unless_allowed(
    folder: Path, hub: Hub, environment: dict[str, str], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    server = HubServer(folder, tmp_path, environment, "--adapter", "v1=org/x@v1")
    try:
        server.until(server.port_file.exists)
        asked = len(hub.requests)
        answer = server.load("main", "org/x")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "lora_path", "adapter_refused")
        assert "--allow-hub-load" in error["message"] and len(hub.requests) == asked
        assert server.tokens("v1") == expected["v1"]
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
