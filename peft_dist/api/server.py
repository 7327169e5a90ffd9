"""The OpenAI-compatible application. Imports no torch: the model lives in another process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import peft_dist
from peft_dist.api import request_log
from peft_dist.api.adapters import adapters_router
from peft_dist.api.admin import admin_router
from peft_dist.api.auth import AuthMiddleware
from peft_dist.api.body import BodyMiddleware
from peft_dist.api.chat import chat_router
from peft_dist.api.completions import completions_router
from peft_dist.api.errors import install_error_handlers
from peft_dist.api.models import models_router
from peft_dist.api.options import ServerOptions
from peft_dist.api.protocol import ErrorAnswer
from peft_dist.api.request_ids import HEADER, RequestIdMiddleware
from peft_dist.api.request_metrics import ErrorCountMiddleware
from peft_dist.api.state import ServerState
from peft_dist.api.streaming import DirectSendMiddleware
from peft_dist.api.system import system_router
from peft_dist.api.token_ids import token_ids_router
from peft_dist.api.unread import UnreadWatch
from peft_dist.orchestrator.client import EngineClient

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is at fault."},
    "5XX": {"model": ErrorAnswer, "description": "The server is at fault."},
}


def build_app(
    client: EngineClient,
    tokenizer: Any | None,
    options: ServerOptions | None = None,
    unread: UnreadWatch | None = None,
    not_served: Sequence[str] = (),
) -> FastAPI:
    """The application that answers for ``client``.

    Args:
        client: Admits requests and streams their tokens; its owner starts and stops it.
        tokenizer: A Hugging Face tokenizer, or None for a model without one (prompts are then token ids).
        options: Keys, folders and limits.
        unread: Of the connections to it, for the metrics.
        not_served: Names of adapters that were to be served from the start, and were refused.

    Run it with uvicorn's ``proxy_headers`` off: who is on this machine must not depend on a header.
    """
    options = options or ServerOptions()
    state = ServerState(client, tokenizer, options, unread or UnreadWatch(options.unread_timeout), not_served)
    app = FastAPI(title="peft_dist", version=peft_dist.__version__, redirect_slashes=False)
    of_prompts = (completions_router, chat_router, token_ids_router)
    for router in (*of_prompts, models_router, adapters_router, admin_router, system_router):
        app.include_router(router(state), responses=_ERRORS)
    install_error_handlers(app)
    # The last one added runs first: nobody's body is looked at before his key is.
    app.add_middleware(BodyMiddleware, max_bytes=options.max_body_bytes, seconds=options.unread_timeout)
    app.add_middleware(AuthMiddleware, options=options)
    on_answer = request_log.tell_others if options.log_requests else None
    app.add_middleware(ErrorCountMiddleware, metrics=state.metrics.requests, on_answer=on_answer)
    app.add_middleware(RequestIdMiddleware)
    if options.cors_origins:
        # Before keys are asked for: a browser asks whether it may send one, without one.
        app.add_middleware(
            CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )  # fmt: skip
    app.add_middleware(DirectSendMiddleware)
    return app
