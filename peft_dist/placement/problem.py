"""A view of the cluster as a planner's tables: everything by number, and the seconds of each choice."""

from __future__ import annotations

from functools import cached_property

from peft_dist.placement.costs import seconds
from peft_dist.placement.types import ClusterView, PlanError, Way

Flows = list[dict[int, int]]
"""For each class: replica number -> how many of its requests are there in the end."""

# Weight of the mean finishing time beside the makespan: no request moves for nothing, and of two plans that end at the
# same time the one with less work is taken.
MEAN_WEIGHT = 0.01


class Problem:
    """Tables of one checked view. Raises PlanError for a view that contradicts itself."""

    def __init__(self, view: ClusterView) -> None:
        view.check()
        self.view = view
        numbers = {replica.replica_id: index for index, replica in enumerate(view.replicas)}
        names = {adapter.adapter: index for index, adapter in enumerate(view.adapters)}
        self.replicas, self.classes = view.replicas, view.classes
        self.source = [numbers[one.source] for one in view.classes]
        # -1 is the base model.
        self.adapter = [names.get(one.adapter, -1) for one in view.classes]
        self.size = [adapter.num_bytes for adapter in view.adapters]
        self.on_device = [{names[a] for a in replica.device} for replica in view.replicas]
        self.on_host = [{names[a] for a in replica.host} for replica in view.replicas]
        self.pinned = [{names[a] for a in replica.pinned} for replica in view.replicas]
        self.merging = [names.get(replica.merging) for replica in view.replicas]
        self.accepting = [index for index, replica in enumerate(view.replicas) if replica.accepts]
        self.mean_weight = MEAN_WEIGHT / max(len(view.replicas), 1)
        self._request: dict[tuple[int, int], tuple[float, Way]] = {}
        self._load: dict[tuple[int, int], float] = {}

    @cached_property
    def stay(self) -> Flows:
        """Nothing moves."""
        return [{source: one.count} if one.count else {} for source, one in zip(self.source, self.classes, strict=True)]

    @cached_property
    def room(self) -> list[int]:
        """Bytes that adapters in use may take on each replica: its memory, or what is in use now if that is more."""
        used = [set(pinned) for pinned in self.pinned]
        for index, one in enumerate(self.classes):
            if one.count and self.adapter[index] >= 0:
                used[self.source[index]].add(self.adapter[index])
        taken = [sum(self.size[a] for a in adapters) for adapters in used]
        return [max(replica.adapter_bytes, own) for replica, own in zip(self.replicas, taken, strict=True)]

    def request_seconds(self, index: int, replica: int) -> float:
        """Work that one request of a class brings to a replica: what remains, and the move from elsewhere."""
        return self._request_on(index, replica)[0]

    def way(self, index: int, replica: int) -> Way:
        """The cheaper way for a request of a class to get to a replica."""
        return self._request_on(index, replica)[1]

    def load_seconds(self, adapter: int, replica: int) -> float:
        """What it costs a replica to have requests of an adapter: its load, and no merging of another one."""
        found = self._load.get((adapter, replica))
        if found is None:
            found = self._load[adapter, replica] = self._load_on(adapter, replica)
        return found

    def finishing_times(self, flows: Flows) -> list[float]:
        """Seconds until each replica has done its work, from scratch."""
        times = [replica.backlog for replica in self.replicas]
        demand = [0] * len(times)
        used: list[set[int]] = [set() for _ in times]
        for index, flow in enumerate(flows):
            for replica, count in flow.items():
                times[replica] += count * self.request_seconds(index, replica)
                demand[replica] += count * self.classes[index].kv_blocks
                used[replica].add(self.adapter[index])
        for number, own in enumerate(self.replicas):
            times[number] += own.costs.swap_block * max(0, demand[number] - own.kv_blocks)
            times[number] += sum(self.load_seconds(adapter, number) for adapter in used[number])
        return times

    def makespan(self, times: list[float]) -> float:
        """When the last replica ends; none needs to end before the floor."""
        return max(*times, self.view.floor) if times else 0.0

    def objective(self, times: list[float]) -> float:
        """What plans are compared by: makespan, and a little of the mean."""
        return self.makespan(times) + self.mean_weight * sum(times)

    def check_flows(self, flows: Flows) -> None:
        """Raises PlanError when requests are lost or made up, or a replica takes more than it has room for."""
        incoming = [0] * len(self.replicas)
        seated, placed = [0] * len(self.replicas), [0] * len(self.replicas)
        used = [set(pinned) for pinned in self.pinned]
        for index, flow in enumerate(flows):
            if sum(flow.values()) != self.classes[index].count or min(flow.values(), default=1) < 1:
                raise PlanError(f"class {index} has {self.classes[index].count} requests, but its flows are {flow}")
            for replica, count in flow.items():
                if self.adapter[index] >= 0:
                    used[replica].add(self.adapter[index])
                if replica != self.source[index]:
                    incoming[replica] += count * self.classes[index].kv_blocks
                    seated[replica] += count if self.needs_seat(index) else 0
                    placed[replica] += count
                    if not self.may_go(index, replica):
                        raise PlanError(f"class {index} goes to {self._name(replica)}, which accepts nothing of it")
        for number, own in enumerate(self.replicas):
            if incoming[number] > own.free_kv_blocks:
                raise PlanError(
                    f"{incoming[number]} KV blocks go to {self._name(number)}: {own.free_kv_blocks} are free"
                )
            for kind, coming, free in (("seats", seated, own.free_seats), ("places", placed, own.free_places)):
                if free is not None and coming[number] > free:
                    raise PlanError(f"{coming[number]} requests go to {self._name(number)}: {free} {kind} are free")
            taken = sum(self.size[adapter] for adapter in used[number])
            if taken > self.room[number]:
                raise PlanError(f"adapters take {taken} bytes on {self._name(number)}, which has {self.room[number]}")

    def may_go(self, index: int, replica: int) -> bool:
        """Whether requests of a class may come to a replica, as far as it has room."""
        own = self.replicas[replica]
        return own.accepts and not (own.is_reserved and self.merging[replica] != self.adapter[index])

    def needs_seat(self, index: int) -> bool:
        """Whether the requests of a class run, and would wait again where no seat is free."""
        return self.classes[index].context_tokens > 0

    def _request_on(self, index: int, replica: int) -> tuple[float, Way]:
        found = self._request.get((index, replica))
        if found is not None:
            return found
        one, costs = self.classes[index], self.replicas[replica].costs
        is_merged = self.merging[replica] is not None and self.merging[replica] == self.adapter[index]
        speed = costs.merged if is_merged else 1.0
        work = one.prefill_tokens * costs.prefill_token + one.decode_tokens * costs.decode_token * speed
        again = one.context_tokens * costs.prefill_token
        moved = seconds(costs.transfer, one.kv_bytes)
        way: Way = "kv" if one.context_tokens and moved < again else "recompute"
        if replica != self.source[index]:
            work += costs.move + (moved if way == "kv" else again)
        self._request[index, replica] = work, way
        return work, way

    def _load_on(self, adapter: int, replica: int) -> float:
        merging = self.merging[replica]
        mixing = 0.0 if merging is None or merging == adapter else self.replicas[replica].mixing
        if adapter < 0 or adapter in self.on_device[replica]:
            return mixing
        costs, size = self.replicas[replica].costs, self.size[adapter]
        fetched = adapter in self.on_host[replica]
        return mixing + seconds(costs.load, size) + (0.0 if fetched else seconds(costs.fetch, size))

    def _name(self, replica: int) -> str:
        return f"replica {self.replicas[replica].replica_id}"
