"""``peft-dist serve`` around a real model, asked by the ``openai`` client: HTTP changes no answer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist import LLM, SamplingParams
from tests.e2e.test_llm import make_tokenizer
from tests.e2e.test_serve import Server
from tests.tiny_models import make_model, random_adapter, target_modules

torch.set_num_threads(1)
NUM_BLOCKS = 64
NAMES = ["tiny", "a0", "a1"]
PROMPTS = ["hello", "What is it?"]
EXTRA = {"ignore_eos": True}
LENGTH = 12


class ModelServer(Server):
    """The command with its own replica, not the fake one."""

    def __init__(self, folder: Path) -> None:
        options = ["--launcher", "plain", "--device", "cpu", "--threads", "1", "--served-model-name", "tiny"]
        options += ["--max-model-len", "128", "--num-blocks", str(NUM_BLOCKS)]
        for name in NAMES[1:]:
            options += ["--adapter", f"{name}={folder / name}"]
        self._start(folder, folder / "model", options, {**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    model = make_model("llama", root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for number in range(3):
        random_adapter(model, root / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    broken = random_adapter(model, root / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    started = ModelServer(folder)
    try:
        started.until(started.port_file.exists)
        yield started
        assert started.stop() == 0, started.log
        assert "Traceback" not in started.log
    finally:
        started.process.kill()
        started.process.wait()


def test_the_log_has_no_bars(server: ModelServer) -> None:
    assert "Serving" in server.log and "Loading weights" not in server.log


@pytest.fixture(scope="module")
def llm(folder: Path, server: ModelServer) -> Iterator[LLM]:
    adapters = {f"a{number}": folder / f"a{number}" for number in range(3)}
    with LLM(
        folder / "model", adapters, device="cpu", num_blocks=NUM_BLOCKS, max_model_len=128, served_model_name="tiny"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def api(server: ModelServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200) as client:
        yield client


def greedy(max_tokens: int = LENGTH) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def complete(api: openai.OpenAI, name: str, prompt: str, stream: bool, max_tokens: int = LENGTH) -> str:
    if not stream:
        whole = api.completions.create(
            model=name, prompt=prompt, temperature=0, max_tokens=max_tokens, extra_body=EXTRA
        )
        assert whole.usage is not None and whole.usage.completion_tokens == max_tokens
        return whole.choices[0].text
    chunks = api.completions.create(
        model=name, prompt=prompt, temperature=0, max_tokens=max_tokens, stream=True, extra_body=EXTRA
    )
    return "".join(chunk.choices[0].text for chunk in chunks)


def chat(api: openai.OpenAI, name: str, prompt: str, stream: bool) -> str:
    message = {"role": "user", "content": prompt}
    if not stream:
        whole = api.chat.completions.create(
            model=name, messages=[message], temperature=0, max_tokens=LENGTH, extra_body=EXTRA
        )
        return whole.choices[0].message.content or ""
    chunks = api.chat.completions.create(
        model=name, messages=[message], temperature=0, max_tokens=LENGTH, stream=True, extra_body=EXTRA
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def gauge(server: ModelServer, name: str) -> int:
    found = re.search(
        rf'^peft_dist:{name}{{replica="0"}} (\S+)$', httpx.get(f"{server.url}/metrics").text, re.MULTILINE
    )
    assert found is not None
    return int(float(found.group(1)))


def test_all_at_once_answer_as_the_offline_engine_does(api: openai.OpenAI, llm: LLM) -> None:
    cases = list(product((complete, chat), NAMES, PROMPTS, (False, True)))
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: case[0](api, *case[1:]), cases))
    expected = {}
    for name, prompt in product(NAMES, PROMPTS):
        [completion] = llm.generate(prompt, greedy(), name, use_tqdm=False)
        [reply] = llm.chat([{"role": "user", "content": prompt}], greedy(), name, use_tqdm=False)
        expected[complete, name, prompt] = completion.outputs[0].text
        expected[chat, name, prompt] = reply.outputs[0].text
    assert answers == [expected[case[:3]] for case in cases]
    assert len(set(expected.values())) == len(expected)


def test_a_seed_makes_several_sequences_reproducible(api: openai.OpenAI, llm: LLM) -> None:
    first, again = (
        api.completions.create(
            model="a0", prompt="abc", n=2, seed=11, temperature=1.5, max_tokens=LENGTH, extra_body=EXTRA
        )
        for _ in range(2)
    )
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 2
    params = SamplingParams(n=2, seed=11, temperature=1.5, max_tokens=LENGTH, ignore_eos=True)
    [offline] = llm.generate("abc", params, "a0", use_tqdm=False)
    assert texts == [output.text for output in offline.outputs]


def test_logprobs(api: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, logprobs=2)
    [offline] = llm.generate("abc", params, "a1", use_tqdm=False)
    output = offline.outputs[0]
    assert output.logprobs is not None
    expected = [scores[token].logprob for token, scores in zip(output.token_ids, output.logprobs, strict=True)]
    answer = api.completions.create(
        model="a1", prompt="abc", temperature=0, max_tokens=LENGTH, logprobs=2, extra_body=EXTRA
    )
    of_answer = answer.choices[0].logprobs
    assert of_answer is not None and of_answer.top_logprobs is not None
    assert of_answer.token_logprobs == pytest.approx(expected, abs=1e-4)
    tops = [sorted(scores.values(), reverse=True) for scores in of_answer.top_logprobs]
    assert [top[0] for top in tops] == of_answer.token_logprobs and all(len(top) == 2 for top in tops)


def test_echo_scores_a_prompt_without_generating(api: openai.OpenAI, llm: LLM) -> None:
    answer = api.completions.create(model="a0", prompt="scored", echo=True, max_tokens=0, logprobs=0)
    [offline] = llm.generate("scored", SamplingParams(max_tokens=0, prompt_logprobs=0), "a0", use_tqdm=False)
    choice = answer.choices[0]
    assert choice.text == "scored" and choice.logprobs is not None and offline.prompt_logprobs is not None
    assert choice.logprobs.tokens == list("scored")
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    places = zip(offline.prompt_token_ids[1:], offline.prompt_logprobs[1:], strict=True)
    expected = [scores[token].logprob for token, scores in places if scores is not None]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_comes_and_goes(server: ModelServer, api: openai.OpenAI, llm: LLM, folder: Path) -> None:
    load = {"lora_name": "a2", "lora_path": str(folder / "a2")}
    assert server.post("/v1/load_lora_adapter", load).status_code == 200
    assert [model.id for model in api.models.list()] == [*NAMES, "a2"]
    [expected] = llm.generate("hello", greedy(), "a2", use_tqdm=False)
    assert complete(api, "a2", "hello", True) == expected.outputs[0].text
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "a2"}).status_code == 200
    with pytest.raises(openai.NotFoundError, match="a2"):
        complete(api, "a2", "hello", False)


def test_a_broken_adapter_is_refused_while_a_stream_goes_on(
    server: ModelServer, api: openai.OpenAI, llm: LLM, folder: Path
) -> None:
    [expected] = llm.generate("hello", greedy(100), "a1", use_tqdm=False)
    chunks = api.completions.create(
        model="a1", prompt="hello", temperature=0, max_tokens=100, stream=True, extra_body=EXTRA
    )
    text = next(chunks).choices[0].text
    refused = server.post("/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": str(folder / "broken")})
    assert refused.status_code == 400 and "NaN" in refused.json()["error"]["message"]
    assert text + "".join(chunk.choices[0].text for chunk in chunks) == expected.outputs[0].text
    assert "broken" not in [model.id for model in api.models.list()]


def test_a_client_that_goes_away_frees_its_blocks(server: ModelServer, api: openai.OpenAI) -> None:
    """It asks for so much that only an abort ends it soon: 896 sequences, of which the blocks hold eight."""
    chunks = api.completions.create(
        model="a0", prompt=list("abcdefg"), n=128, max_tokens=120, stream=True, extra_body=EXTRA
    )
    next(chunks)
    assert gauge(server, "kv_blocks_free") < NUM_BLOCKS
    assert gauge(server, "memory_peak_bytes") > 100 << 20
    chunks.close()
    deadline = time.monotonic() + 30
    # Nothing but the metrics tells a client what the server did with the requests of another one.
    while gauge(server, "kv_blocks_free") < NUM_BLOCKS:
        assert time.monotonic() < deadline, "the blocks of a client that is gone are still in use"
        time.sleep(0.05)
    assert gauge(server, "requests_running") == gauge(server, "requests_waiting") == 0
    assert len(complete(api, "tiny", "hello", False)) > 0
