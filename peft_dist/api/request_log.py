"""A line of the log for each request (``--log-requests``): numbers and names, not a word of prompts or answers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import Request
from starlette.types import Scope

from peft_dist.api.request_ids import given_id, id_of
from peft_dist.api.request_metrics import RequestEnd

logger = logging.getLogger("peft_dist.requests")


def of(http: Request, request_id: str, model: str) -> Callable[[RequestEnd], None]:
    """What tells of the end of one request for completions or chat.

    ``model``: As its client named it; it is served.
    """
    given = given_id(http.scope)
    named = "" if given is None else f" client_id={given}"

    def tell(end: RequestEnd) -> None:
        http.state.is_told = True
        logger.info(
            "Request %s: model=%a prompt_tokens=%d output_tokens=%d finish=%s first_token=%s seconds=%.3f%s",
            request_id,
            model,
            end.num_prompt_tokens,
            end.num_output_tokens,
            _reasons(end.finish_reasons),
            "none" if end.first_token is None else f"{end.first_token:.3f}",
            end.seconds,
            named,
        )

    return tell


def tell_others(scope: Scope, status: int, seconds: float) -> None:
    """Tell of an answer that no line has told of: the request was refused, or drew nothing."""
    if not scope.get("state", {}).get("is_told"):
        logger.info("Request %s: status=%d seconds=%.3f id=%s", scope["path"], status, seconds, id_of(scope))


def _reasons(counts: dict[str, int]) -> str:
    """``stop`` for one sequence, ``stop:2,length:1`` for several."""
    if sum(counts.values()) == 1:
        return next(iter(counts))
    return ",".join(f"{reason}:{count}" for reason, count in counts.items())
