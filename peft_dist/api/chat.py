"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from peft_dist.api.chat_template import check_chat
from peft_dist.api.collected import Collected
from peft_dist.api.generation import Choice, Generation, Piece
from peft_dist.api.logprobs import chat_logprobs, prompt_logprobs
from peft_dist.api.protocol_chat import ChatCompletionRequest
from peft_dist.api.serving import check_combinations, fit_max_tokens, serve_generation
from peft_dist.api.state import ServerState
from peft_dist.api.unimplemented import refuse_in_chat
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams


def chat_router(state: ServerState) -> APIRouter:
    """The route that answers conversations."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, http: Request) -> Response:
        """Answer a conversation, written out by the model's chat template."""
        _check(body)
        state.check_alive()
        state.target(body.model)
        await state.structures.check_asked(body.structured())
        prompt = await state.prompts.read_chat(body.messages, body)
        limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "max_tokens": limit_name}
        params = fit_max_tokens(prompt, _params(body), state.model, names)
        return await serve_generation(state, http, body, [prompt], [params], names, "chatcmpl", ChatFormat(state, body))

    return router


def _check(body: ChatCompletionRequest) -> None:
    refuse_in_chat(body.model_extra or {}, body.num_choices)
    check_chat(body.messages, body)
    check_combinations(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true: send both, or neither", "top_logprobs")


def _params(body: ChatCompletionRequest) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return body.sampling_params(max_tokens, (body.top_logprobs or 0) if body.logprobs else None, body.prompt_logprobs)


class ChatFormat:
    """Writes ``chat.completion`` objects and their chunks."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, state: ServerState, body: ChatCompletionRequest) -> None:
        self._state = state
        self._body = body
        self._collected: dict[int, Collected] = {}
        self.tells_text_only = not (body.logprobs or body.return_token_ids)

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Who speaks, once for each choice."""
        delta = {"role": self._state.options.response_role, "content": ""}
        return [
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in generation.choices
        ]

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, then the end in a chunk of its own: clients that stop at the end miss nothing."""
        entries: list[dict[str, Any]] = []
        index, delta = piece.choice.index, piece.delta
        tells_tokens = delta.token_ids and (self._body.logprobs or self._body.return_token_ids)
        if delta.text or tells_tokens:
            entry = self.text_only(index, delta.text)
            entry["logprobs"] = self._logprobs(piece)
            if self._body.return_token_ids:
                entry["token_ids"] = list(delta.token_ids)
            entries.append(entry)
        if delta.finish_reason is not None:
            end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
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
        answer = {
            "index": choice.index,
            "message": {
                "role": self._state.options.response_role,
                "content": collected.joined_text,
                "refusal": None,
            },
            "logprobs": {"content": content, "refusal": None} if self._body.logprobs else None,
            "finish_reason": collected.finish_reason,
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
