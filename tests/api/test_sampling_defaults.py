"""What a model recommends is taken where a request says nothing, and only where it was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_dist.api.options import ServerOptions
from peft_dist.api.sampling_defaults import in_words, recommended
from peft_dist.core.errors import ConfigError
from tests.api.http_support import BODIES, ScriptedClient, serving

TOLD = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}


def write(folder: Path, told: Any) -> str:
    (folder / "generation_config.json").write_text(told if isinstance(told, str) else json.dumps(told))
    return str(folder)


def test_what_a_file_says(tmp_path: Path) -> None:
    assert recommended(str(tmp_path)) == {}
    source = write(tmp_path, {**TOLD, "do_sample": True, "min_p": None, "eos_token_id": [1, 2], "max_length": 20})
    assert recommended(source) == TOLD
    assert in_words(TOLD) == "temperature 0.6, top_k 20, top_p 0.9"


@pytest.mark.parametrize("told", ["{", "[]", {"temperature": "hot"}, {"top_p": 7}])
def test_what_no_request_could_ask_for_is_refused(tmp_path: Path, told: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be followed"):
        recommended(write(tmp_path, told))


@pytest.mark.parametrize("route", BODIES)
def test_requests_go_before_it(engine: ScriptedClient, route: str) -> None:
    with serving(engine, ServerOptions(sampling_defaults=TOLD)) as url:
        for fields in ({}, {"temperature": None}, {"temperature": 0.0, "top_k": 3}):
            assert httpx.post(url + route, json={**BODIES[route], **fields}).status_code == 200
    found = [(params.temperature, params.top_k, params.top_p) for _, params, _ in engine.requests]
    assert found == [(0.6, 20, 0.9), (0.6, 20, 0.9), (0.0, 3, 0.9)]
