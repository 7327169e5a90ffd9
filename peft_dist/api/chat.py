"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from peft_dist.api.chat_template import check_chat
from peft_dist.api.collected import Collected
from peft_dist.api.generation import Choice, Generation, Piece
from peft_dist.api.logprobs import chat_logprobs, prompt_logprobs
from peft_dist.api.protocol_chat import ChatCompletionRequest
from peft_dist.api.protocol_structured import Asked
from peft_dist.api.serving import check_combinations, fit_max_tokens, serve_generation
from peft_dist.api.state import ServerState
from peft_dist.api.tool_use import CallsOfChoice, ToolUse
from peft_dist.api.unimplemented import refuse_in_chat
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.structured_output import StructuredOutput


def chat_router(state: ServerState) -> APIRouter:
    """The route that answers conversations."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation, written out by the model's chat template."""
        _check(body)
        state.check_alive()
        state.target(body.model)
        if body.tools and body.tool_choice != "none":
            state.prompts.check_tools()
        use = ToolUse.of(body.tools, body.tool_choice, body.parallel_tool_calls, state.tool_reader)
        asked = _asked(body, use)
        await state.structures.check_asked(asked)
        prompt = await state.prompts.read_chat(body.messages, body, None if use is None else body.tools)
        limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "max_tokens": limit_name}
        params = fit_max_tokens(prompt, _params(body, asked, state.options.sampling_defaults), state.model, names)
        answer_format = ChatFormat(state, body, use)
        return await serve_generation(state, http, body, [prompt], [params], names, "chatcmpl", answer_format)

    return router


def _check(body: ChatCompletionRequest) -> None:
    refuse_in_chat(body.model_extra or {}, body.num_choices)
    check_chat(body.messages, body)
    check_combinations(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true: send both, or neither", "top_logprobs")


def _asked(body: ChatCompletionRequest, use: ToolUse | None) -> Asked | None:
    """What the answer must match: the body's own form, or that of a call that it must make."""
    asked = body.structured()
    if use is None or use.schema is None:
        return asked
    if asked is not None:
        raise InvalidRequestError(f"{asked.param} and tool_choice exclude each other: send one of them", "tool_choice")
    try:
        return Asked("tool_choice", StructuredOutput(json_schema=use.schema))
    except InvalidRequestError as error:
        # The schema is made of the functions' parameters.
        raise InvalidRequestError(f"the parameters of tools are not valid: {error}", "tools") from error


def _params(body: ChatCompletionRequest, asked: Asked | None, defaults: Mapping[str, Any]) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return body.sampling_params(max_tokens, logprobs, body.prompt_logprobs, asked, defaults)


class ChatFormat:
    """Writes ``chat.completion`` objects and their chunks."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, state: ServerState, body: ChatCompletionRequest, use: ToolUse | None = None) -> None:
        self._state = state
        self._body = body
        self._use = use
        self._calls: dict[int, CallsOfChoice] = {}
        self._collected: dict[int, Collected] = {}
        self.tells_text_only = not (body.logprobs or body.return_token_ids or use)

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Who speaks, once for each choice."""
        delta = {"role": self._state.options.response_role, "content": ""}
        entries: list[dict[str, Any]] = [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in generation.choices
        ]
        if self._body.return_token_ids:
            entries[0]["prompt_token_ids"] = generation.choices[0].prompt.token_ids
        return entries

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, then the end in a chunk of its own: clients that stop at the end miss nothing."""
        index, delta = piece.choice.index, piece.delta
        told = [{"content": delta.text}] if delta.text else []
        reason = delta.finish_reason
        if self._use is not None:
            calls = self._calls.setdefault(index, CallsOfChoice(self._use))
            told = calls.take(delta.text, ended=reason is not None)
            reason = calls.finish_reason(reason)
        if not told and delta.token_ids and (self._body.logprobs or self._body.return_token_ids):
            told = [{"content": ""}]
        entries: list[dict[str, Any]] = [
            {"index": index, "delta": one, "logprobs": None, "finish_reason": None} for one in told
        ]
        if entries:
            entries[0]["logprobs"] = self._logprobs(piece)
            if self._body.return_token_ids:
                entries[0]["token_ids"] = list(delta.token_ids)
        if reason is not None:
            end = {"finish_reason": reason, "stop_reason": delta.stop_reason}
            entries.append({"index": index, "delta": {}, "logprobs": None, **end})
        return entries

    def text_only(self, index: int, text: str) -> dict[str, Any]:
        """The entry for a piece of text of a choice, without anything else to tell."""
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def take(self, piece: Piece) -> None:
        """Keep a piece for the whole answer."""
        collected = self._collected.setdefault(piece.choice.index, Collected())
        collected.take(piece, piece.delta.text, self._logprobs(piece))

    def answer(self, generation: Generation) -> dict[str, Any]:
        """``choices`` of the whole answer, and the prompt where the body asked for it."""
        answer: dict[str, Any] = {"choices": [self._answer_choice(choice) for choice in generation.choices]}
        if self._body.prompt_logprobs is not None:
            positions = self._collected[0].prompt_logprobs or []
            answer["prompt_logprobs"] = prompt_logprobs(self._state.texts, positions)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = generation.choices[0].prompt.token_ids
        return answer

    def _answer_choice(self, choice: Choice) -> dict[str, Any]:
        collected = self._collected[choice.index]
        content = [entry for part in collected.logprobs for entry in part["content"]]
        reason = collected.finish_reason
        said: dict[str, Any] = {"content": collected.joined_text}
        if self._use is not None:
            calls = CallsOfChoice(self._use)
            calls.take(collected.joined_text, ended=True)
            said, reason = calls.message(), calls.finish_reason(reason)
        answer = {
            "index": choice.index,
            "message": {"role": self._state.options.response_role, **said, "refusal": None},
            "logprobs": {"content": content, "refusal": None} if self._body.logprobs else None,
            "finish_reason": reason,
            "stop_reason": collected.stop_reason,
        }
        if self._body.return_token_ids:
            answer["token_ids"] = collected.token_ids
        return answer

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        top = self._body.top_logprobs or 0
        return chat_logprobs(self._state.texts, piece.delta.token_ids, piece.delta.logprobs or [], top)
