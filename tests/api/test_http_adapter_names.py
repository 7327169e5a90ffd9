"""A refused name is the name's fault, whoever finds it out: the route, or the orchestrator behind it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterNameError, UnknownModelError
from peft_dist.core.messages import LoadAdapter
from peft_dist.orchestrator.adapters import AdapterRegistry
from tests.api.http_support import BASE, ScriptedClient, error_of, serving, spec

LOAD = "/v1/load_lora_adapter"


class NamingClient(ScriptedClient):
    """Asks the orchestrator's own registry about names; "busy" is being loaded, "sql" and "json" are there."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = AdapterRegistry()
        self.registry.set_base(self.model)
        for call_id, name in enumerate([*self.loaded, "busy"]):
            self.registry.begin_load(LoadAdapter(call_id=call_id, name=name, path=name), {0})
            if name != "busy":
                self.registry.settle(call_id, 0, spec(name))

    async def load_adapter(self, name: str, path: str, **options: Any) -> AdapterSpec:
        self.registry.check_new_name(name, replace=options["replace"])
        return await super().load_adapter(name, path, **options)


@pytest.mark.parametrize("name", [f"{BASE}:x", "org/tiny-base", "__base__", "busy", "sql"])
def test_a_refused_name_is_told_of_the_name(name: str) -> None:
    with serving(NamingClient()) as url:
        error = error_of(httpx.post(url + LOAD, json={"lora_name": name, "lora_path": "/x"}), 400)
        assert (error["param"], error["code"]) == ("lora_name", "name_taken")
        assert name in error["message"] or "being loaded already" in error["message"]
        error = error_of(httpx.post(url + LOAD, json={"lora_name": "new", "lora_path": "broken"}), 400)
        assert (error["param"], error["code"]) == ("lora_path", "adapter_refused")


@pytest.mark.parametrize("name", ["", " x", f"{BASE}:x", "busy", "sql"])
def test_the_registry_refuses_it(name: str) -> None:
    with pytest.raises(AdapterNameError, match="adapter"):
        NamingClient().registry.check_new_name(name, replace=False)


def test_what_no_string_names_is_not_loaded() -> None:
    with pytest.raises(UnknownModelError, match="is not loaded"):
        NamingClient().registry.remove(["x"])  # type: ignore[arg-type]
