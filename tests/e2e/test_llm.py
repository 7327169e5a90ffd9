"""The offline interface: what it takes, what it gives back, what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import (
    AdapterError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    PeftDistError,
    UnknownModelError,
)
from peft_dist.core.outputs import RequestOutput
from tests.tiny_models import make_model, random_adapter, target_modules

torch.set_num_threads(1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character, ids below the tiny models' vocabulary."""
    letters = {chr(code): code - 32 for code in range(32, 127)}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llm")
    model = make_model("llama", root / "ids")
    model.save_pretrained(root / "texts")
    make_tokenizer().save_pretrained(root / "texts")
    for number in range(3):
        random_adapter(model, root / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    return root


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    adapters = {"a0": folder / "a0", "a1": folder / "a1"}
    with LLM(folder / "texts", adapters, device="cpu", num_blocks=64, served_model_name="tiny") as made:
        yield made


def test_prompts_of_all_kinds_mix(llm: LLM) -> None:
    ids = llm.tokenizer("hello")["input_ids"]
    outputs = llm.generate(["hello", ids, {"prompt_token_ids": ids}, {"prompt": "hello"}], GREEDY, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert [o.prompt_token_ids for o in outputs] == [ids] * 4
    assert outputs[0].prompt == "hello" and outputs[1].prompt is None
    assert outputs[0].outputs[0].text == llm.tokenizer.decode(outputs[0].outputs[0].token_ids)
    assert outputs[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", ["hello", [40, 41], {"prompt_token_ids": [40, 41]}])
def test_one_prompt_needs_no_list(llm: LLM, prompt: object) -> None:
    assert len(llm.generate(prompt, GREEDY, use_tqdm=False)) == 1  # type: ignore[arg-type]


def test_names_of_the_base_and_results_in_order(llm: LLM) -> None:
    names = [None, "a0", "__base__", "a1", "tiny", "a0"]
    prompts = [[50 + i, 60] for i in range(6)]
    outputs = llm.generate(prompts, GREEDY, names, use_tqdm=False)
    assert [o.adapter_name for o in outputs] == [None, "a0", None, "a1", None, "a0"]
    for output, prompt, name in zip(outputs, prompts, names, strict=True):
        [alone] = llm.generate(prompt, GREEDY, name, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
    [all_a0] = llm.generate([prompts[0]], GREEDY, "a0", use_tqdm=False)
    assert all_a0.outputs[0].token_ids != outputs[0].outputs[0].token_ids


def test_each_prompt_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=k, temperature=0.0, ignore_eos=True) for k in (1, 2, 3)]
    outputs = llm.generate([[9]] * 3, params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3]


def test_several_sequences_seeds_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=11, temperature=1.5, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [first], [again] = (llm.generate([[30, 31, 32]], params, "a1", use_tqdm=False) for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) > 1
    assert [o.index for o in first.outputs] == [0, 1, 2]
    for sequence in first.outputs:
        assert sequence.logprobs is not None and len(sequence.logprobs) == 6
        assert all(token in scores for token, scores in zip(sequence.token_ids, sequence.logprobs, strict=True))
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    assert [next(iter(scores)) for scores in first.prompt_logprobs[1:] if scores] == [31, 32]


def test_prompt_scores_are_those_of_the_model(llm: LLM, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "ids")
    prompt = [33, 44, 55, 66, 77]
    [output] = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None and output.outputs[0].token_ids == []
    for position, scores in enumerate(output.prompt_logprobs[1:], 1):
        assert scores is not None
        assert scores[prompt[position]].logprob == pytest.approx(
            float(expected[position - 1, prompt[position]]), abs=1e-4
        )


def test_stop_strings_end_text_and_engine(llm: LLM) -> None:
    [free] = llm.generate(["abc"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    text = free.outputs[0].text
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=(text[4:6],))
    [output] = llm.generate(["abc"], params, use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(text[4:6])]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", text[4:6])
    assert llm._open.engine.scheduler.blocks.num_free == 64


def test_a_sequence_that_fails_ends_alone(llm: LLM) -> None:
    runner = llm._open.runner
    original, prompts = runner._logits, [[40], [41], [42]]

    def poisoned(inputs: object) -> torch.Tensor:
        logits = original(inputs)
        for row, sequence in enumerate(inputs.sampled):  # type: ignore[attr-defined]
            if sequence.start == 0 and sequence.token_ids == [41]:
                logits[row] = float("nan")
        return logits

    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    runner._logits = poisoned  # type: ignore[method-assign]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    runner._logits = original  # type: ignore[method-assign]
    assert outputs[1].outputs[0].finish_reason == "error" and "not finite" in (outputs[1].outputs[0].error or "")
    for i in (0, 2):
        assert outputs[i].outputs[0].token_ids == expected[i].outputs[0].token_ids


def test_chat_uses_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    [output] = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "uhi>"
    outputs = llm.chat([conversation, conversation], GREEDY, ["a0", None], use_tqdm=False)
    assert [o.adapter_name for o in outputs] == ["a0", None]


def test_content_of_a_chat_is_what_it_is_over_http(llm: LLM) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}]
    [output] = llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)
    assert output.prompt == "uh\ni>"
    for content, words in (
        (None, "must be a string"),
        (5, "must be a string"),
        ([{"type": "image_url"}], "type 'text'"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"messages\[0\]\['content'\]=.*{words}"):
            llm.chat([{"role": "user", "content": content}], GREEDY)


def test_adapters_are_looked_for_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nobody", "no such folder"), (folder, "which have: name one of them")):
        with pytest.raises(AdapterError, match=words):
            LLM("/there/is/no/such/model", {"x": path})
    with pytest.raises(AdapterError, match=r"no adapter_config\.json in this folder: give the folder"):
        LLM("/there/is/no/such/model", {"x": tmp_path})


def test_a_folder_without_a_tokenizer_works_with_ids(folder: Path) -> None:
    with LLM(folder / "ids", device="cpu", num_blocks=32, max_model_len=64) as llm:
        [output] = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].text == ""
        with pytest.raises(ConfigError, match="no tokenizer"):
            llm.generate(["text"], GREEDY)
        with pytest.raises(InvalidRequestError, match="stop_token_ids"):
            llm.generate([[5]], SamplingParams(stop="x"))
        with pytest.raises(ConfigError, match="no chat template"):
            llm.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[]], GREEDY), InvalidRequestError, "empty"),
        (([[999]], GREEDY), InvalidRequestError, "999"),
        (([[1.5]], GREEDY), InvalidRequestError, "no prompt"),
        (([[5]], GREEDY, "nobody"), UnknownModelError, "nobody"),
        (([[5], [6]], GREEDY, ["a0"]), InvalidRequestError, "1 adapter_names for 2 prompts"),
        (([[5], [6]], [GREEDY]), InvalidRequestError, "1 sampling_params for 2 prompts"),
        (([[5] * 300], GREEDY), InvalidRequestError, "maximum context length"),
        (([[5]], SamplingParams(logit_bias={5000: 1.0})), InvalidRequestError, "5000"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(llm: LLM, arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(*arguments, use_tqdm=False)
    assert not llm._open.engine.has_work
    assert len(llm.generate([[5]], GREEDY, use_tqdm=False)) == 1


def test_a_refused_prompt_takes_the_others_back(llm: LLM) -> None:
    with pytest.raises(UnknownModelError):
        llm.generate([[5], [6]], GREEDY, ["a0", "nobody"], use_tqdm=False)
    assert not llm._open.engine.has_work and llm._orchestrator.num_unfinished == 0


def test_adapters_come_go_and_change(folder: Path) -> None:
    with LLM(folder / "ids", device="cpu", num_blocks=32, max_model_len=64) as llm:
        [base] = llm.generate([[5, 6]], GREEDY, use_tqdm=False)
        spec = llm.load_adapter(folder / "a0", "x")
        [first] = llm.generate([[5, 6]], GREEDY, "x", use_tqdm=False)
        with pytest.raises(AdapterError, match="loaded already"):
            llm.load_adapter(folder / "a1", "x")
        llm.load_adapter(folder / "a1", "x", replace=True)
        [second] = llm.generate([[5, 6]], GREEDY, "x", use_tqdm=False)
        assert len({tuple(o.outputs[0].token_ids) for o in (base, first, second)}) == 3
        llm.unload_adapter("x")
        store = llm._open.store
        assert store.registered == [] and store.host.num_bytes == 0
        assert llm._open.engine.scheduler.adapters.resident == [] and set(store.pool.weights) == {None}
        with pytest.raises(UnknownModelError):
            llm.generate([[5, 6]], GREEDY, "x", use_tqdm=False)
        assert llm.load_adapter(folder / "a0", "y").content_hash == spec.content_hash
        [again] = llm.generate([[5, 6]], GREEDY, "y", use_tqdm=False)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_refused_adapter_leaves_the_others_serving(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError):
        llm.load_adapter(tmp_path, "broken")
    assert [spec.name for spec in llm.adapters] == ["a0", "a1"]
    assert len(llm.generate([[5]], GREEDY, "a0", use_tqdm=False)) == 1


def test_more_adapters_than_slots(folder: Path) -> None:
    adapters = {f"a{i}": folder / f"a{i}" for i in range(3)}
    prompts, names = [[5 + i] for i in range(6)], [f"a{i % 3}" for i in range(6)]
    with LLM(folder / "ids", adapters, device="cpu", num_blocks=64, max_loras=1) as one:
        ours = one.generate(prompts, GREEDY, names, use_tqdm=False)
    with LLM(folder / "ids", adapters, device="cpu", num_blocks=64) as many:
        expected = many.generate(prompts, GREEDY, names, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in expected]


def test_a_pinned_adapter_outstays_all_others_until_it_is_unloaded(folder: Path) -> None:
    names = ["a0", "a1", "a2"]
    adapters = {name: folder / name for name in names}
    with LLM(folder / "ids", adapters, device="cpu", num_blocks=64, max_loras=2, pinned_adapters=("a1",)) as llm:
        manager = llm._open.engine.scheduler.adapters
        pinned = llm.adapters[1]
        assert manager.loading == [pinned.content_hash], "before anybody asks for it"
        for name in names * 3:
            llm.generate([[40, 41]], GREEDY, name, use_tqdm=False)
        assert manager.is_resident(pinned) and manager.loads == 1 + 6, "the others go in and out"
        with pytest.raises(AdapterError, match=r"'a2' cannot be pinned: 2 pinned adapters leave none of the 2 slots"):
            llm.load_adapter(folder / "a2", "a2", replace=True, pin=True)
        new = llm.load_adapter(folder / "a2", "a1", replace=True)
        assert [name for name, _ in manager.pins.specs] == ["a1"] and new.content_hash in manager.pins
        llm.unload_adapter("a1")
        assert not manager.pins.specs
        llm.load_adapter(folder / "a0", "a0", replace=True, pin=True)
        llm.load_adapter(folder / "a0", "a0", replace=True, pin=False)
        assert not manager.pins.specs


def test_several_live_together_and_a_closed_one_says_so(folder: Path) -> None:
    one = LLM(folder / "ids", {"x": folder / "a0"}, device="cpu", num_blocks=32, max_model_len=64)
    two = LLM(folder / "ids", {"x": folder / "a1"}, device="cpu", num_blocks=32, max_model_len=64)
    outputs = [llm.generate([[7, 8]], GREEDY, "x", use_tqdm=False)[0].outputs[0].token_ids for llm in (one, two, one)]
    assert outputs[0] == outputs[2] != outputs[1]
    one.close()
    one.close()
    with pytest.raises(EngineDeadError, match="closed"):
        one.generate([[7]], GREEDY, use_tqdm=False)
    assert two.generate([[7, 8]], GREEDY, "x", use_tqdm=False)[0].outputs[0].token_ids == outputs[1]
    two.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int7"}, "int7"),
        ({"no_such_option": 1}, "no_such_option': there are adapter_device_memory"),
        ({"max_lora": 8}, "did you mean 'max_loras'"),
        ({"max_model_len": 100_000}, "exceeds"),
        ({"num_blocks": 2}, "cannot hold one sequence|KV blocks"),
        ({"device": "cuda:77"}, "CUDA|cuda"),
        ({"preemption": "swap"}, "num_host_blocks"),
        ({"max_model_len": 0}, r"max_model_len=0 .*at least 1"),
        ({"device": "tpu"}, r"device='tpu' .*cuda:N"),
        ({"device": "meta"}, r"device='meta' .*cuda:N"),
        ({"device": 5}, "device=5 .*str"),
        ({"pinned_adapters": ["x"]}, r"pinned_adapters=\['x'\] .*tuple of names"),
        ({"pinned_adapters": ("x",)}, "names 'x', which is no adapter given at the start"),
        ({"pinned_adapters": ("x",), "exec_type": "vllm"}, "whole merged models"),
    ],
)
def test_wrong_options_name_themselves(folder: Path, options: dict[str, object], message: str) -> None:
    if "num_blocks" in options:
        options = {**options, "max_model_len": 200}
    with pytest.raises(ConfigError, match=message):
        LLM(folder / "ids", **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_a_missing_model_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        LLM(tmp_path / "nowhere", device="cpu")


def test_bfloat16_runs(folder: Path) -> None:
    with LLM(
        folder / "ids", {"x": folder / "a0"}, device="cpu", dtype=torch.bfloat16, num_blocks=32, max_model_len=64
    ) as llm:
        assert llm.model_info.dtype == "bfloat16"
        assert len(llm.generate([[5, 6]] * 2, GREEDY, ["x", None], use_tqdm=False)) == 2


@pytest.mark.parametrize("what", ["finding", "reading"])
def test_a_load_that_hangs_ends_at_its_time_limit(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A network that does not answer, a disk that does not."""
    release = threading.Event()

    def hang(*_: object, **__: object) -> Path:
        release.wait(60)
        return folder / "a0"

    with LLM(folder / "ids", device="cpu", num_blocks=64, adapter_load_timeout=2.0) as llm:
        with monkeypatch.context() as patch:
            if what == "finding":
                patch.setattr("peft_dist.api.llm.resolve_adapter", hang)
            else:
                patch.setattr(llm._open.store, "inspect", hang)
            with pytest.raises(AdapterError, match=r"'x' from .*a0 .*within 2 s.*adapter_load_timeout"):
                llm.load_adapter(folder / "a0", "x")
        release.set()
        assert llm.adapters == []
        assert llm.load_adapter(folder / "a0", "x").name == "x"


def test_threads_take_turns(folder: Path) -> None:
    """A web application calls from many: none may take another's answers."""
    with LLM(folder / "ids", {"a": folder / "a0", "b": folder / "a1"}, dtype="float32", max_num_seqs=4) as llm:
        prompts = [[1 + i, 2 + i, 3 + i] for i in range(8)]
        names = ["a", "b", None, "a"] * 2
        alone = [llm.generate(p, GREEDY, n, use_tqdm=False)[0] for p, n in zip(prompts, names, strict=True)]
        found: list[RequestOutput | None] = [None] * len(prompts)

        def ask(index: int) -> None:
            [found[index]] = llm.generate(prompts[index], GREEDY, names[index], use_tqdm=False)

        threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
    for one, expected in zip(found, alone, strict=True):
        assert one is not None and one.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize(("option", "words"), [("enable_lora", "adapters="), ("max_lora_rank", "any rank")])
def test_options_of_other_engines(folder: Path, option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(folder / "ids", **{option: True})


def test_a_call_within_a_call_is_refused_and_the_outer_one_ends(folder: Path) -> None:
    """As a handler of a signal would: it would wait for itself."""
    with LLM(folder / "ids", dtype="float32") as llm:
        expected = llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        step, refused = llm._open.engine.step, []

        def interrupted(now: float) -> object:
            if not refused:
                for call in (lambda: llm.generate([1], GREEDY), llm.close):
                    with pytest.raises(PeftDistError, match="within another call of the same object") as caught:
                        call()
                    refused.append(caught.value)
            return step(now)

        llm._open.engine.step = interrupted  # type: ignore[method-assign, assignment]
        assert llm.generate([1, 2, 3], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
        assert len(refused) == 2
