"""What a live server is: the model, the device and the versions, so that its figures are of something."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import live
from peft_dist.cli_options import json_object

HINT = """what the server cannot be asked for, as a JSON object: {"device": "NVIDIA H200", ...}; here.py gives it"""


def told(url: str, more: str | None = None) -> dict[str, Any]:
    """Model, its context, device, replicas and versions.

    Args:
        url: Of the server, which is asked for what it tells.
        more: What it does not tell, a JSON object in text: ``device``, ``versions``, ``options``.

    Raises:
        ConfigError: The server does not tell its models or how it is, or ``more`` is no such object.
    """
    own = {} if more is None else json_object("--server-told", more)
    found = {**_model(url), "replicas": live.replicas_of(url), "device": None, **own}
    if version := live.version_of(url):
        found["versions"] = {"server": version} | found.get("versions", {})
    return found


def _model(url: str) -> dict[str, Any]:
    """Of the base: a folder's name alone, since paths differ from machine to machine."""
    card = live.base_of(url)
    root = str(card.get("root") or card["id"])
    name = Path(root).name if Path(root).is_absolute() or root.startswith((".", "~")) else root
    return {"model": name, "max_model_len": card.get("max_model_len")}


def words(about: Mapping[str, Any]) -> dict[str, str]:
    """Of a result's JSON: which models its servers had, on which devices; empty for what is not live."""
    if about.get("mode") != "live":
        return {}
    found = {}
    for name in ("model", "device"):
        values = dict.fromkeys(str(one.get(name) or "not told") for one in about.get("servers", {}).values())
        found[name] = " and ".join(values) or "not told"
    return found
