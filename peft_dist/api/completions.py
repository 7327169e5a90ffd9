"""``/v1/completions``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from peft_dist.api.collected import Collected
from peft_dist.api.generation import Choice, Generation, Piece
from peft_dist.api.logprobs import LegacyLogprobs, joined, prompt_logprobs
from peft_dist.api.prompts import Prompt
from peft_dist.api.protocol_completions import DEFAULT_MAX_TOKENS, CompletionRequest
from peft_dist.api.protocol_structured import Asked
from peft_dist.api.serving import check_combinations, fit_max_tokens, serve_generation
from peft_dist.api.state import ServerState
from peft_dist.api.unimplemented import refuse_in_completion
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.admission import token_limit


def completions_router(state: ServerState) -> APIRouter:
    """The route that continues prompts."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, http: Request) -> Response:
        """Continue one prompt or several, given as text or as token ids."""
        refuse_in_completion(body.model_extra or {}, body.num_choices)
        check_combinations(body)
        state.check_alive()
        state.target(body.model)
        asked = body.structured()
        await state.structures.check_asked(asked)
        prompts = await state.prompts.read_completion(body)
        params = [_params(body, prompt, state, asked) for prompt in prompts]
        return await serve_generation(state, http, body, prompts, params, {}, "cmpl", CompletionFormat(state, body))

    return router


def _params(body: CompletionRequest, prompt: Prompt, state: ServerState, asked: Asked | None) -> SamplingParams:
    max_tokens, model = body.max_tokens, state.model
    if max_tokens is None:
        # Nobody asked for the default length, so it is no reason to refuse a long prompt.
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, token_limit(model) - len(prompt.token_ids)))
        max_tokens = max(max_tokens, body.min_tokens or 0)
    of_prompt = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
    defaults = state.options.sampling_defaults
    params = body.sampling_params(max_tokens, body.logprobs, max(of_prompt, default=None), asked, defaults)
    return fit_max_tokens(prompt, params, model, {})


class CompletionFormat:
    """Writes ``text_completion`` objects."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, state: ServerState, body: CompletionRequest) -> None:
        self._state = state
        self._body = body
        self._collected: dict[int, Collected] = {}
        self._legacy: dict[int, LegacyLogprobs] = {}
        self.tells_text_only = body.logprobs is None and not body.return_token_ids and not body.echo

    def opening(self, generation: Generation) -> list[dict[str, Any]]:
        """Nothing: a completion begins with its text."""
        return []

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """Text, tokens and end in one entry; none for a piece that tells nothing."""
        text, logprobs, delta = self._text(piece), self._logprobs(piece), piece.delta
        has_tokens = logprobs is not None or self._body.return_token_ids
        if not text and not (delta.token_ids and has_tokens) and delta.finish_reason is None:
            return []
        choice = _choice(piece.choice.index, text, logprobs, delta.finish_reason, delta.stop_reason)
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = piece.choice.prompt.token_ids if piece.is_first else None
        return [choice]

    def text_only(self, index: int, text: str) -> dict[str, Any]:
        """The entry for a piece of text of a choice, without anything else to tell."""
        return _choice(index, text, None, None, None)

    def take(self, piece: Piece) -> None:
        """Keep a piece for the whole answer."""
        collected = self._collected.setdefault(piece.choice.index, Collected())
        collected.take(piece, self._text(piece), self._logprobs(piece))

    def answer(self, generation: Generation) -> dict[str, Any]:
        """``choices`` of the whole answer; what was asked of the prompt stands in each."""
        return {"choices": [self._answer_choice(choice) for choice in generation.choices]}

    def _answer_choice(self, choice: Choice) -> dict[str, Any]:
        collected = self._collected[choice.index]
        logprobs = None if self._body.logprobs is None else joined(collected.logprobs)
        answer = _choice(choice.index, collected.joined_text, logprobs, collected.finish_reason, collected.stop_reason)
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(self._state.texts, collected.prompt_logprobs or [])
        if self._body.return_token_ids:
            answer["token_ids"] = collected.token_ids
            answer["prompt_token_ids"] = choice.prompt.token_ids
        return answer

    def _text(self, piece: Piece) -> str:
        echoes = self._body.echo and piece.is_first
        return (self._prompt_text(piece.choice.prompt) if echoes else "") + piece.delta.text

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None or self._state.tokenizer is None:
            return prompt.text or ""
        return str(self._state.tokenizer.decode(prompt.token_ids))

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        skips = self._body.skip_special_tokens is not False
        legacy = self._legacy.setdefault(
            piece.choice.index, LegacyLogprobs(self._state.texts, skip_special_tokens=skips)
        )
        parts = []
        if self._body.echo and piece.is_first:
            prompt = piece.choice.prompt
            parts.append(legacy.prompt(self._prompt_text(prompt), prompt.token_ids, piece.prompt_logprobs or []))
        parts.append(legacy.output(piece.delta.token_ids, piece.delta.logprobs or []))
        return joined(parts)


def _choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: int | str | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
