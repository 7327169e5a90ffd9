"""When a sequence ends by its tokens. (Stop strings need text and are found where text is made.)"""

from __future__ import annotations

from peft_dist.core.request import Request


def check_stop(request: Request, eos_token_ids: frozenset[int], max_model_len: int) -> tuple[str, int | None] | None:
    """Reason and stop id if the last known token ends the request, else None."""
    num_output = len(request.output_token_ids)
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
