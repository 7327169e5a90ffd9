"""``peft-dist rolling-restart``: what is asked of a running server by those who run it."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from peft_dist.core.errors import ConfigError, PeftDistError

ADMIN_KEY_VARIABLE = "PEFT_DIST_ADMIN_KEY"
_POLL_SECONDS = 0.2
_TIMEOUT = 30.0


def rolling_restart(
    url: Annotated[str, typer.Argument(help="The server: http://HOST:PORT.")],
    admin_key: Annotated[str | None, typer.Option(help=f"Or the variable {ADMIN_KEY_VARIABLE}.")] = None,
) -> None:
    """Restart the replicas of the server at URL one after another, and wait for the end; no request is lost."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the server {url!r} is no URL: write for example http://localhost:8000")
    key = admin_key or os.environ.get(ADMIN_KEY_VARIABLE)
    address = f"{url.rstrip('/').removesuffix('/v1')}/admin/rolling-restart"
    view, told = _ask(address, key, b"{}"), ""
    while True:
        if (line := _line(view)) != told:
            typer.echo(told := line)
        if view["state"] != "running":
            break
        time.sleep(_POLL_SECONDS)
        view = _ask(address, key)
    if view["state"] != "done":
        raise PeftDistError(f"the rolling restart stopped: {view['error'] or 'the server was started anew'}")


def _line(view: dict[str, Any]) -> str:
    done = f"{len(view['restarted'])} of {len(view['restarted']) + len(view['left']) + (view['current'] is not None)}"
    if view["state"] == "running":
        return f"replica {view['current']} is {view['stage']} ({done} restarted)"
    skipped = "".join(f"; replica {i} joined, and was left alone" for i in view["skipped"])
    return f"{done} replicas restarted{skipped}"


def _ask(address: str, key: str | None, body: bytes | None = None) -> dict[str, Any]:
    """GET, or POST with a body. Raises PeftDistError with the server's words."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(address, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            view: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise PeftDistError(f"{address} answers {error.code}: {_words(error.read())}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PeftDistError(f"{address} cannot be asked ({reason}): is the server up, and is this its port?") from error
    return view


def _words(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
