"""A replica in miniature, for driving an Orchestrator without processes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AddRequest,
    AnyCommand,
    AnyReport,
    EndExport,
    Exported,
    ExportRequests,
    Fence,
    Imported,
    ImportRequests,
    LoadAdapter,
    PinAdapter,
    PrefetchAdapter,
    Progress,
    Ready,
    ReplicaStats,
    SequenceProgress,
    Shutdown,
    Started,
    UnloadAdapter,
)
from peft_dist.core.succession import NameAdapters, NamesKept
from peft_dist.worker.names import NameTable
from tests.worker.fake_replica import fake_model

GONE = "the file is gone"
MODEL = replace(fake_model("org/mini", max_model_len=20), block_size=4)


def drawn_token(seed: int, index: int, draw: int) -> int:
    """What every replica draws for this sequence."""
    return hash((seed, index, draw)) % 7


def mini_spec(name: str, path: str) -> AdapterSpec:
    """What a replica finds at a path."""
    return AdapterSpec(name=name, content_hash=f"h-{path}", path=path, ranks={"q": 4}, num_bytes=1)


class MiniReplica:
    """Takes commands in order, and reports in order; both wait in queues until a test moves them.

    ``running`` are sequences with the tokens that they have, ``started`` those that were in a step. ``exports`` are
    held until they are ended; copies take until ``end_copies``, and can fail.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.exports: dict[int, dict[str, tuple[AddRequest, int]]] = {}
        self.copying: dict[int, ImportRequests | None] = {}
        self.aborted_imports: set[str] = set()
        self.has_failing_copies = False
        self.is_down = False
        self.num_taken = 0
        self.started: set[str] = set()
        self.commands: deque[AnyCommand] = deque()
        self.reports: deque[AnyReport] = deque([Ready(model=MODEL, pid=1)])
        self.running: dict[str, tuple[AddRequest, int]] = {}
        self.held: set[str] = set()
        self.pins: dict[str, str] = {}
        self.names = NameTable()

    def work(self) -> None:
        """Take one command."""
        match self.commands.popleft():
            case AddRequest() as add:
                assert add.content_hash is None or add.content_hash in self.held, "an adapter the replica lacks"
                assert add.request_id not in self.running
                self.running[add.request_id] = (add, len(add.output_token_ids))
                self.num_taken += 1
            case AbortRequest(request_ids=ids):
                for request_id in ids:
                    for held in (self.running, *self.exports.values()):
                        held.pop(request_id, None)
                self.aborted_imports.update(ids)
            case ExportRequests(handover=number, request_ids=ids):
                self.exports[number] = {i: self.running.pop(i) for i in ids if i in self.running}
                self.copying[number] = None
            case EndExport(handover=number, moved=moved):
                left = self.exports.pop(number)
                self.copying.pop(number, None)
                self.running.update({} if moved else left)
            case ImportRequests(handover=number) as command:
                self.copying[number] = command
                self.num_taken += len(command.requests)
            case LoadAdapter() as load:
                self._load(load)
            case PinAdapter(name=name, content_hash=content_hash):
                self._pin(name, content_hash)
            case PrefetchAdapter(content_hash=content_hash):
                assert content_hash in self.held, "an adapter the replica lacks"
            case NameAdapters() as names:
                self.names.apply(names)
                self.reports.append(NamesKept(version=names.version))
            case UnloadAdapter(call_id=call_id, content_hash=content_hash):
                held = [each for export in self.exports.values() for each in export.values()]
                used = {add.content_hash for add, _ in (*self.running.values(), *held)}
                assert content_hash not in used, "an adapter dropped while a request uses it"
                assert content_hash not in self.pins.values(), "a pinned adapter dropped"
                self.held.remove(content_hash)
                self.reports.append(AdapterResult(call_id=call_id))
            case Shutdown() | Fence():
                self.is_down = True

    def adopted(self, epoch: int) -> None:
        """Go on as another incarnation, with what is kept of this one."""
        self.epoch = epoch
        for forgotten in (self.commands, self.reports, self.running, self.exports, self.copying, self.pins):
            forgotten.clear()
        self.num_taken = 0
        contents = [mini_spec(content, content.removeprefix("h-")) for content in sorted(self.held)]
        names, version = self.names.all(), self.names.version
        self.reports.append(Ready(model=MODEL, pid=1, contents=contents, names=names, names_version=version))

    def step(self) -> None:
        """One token for every running sequence."""
        self.start()
        progress = []
        for request_id, (add, drawn) in list(self.running.items()):
            last = drawn + 1 == add.params.max_tokens
            progress.append(
                SequenceProgress(
                    request_id=request_id,
                    token_ids=[drawn_token(add.seed, add.sequence_index, drawn)],
                    first_index=drawn,
                    finish_reason="length" if last else None,
                )
            )
            self.running[request_id] = (add, drawn + 1)
            if last:
                del self.running[request_id]
        self.reports.append(
            Progress(sequences=progress, stats=ReplicaStats(num_running=len(self.running)), num_taken=self.num_taken)
        )

    def lack(self, content_hash: str) -> None:
        """It cannot load an adapter that it had taken."""
        ends = [
            SequenceProgress(name, [], drawn, finish_reason="error", error=GONE, lacks_adapter=True)
            for name, (add, drawn) in self.running.items()
            if add.content_hash == content_hash
        ]
        for end in ends:
            del self.running[end.request_id]
        stats = ReplicaStats(num_running=len(self.running))
        self.reports.append(Progress(sequences=ends, stats=stats, num_taken=self.num_taken))

    def end_copies(self) -> None:
        """Tell how the copies under way have ended; what was imported runs from now on."""
        for number, command in list(self.copying.items()):
            del self.copying[number]
            error = "it failed" if self.has_failing_copies else None
            if command is not None:
                self.reports.append(self._import(command, error))
            elif error is not None:
                self.reports.append(Exported(handover=number, error=error))
            else:
                states = [self._state(i, *held) for i, held in self.exports[number].items()]
                self.reports.append(Exported(handover=number, sequences=states))

    def _state(self, request_id: str, add: AddRequest, drawn: int) -> SequenceState:
        # What was in no step yet has no KV.
        if request_id not in self.started:
            return SequenceState(request_id, drawn)
        kv = KVHandle("mini", 1, drawn, f"{self.epoch}", 0, 0)
        return SequenceState(request_id, drawn, len(add.prompt_token_ids) + drawn - 1, kv=[kv])

    def _import(self, command: ImportRequests, error: str | None) -> Imported:
        if any(add.request_id in self.aborted_imports for add in command.requests):
            error = "aborted"
        for add, state in zip(command.requests, command.states, strict=True):
            assert add.content_hash is None or add.content_hash in self.held, "an adapter the replica lacks"
            assert add.request_id not in self.running
            if error is None:
                assert len(add.output_token_ids) == state.num_output_tokens
                self.running[add.request_id] = (add, len(add.output_token_ids))
        return Imported(handover=command.handover, error=error)

    def start(self) -> None:
        """Tell which sequences are in a step for the first time."""
        if new := sorted(self.running.keys() - self.started):
            self.reports.append(Started(request_ids=new))
            self.started.update(new)

    def _load(self, load: LoadAdapter) -> None:
        if load.path == "broken":
            self.reports.append(AdapterResult(call_id=load.call_id, error="broken: mend it"))
            return
        spec = mini_spec(load.name, load.path)
        self.held.add(spec.content_hash)
        self._pin(load.name, spec.content_hash if load.pinned else None)
        self.reports.append(AdapterResult(call_id=load.call_id, spec=spec))

    def _pin(self, name: str, content_hash: str | None) -> None:
        self.pins.pop(name, None)
        if content_hash is not None:
            assert content_hash in self.held, "a pin of what the replica lacks"
            self.pins[name] = content_hash
