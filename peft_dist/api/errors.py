"""Every error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from peft_dist.api.request_ids import HEADER, id_of
from peft_dist.api.validation import describe_validation_error
from peft_dist.core.errors import (
    AdapterError,
    AdapterNameError,
    EngineDeadError,
    InvalidRequestError,
    PeftDistError,
    QueueFullError,
    ReplicaStateError,
    UnknownModelError,
    UnknownReplicaError,
)

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
STATUS_CODES = {
    404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large",
    415: "unsupported_media_type", 429: "queue_full",
}  # fmt: skip


class ApiError(PeftDistError):
    """An error with its HTTP status; ``param`` names the field at fault, ``code`` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that clients get, in a response or as the last event of a stream."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as the answer to a request."""
        return json_response(self.body(), self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``content`` as JSON; strings that are not valid Unicode are escaped instead of failing."""
    return Response(encode_json(content), status, dict(headers or {}), media_type="application/json")


def encode_json(content: Any) -> bytes:
    """``content`` as JSON; half surrogate pairs are escaped instead of failing."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:
        return msgspec.json.encode(_without_surrogates(content))


def _without_surrogates(content: Any) -> Any:
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(content, dict):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_surrogates(value) for value in content]
    return content


def as_api_error(error: BaseException) -> ApiError:
    """The HTTP meaning of any error; what is unknown becomes a 500 that tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), param=error.param, code="invalid_value")
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, AdapterNameError):
        return ApiError(400, str(error), param="lora_name", code="name_taken")
    if isinstance(error, AdapterError):
        return ApiError(400, str(error), param="lora_path", code="adapter_refused")
    if isinstance(error, QueueFullError):
        wait = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), code="queue_full", headers=wait)
    if isinstance(error, UnknownReplicaError):
        return ApiError(404, str(error), param="replica", code="replica_not_found")
    if isinstance(error, ReplicaStateError):
        return ApiError(409, str(error), param="replica", code="replica_state")
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    return ApiError(500, "the server failed while it handled this request; its log has the details")


def _unreadable_body(cause: BaseException | None) -> ApiError:
    if isinstance(cause, UnicodeDecodeError):
        problem = f"byte {cause.start} does not belong to UTF-8 text"
    elif isinstance(cause, RecursionError):
        problem = "it is nested too deeply"
    else:
        problem = str(cause or "it cannot be read")
    return ApiError(400, f"the body is not valid JSON: {problem}", code="invalid_json")


def _from_http_exception(error: HTTPException) -> ApiError:
    return ApiError(
        error.status_code, str(error.detail), code=STATUS_CODES.get(error.status_code), headers=error.headers
    )


def install_error_handlers(app: FastAPI) -> None:
    """Answer in OpenAI's shape whatever goes wrong, unknown routes and methods included."""

    async def on_peft_dist_error(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:
            # FastAPI's word for a body that the JSON parser stumbled over in any way but a syntax error.
            return _unreadable_body(error.__cause__).response()
        api_error = _from_http_exception(error)
        if error.status_code in (404, 405):
            problem = "does not exist" if error.status_code == 404 else f"does not take {request.method}"
            api_error.message = f"{request.url.path} {problem}: see /docs for the routes"
        return api_error.response()

    async def on_validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe_validation_error(error)
        return ApiError(400, message, param=param, code="invalid_value" if param else "invalid_json").response()

    async def on_any_error(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        # Sent from outside of all middleware, which would have named it.
        response = as_api_error(error).response()
        response.headers[HEADER] = id_of(request.scope)
        return response

    app.add_exception_handler(PeftDistError, on_peft_dist_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_any_error)
