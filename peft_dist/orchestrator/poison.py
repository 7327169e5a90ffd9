"""Requests that make replicas die: which one it was, where that is clear."""

from __future__ import annotations

from collections.abc import Sequence

from peft_dist.orchestrator.records import RequestRecord

# A request that was in the batch of so many replicas when they died, or was being brought to so many, is taken to be
# the reason.
MAX_DEATHS = 2
# So many silences in a row are a cut network's; each one more counts as a death, or a request that stops whole
# processes would go on for ever.
MAX_SILENCES = 2


def find_guilty(
    records: Sequence[RequestRecord], brought: Sequence[RequestRecord] = (), *, is_unseen: bool = False
) -> RequestRecord | None:
    """The request that a replica died of, of those that were on it, and of those that were ``brought`` to it with their
    KV and run elsewhere; None while that is not clear.

    A request that was in the batch counts the death, until it draws a token; one that was brought, until it is taken in
    somewhere. Who counts two of a kind is guilty if nobody else does, or if it alone never drew a token on either
    replica, as one whose prompt kills. Otherwise all that count two become suspects, which are tried one after another:
    who is tried when the next replica dies is guilty.

    ``is_unseen``: As in ``Fault``. That says nothing of requests, but for one to which it happens again and again.
    """
    for record in records:
        for sequence in record.unfinished.values():
            sequence.num_silences += is_unseen and sequence.started
            if not is_unseen or sequence.num_silences > MAX_SILENCES:
                sequence.num_deaths += sequence.started
                sequence.num_early_deaths += sequence.started and not sequence.drew
    for record in () if is_unseen else brought:
        record.num_import_deaths += 1
    here = [record for record in records if _deaths(record)[0] >= MAX_DEATHS]
    twice = here + [record for record in brought if record.num_import_deaths >= MAX_DEATHS]
    tried = [record for record in here if record.is_suspect]
    early = [record for record in here if _deaths(record)[1] >= MAX_DEATHS]
    guilty = next((some[0] for some in (twice, tried, early) if len(some) == 1), None)
    if guilty is None:
        for record in here:
            record.is_suspect = True
    return guilty


def _deaths(record: RequestRecord) -> tuple[int, int]:
    sequences = record.unfinished.values()
    return max(s.num_deaths for s in sequences), max(s.num_early_deaths for s in sequences)
