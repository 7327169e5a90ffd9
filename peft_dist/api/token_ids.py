"""``/tokenize`` and ``/detokenize``: what prompts are to the model, and back. No replica is asked."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from peft_dist.api.chat_template import check_chat
from peft_dist.api.errors import json_response
from peft_dist.api.protocol_token_ids import DetokenizeRequest, TokenizeRequest
from peft_dist.api.state import ServerState
from peft_dist.api.unimplemented import refuse_in_tokenize
from peft_dist.core.errors import InvalidRequestError
from peft_dist.orchestrator.admission import check_vocabulary

_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


def token_ids_router(state: ServerState) -> APIRouter:
    """The routes that translate between texts and token ids."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a prompt, or of a conversation as the chat template writes it out."""
        refuse_in_tokenize(body.unknown)
        _check_name(state, body.model)
        tokens = await _read(state, body)
        return json_response(
            {
                "count": len(tokens),
                "max_model_len": state.model.max_model_len,
                "tokens": tokens,
                "token_strs": state.texts.pieces(tokens) if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        refuse_in_tokenize(body.model_extra or {})
        _check_name(state, body.model)
        check_vocabulary(body.tokens, state.model, "tokens")
        return json_response({"prompt": await state.prompts.write(body.tokens)})

    return router


def _check_name(state: ServerState, model: str | None) -> None:
    """Adapters have the base's tokenizer, but a name that is not served is a mistake all the same."""
    if model is not None:
        state.target(model)


async def _read(state: ServerState, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        if body.prompt is not None:
            raise InvalidRequestError("prompt and messages exclude each other: send one of them", "prompt")
        check_chat(body.messages, body)
        return (await state.prompts.read_chat(body.messages, body, body.tools)).token_ids
    if body.prompt is None:
        raise InvalidRequestError("prompt is missing: send a text as prompt, or a conversation as messages", "prompt")
    for name in _OF_CHATS:
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"{name} needs messages: a prompt is taken as it is", name)
    return await state.prompts.read_text(body.prompt, special=body.add_special_tokens is not False)
