"""Turns what a user asked into what a replica can run, or says why it never can."""

from __future__ import annotations

import msgspec

from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams


def token_limit(model: ModelInfo) -> int:
    """Most tokens of prompt and output together: the model's length, or all KV blocks if they hold less."""
    return min(model.max_model_len, model.num_blocks * model.block_size)


def check_prompt(prompt_token_ids: list[int], model: ModelInfo) -> None:
    """Raises InvalidRequestError when the prompt is empty or holds something outside of the vocabulary."""
    if not prompt_token_ids:
        raise InvalidRequestError("The prompt is empty: give at least one token.", param="prompt")
    check_vocabulary(prompt_token_ids, model, "prompt")


def check_vocabulary(token_ids: list[int], model: ModelInfo, param: str) -> None:
    """Raises InvalidRequestError (of ``param``) when something is no token of the model; an empty list passes."""
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < model.vocab_size:
        return
    for token in token_ids:
        if type(token) is not int or not 0 <= token < model.vocab_size:
            _outside_vocabulary(token, model, param)


def check_token_parameters(params: SamplingParams, model: ModelInfo) -> None:
    """Raises InvalidRequestError when ``logit_bias`` or ``stop_token_ids`` name tokens that do not exist."""
    for token in params.logit_bias or ():
        if token >= model.vocab_size:
            _outside_vocabulary(token, model, "logit_bias")
    for token in params.stop_token_ids:
        if token >= model.vocab_size:
            _outside_vocabulary(token, model, "stop_token_ids")


def resolve_max_tokens(num_prompt_tokens: int, params: SamplingParams, model: ModelInfo) -> SamplingParams:
    """The same parameters with ``max_tokens`` set to what the model's length leaves when it is None.

    Raises:
        InvalidRequestError: the prompt leaves no room, or less than ``max_tokens`` or ``min_tokens`` ask.
    """
    limit = token_limit(model)
    room = limit - num_prompt_tokens
    wanted = params.max_tokens
    if room < (1 if wanted is None else min(wanted, 1)):
        raise InvalidRequestError(
            f"This model's maximum context length is {limit} tokens, but the prompt has {num_prompt_tokens}, which "
            "leaves no room for an answer. Shorten the prompt.",
            param="prompt",
        )
    if wanted is None:
        return msgspec.structs.replace(params, max_tokens=room)
    if wanted > room:
        raise InvalidRequestError(
            f"This model's maximum context length is {limit} tokens, but {num_prompt_tokens} in the prompt and "
            f"max_tokens={wanted} were asked for. Shorten the prompt or ask for at most {room} tokens.",
            param="max_tokens",
        )
    return params


def _outside_vocabulary(token: object, model: ModelInfo, param: str) -> None:
    raise InvalidRequestError(
        f"{param} holds {token!r}, which is no token of this model: ids are integers from 0 to {model.vocab_size - 1}.",
        param=param,
    )
