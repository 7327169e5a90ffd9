"""When a sequence ends by its tokens. (Stop strings need text and are found where text is made.)"""

from __future__ import annotations

from peft_dist.core.request import Request


def check_stop(request: Request, eos_token_ids: frozenset[int], max_model_len: int) -> tuple[str, int | None] | None:
    """Reason and stop id if the last known token ends the request, else None."""
    num_output = len(request.output_token_ids)
    if num_output < (request.plain_end or find_plain_end(request, eos_token_ids, max_model_len)):
        return None
    params = request.params
    if num_output and num_output >= params.min_tokens:
        token = request.output_token_ids[-1]
        if params.stop_token_ids and token in params.stop_token_ids:
            return "stop", token
        if token in eos_token_ids and not params.ignore_eos:
            return "stop", None
    if num_output >= request.max_output_tokens or len(request.prompt_token_ids) + num_output >= max_model_len:
        return "length", None
    return None


def find_plain_end(request: Request, eos_token_ids: frozenset[int], max_model_len: int) -> int:
    """Tokens that a request draws in all, where nothing but its length ends it; -1 where something may. It is kept."""
    params = request.params
    end = min(request.max_output_tokens, max_model_len - len(request.prompt_token_ids))
    by_token = params.stop_token_ids or (eos_token_ids and not params.ignore_eos)
    request.plain_end = -1 if by_token or params.prompt_logprobs is not None else end or -1
    return request.plain_end
