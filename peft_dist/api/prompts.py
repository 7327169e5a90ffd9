"""From what a body holds to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from peft_dist.api.chat_template import check_template, check_tools, render_chat
from peft_dist.api.options import ServerOptions
from peft_dist.api.protocol_chat import ChatMessage, ChatWriting
from peft_dist.api.protocol_completions import CompletionRequest
from peft_dist.api.protocol_tools import Tool
from peft_dist.api.tokenizing import encode
from peft_dist.core.errors import InvalidRequestError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """``text`` is what the user wrote, or None for a prompt that came as ids."""

    token_ids: list[int]
    text: str | None = None


class PromptReader:
    """Renders and tokenises prompts. ``tokenizer`` is a Hugging Face tokenizer, or None.

    Long texts are tokenised in a thread, so that other streams go on meanwhile.
    """

    def __init__(self, tokenizer: Any | None, options: ServerOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        if tokenizer is not None:
            # The first call settles truncation and padding inside the tokenizer; from then on it is only
            # read, which several threads may do at once.
            self._encode("warm-up", True)

    async def read_completion(self, request: CompletionRequest) -> list[Prompt]:
        """The prompts of a body, in order; ids are passed on as they are.

        Raises:
            InvalidRequestError: (param "prompt" or "stop") there is text, but no tokenizer.
        """
        if request.stop and self._tokenizer is None:
            raise InvalidRequestError(
                "stop strings need a tokenizer, which this model lacks: send stop_token_ids instead", "stop"
            )
        special = request.add_special_tokens is not False
        texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
        if texts and self._tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: send the prompt as a list of token ids", "prompt")
        size = sum(len(text) for text in texts)
        encoded = iter(await self._run(size, lambda: [self._encode(text, special) for text in texts]))
        return [
            Prompt(next(encoded), prompt) if isinstance(prompt, str) else Prompt(prompt) for prompt in request.prompt
        ]

    async def read_text(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text, with those of the tokenizer's own that it begins or ends with where ``special``.

        Raises:
            InvalidRequestError: (param "prompt") there is no tokenizer, or the text is no Unicode.
        """
        if self._tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: nothing turns text into its ids", "prompt")
        return await self._run(len(text), lambda: self._encode(text, special))

    async def write(self, token_ids: list[int]) -> str:
        """The text of ids of the vocabulary, special tokens included; those that the tokenizer lacks are left out.

        Raises:
            InvalidRequestError: (param "tokens") there is no tokenizer.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: nothing turns its ids into text", "tokens")
        return await self._run(len(token_ids), lambda: str(tokenizer.decode(token_ids)))

    def check_tools(self) -> None:
        """Raises InvalidRequestError where the model's chat template has no place for tools, or there is none."""
        if self._tokenizer is not None:
            check_template(self._tokenizer, self._options.chat_template)
            check_tools(self._tokenizer, self._options.chat_template)

    async def read_chat(
        self, messages: Sequence[ChatMessage], writing: ChatWriting, tools: Sequence[Tool] | None
    ) -> Prompt:
        """Raises InvalidRequestError (param "messages") without a tokenizer, or when the template refuses."""
        if self._tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: use /v1/completions with token ids", "messages")
        size = sum(len(message.content or "") for message in messages)
        size += sum(len(call.function.arguments) for message in messages for call in message.tool_calls or ())
        size += sum(len(repr(tool.function)) for tool in tools or ())
        return await self._run(size, lambda: self._encode_chat(messages, writing, tools))

    def _encode_chat(
        self, messages: Sequence[ChatMessage], writing: ChatWriting, tools: Sequence[Tool] | None
    ) -> Prompt:
        text = render_chat(self._tokenizer, messages, writing, self._options.chat_template, tools)
        # The template writes the special tokens itself.
        return Prompt(self._encode(text, writing.add_special_tokens is True, "messages"), text)

    def _encode(self, text: str, special: bool, param: str = "prompt") -> list[int]:
        return encode(self._tokenizer, text, param, special=special)

    async def _run(self, num_chars: int, work: Callable[[], T]) -> T:
        if num_chars < self._options.tokenize_in_thread_chars:
            return work()
        return await asyncio.to_thread(work)
