"""Configurations that cannot be served as PEFT would serve them are refused, with the field and the kind named."""

from __future__ import annotations

import os
import threading

import pytest

from peft_dist.runner import adapter_patterns
from peft_dist.runner.adapter_config import read_settings
from tests.runner.adapter_folder import CONFIG, WEIGHTS, folder, load, refused, set_config

__all__ = ["folder"]


def test_the_good_adapter_loads(folder):
    assert set(load(folder).spec.ranks.values()) == {4}


def test_missing_config(folder):
    (folder / CONFIG).unlink()
    refused(folder, CONFIG, "missing", "save_pretrained")


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", CONFIG, "missing")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}", b"[" * 100_000, b"1" * 5000])
def test_invalid_json(folder, text):
    (folder / CONFIG).write_bytes(text)
    refused(folder, CONFIG, "no valid JSON")


def test_config_is_no_object(folder):
    (folder / CONFIG).write_text("[1]")
    refused(folder, CONFIG, "list")


def test_config_is_enormous(folder):
    with (folder / CONFIG).open("ab") as file:
        file.truncate(17 << 20)
    refused(folder, CONFIG, "bytes")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_not_a_regular_file(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    refused(folder, name, "not a regular file")


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "VERA", "PREFIX_TUNING", "ADALORA", "SOMETHING_NEW"])
def test_other_tuners(folder, kind):
    set_config(folder, peft_type=kind)
    refused(folder, kind, "only LORA")


def test_no_tuner_at_all(folder):
    set_config(folder, peft_type=None)
    refused(folder, "peft_type")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("use_dora", True, "DoRA"),
        ("bias", "all", "biases"),
        ("bias", "lora_only", "biases"),
        ("lora_bias", True, "bias"),
        ("modules_to_save", ["lm_head"], "whole modules"),
        ("trainable_token_indices", [1, 2], "token embeddings"),
        ("layer_replication", [[0, 2], [1, 3]], "layer replication"),
        ("megatron_config", {"x": 1}, "Megatron"),
        ("alora_invocation_tokens", [5], "aLoRA"),
        ("target_parameters", ["experts.gate_up_proj"], "bare parameters"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("kasa_config", {"beta": 0.1}, "KaSA"),
        ("velora_config", {"scale": 1.0}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "changed the base"),
        ("init_lora_weights", "olora", "changed the base"),
        ("init_lora_weights", "corda", "changed the base"),
        ("init_lora_weights", "loftq", "changed the base"),
        ("init_lora_weights", "lora_ga", "changed the base"),
        ("init_lora_weights", "new_idea", "unknown"),
        ("init_lora_weights", ["pissa"], "unknown"),
    ],
)
def test_unsupported_kinds(folder, field, value, kind):
    set_config(folder, **{field: value})
    refused(folder, field, kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", None),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj(": 4}),
        ("rank_pattern", {"(?i)q_proj": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"*": 4}),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "[a"),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", "0"),
        ("use_rslora", "yes"),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("use_rslora", 0.0),
        ("ensure_weight_tying", "no"),
        ("ensure_weight_tying", []),
        ("use_dora", ""),
        ("use_dora", "false"),
        ("lora_bias", 0),
        ("lora_bias", "none"),
        ("use_qalora", {}),
        ("base_model_name_or_path", 5),
    ],
)
def test_wrong_values(folder, field, value):
    set_config(folder, **{field: value})
    refused(folder, field, "correct it")


@pytest.mark.parametrize("field", ["use_rslora", "ensure_weight_tying", "use_dora", "lora_bias", "use_qalora"])
@pytest.mark.parametrize("value", [False, None])
def test_flags_that_are_off(folder, field, value):
    set_config(folder, **{field: value})
    load(folder)


def test_a_byte_order_mark_changes_nothing(folder):
    expected = load(folder).spec
    (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-8-sig")
    assert (folder / CONFIG).read_bytes().startswith(b"\xef\xbb\xbf{")
    assert load(folder).spec == expected


def test_unusable_layers_pattern(folder):
    set_config(folder, layers_to_transform=[0], layers_pattern="(")
    refused(folder, "layers_pattern")
    set_config(folder, layers_pattern=[1])
    refused(folder, "layers_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3[A-Z]",
        r"(([a-z_]+[.0-9]*)+)+!",  # Hours with Python's engine, at once with this one.
    ],
)
def test_expressions_that_backtrack_stop_nobody(folder, monkeypatch, pattern):
    monkeypatch.setattr(adapter_patterns, "_SECONDS", 0.2)
    set_config(folder, target_modules=pattern)
    ended = threading.Event()

    def read():
        refused(folder, "target_modules")
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    turns = 0
    while reader.is_alive():
        turns += 1
        reader.join(0.001)
    assert ended.is_set()
    assert "!" in pattern or turns > 20, "this thread stood still while the other matched"


def test_layers_with_a_regular_expression(folder):
    set_config(folder, target_modules=".*", layers_to_transform=[0])
    refused(folder, "layers_to_transform", "target_modules")


def test_unknown_fields_are_logged_and_ignored(folder, caplog):
    set_config(folder, use_tomorrows_idea=True)
    load(folder)
    assert "use_tomorrows_idea" in caplog.text


def test_every_field_of_this_peft_is_known(tmp_path, caplog):
    from peft import LoraConfig

    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    read_settings(tmp_path)
    assert "unknown" not in caplog.text
