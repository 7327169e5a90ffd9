"""The protocol: what is sent arrives the same, and anything else is refused."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import example, given, settings

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    AdapterResult,
    AddRequest,
    AnyCommand,
    AnyReport,
    Fatal,
    LoadAdapter,
    Progress,
    ProtocolError,
    Ready,
    ReplicaStats,
    SequenceProgress,
    Shutdown,
    UnloadAdapter,
    Warmth,
    decode_command,
    decode_report,
    encode_command,
    encode_report,
)
from peft_dist.core.outputs import Logprob
from peft_dist.core.sampling_params import SamplingParams
from tests.worker.fake_replica import fake_model

TOKENS = st.lists(st.integers(0, 2**31), max_size=5)
TEXT = st.text(max_size=8)
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    temperature=st.floats(0, 10),
    top_p=st.floats(0.1, 1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    max_tokens=st.none() | st.integers(0, 2**31),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    stop_token_ids=TOKENS.map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
LOGPROBS = st.none() | st.lists(
    st.dictionaries(st.integers(0, 2**31), st.builds(Logprob, st.floats(-99, 0), st.integers(1, 99)), max_size=2),
    max_size=2,
)
COMMANDS: st.SearchStrategy[AnyCommand] = st.one_of(
    st.builds(
        AddRequest,
        request_id=TEXT,
        prompt_token_ids=TOKENS,
        params=PARAMS,
        seed=st.integers(-(2**63), 2**64 - 1),
        content_hash=st.none() | TEXT,
        output_token_ids=TOKENS,
        age=st.floats(0, 1e6),
    ),
    st.builds(AbortRequest, request_ids=st.lists(TEXT, max_size=3)),
    st.builds(LoadAdapter, call_id=st.integers(0, 99), name=TEXT, path=TEXT, root=st.none() | TEXT),
    st.builds(UnloadAdapter, call_id=st.integers(0, 99), content_hash=TEXT),
    st.just(Shutdown()),
)
PROGRESS = st.builds(
    SequenceProgress,
    request_id=TEXT,
    token_ids=TOKENS,
    first_index=st.integers(0, 99),
    logprobs=LOGPROBS,
    prompt_logprobs=LOGPROBS,
    finish_reason=st.none() | TEXT,
    error=st.none() | TEXT,
    lacks_adapter=st.booleans(),
)
SPEC = st.builds(
    AdapterSpec,
    name=TEXT,
    content_hash=TEXT,
    path=TEXT,
    ranks=st.dictionaries(TEXT, st.integers(1, 99), max_size=3),
    num_bytes=st.integers(0, 2**40),
)
REPORTS: st.SearchStrategy[AnyReport] = st.one_of(
    st.builds(Ready, model=st.just(fake_model()), pid=st.integers(1, 99)),
    st.builds(Progress, sequences=st.lists(PROGRESS, max_size=3), stats=st.builds(ReplicaStats)),
    st.builds(
        AdapterResult,
        call_id=st.integers(0, 99),
        spec=st.none() | SPEC,
        error=st.none() | TEXT,
        is_final=st.booleans(),
    ),
    st.builds(Warmth, is_warm=st.booleans(), pause=st.floats(0, 9)),
    st.builds(Fatal, error=TEXT),
)


@settings(max_examples=100, deadline=None)
@given(command=COMMANDS, epoch=st.integers(0, 2**40))
def test_commands_arrive_as_they_were_sent(command: AnyCommand, epoch: int) -> None:
    envelope = decode_command(encode_command(command, epoch))
    assert (envelope.message, envelope.epoch) == (command, epoch)
    with pytest.raises(ProtocolError):
        decode_report(encode_command(command, epoch))


@settings(max_examples=100, deadline=None)
@given(report=REPORTS, epoch=st.integers(0, 2**40))
def test_reports_arrive_as_they_were_sent(report: AnyReport, epoch: int) -> None:
    envelope = decode_report(encode_report(report, epoch))
    assert (envelope.message, envelope.epoch) == (report, epoch)
    with pytest.raises(ProtocolError):
        decode_command(encode_report(report, epoch))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
@example(data=b"\x81\xa2\x00\x80")  # A map whose key is not UTF-8: msgspec raises no error of its own.
def test_noise_is_refused(data: bytes) -> None:
    for decode in (decode_command, decode_report):
        with pytest.raises(ProtocolError):
            decode(data)


def edited(change: dict[str, Any], message: dict[str, Any] | None = None) -> bytes:
    data = encode_command(AbortRequest(request_ids=["a"]), 1)
    envelope = msgspec.msgpack.decode(data)
    envelope["message"].update(message or {})
    envelope.update(change)
    return msgspec.msgpack.encode(envelope)


def test_the_edited_message_is_otherwise_good() -> None:
    assert decode_command(edited({})).message == AbortRequest(request_ids=["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, None),
        ({"epoch": "1"}, None),
        ({}, {"extra": 1}),
        ({}, {"type": "Reboot"}),
        ({}, {"request_ids": [1]}),
        ({"message": None}, None),
    ],
)
def test_unknown_fields_and_types_are_refused(change: dict[str, Any], message: dict[str, Any] | None) -> None:
    with pytest.raises(ProtocolError, match="not a command"):
        decode_command(edited(change, message))


def test_another_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(ProtocolError, match="same peft_dist release"):
        decode_command(edited({"version": PROTOCOL_VERSION + 1}))


def test_parameters_out_of_range_do_not_pass_the_wire() -> None:
    add = AddRequest(request_id="a", prompt_token_ids=[1], params=SamplingParams(), seed=1)
    envelope = msgspec.msgpack.decode(encode_command(add, 1))
    envelope["message"]["params"]["top_p"] = 7.0
    with pytest.raises(ProtocolError, match="top_p"):
        decode_command(msgspec.msgpack.encode(envelope))
