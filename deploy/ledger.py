"""Where every transition went: sent = inserted + refused + lost, and inserted = resident + evicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from common.metrics import ShardStats


class Ledger:
    """What actors say they sent, set against what shards say they have.

    An incarnation that was killed could not report its last sends. Every chunk says how many transitions were sent before
    it, so the shards know it better; what they did not get of that is lost with the cause "actor died", or, where it was of an
    earlier command on the run, with that. What a shard had and has lost is lost with the cause that the shard gives.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[int, int], int] = defaultdict(int)
        self._lost: dict[tuple[int, int], dict[str, int]] = {}
        self._died: set[tuple[int, int]] = set()

    def report(self, slot: int, incarnation: int, sent: int, lost: dict[str, int]) -> None:
        """Takes the newest counts of one incarnation."""
        self._sent[slot, incarnation] = sent
        self._lost[slot, incarnation] = dict(lost)

    def died(self, slot: int, incarnation: int) -> None:
        """Notes that an incarnation will report no more."""
        self._died.add((slot, incarnation))

    def balance(self, shards: Sequence[ShardStats]) -> dict[str, Any]:
        """Returns the ledger of summary.json, in transitions; `balanced` says whether both equations hold."""
        inserted: dict[tuple[int, int], int] = defaultdict(int)
        refused: dict[tuple[int, int], int] = defaultdict(int)
        sent = dict(self._sent)
        for shard in shards:
            for sender, count in shard.senders.items():
                inserted[sender] += count.inserted
                refused[sender] += count.refused
                sent[sender] = max(sent.get(sender, 0), count.sent)
        lost: dict[str, int] = defaultdict(int)
        for sender in sent:
            by_cause = self._lost.get(sender, {})
            for cause, number in by_cause.items():
                lost[cause] += number
            if sender in self._died or sender not in self._sent:
                cause = "actor died" if sender in self._died else "on its way when an earlier command ended"
                lost[cause] += sent[sender] - inserted[sender] - refused[sender] - sum(by_cause.values())
        for shard in shards:
            for cause, number in shard.lost.items():
                lost[cause] += number
        num_sent, num_refused = sum(sent.values()), sum(refused.values())
        num_inserted = sum(shard.num_inserted for shard in shards)
        resident, evicted = sum(shard.size for shard in shards), sum(shard.num_evicted for shard in shards)
        return {
            "sent": num_sent,
            "inserted": num_inserted,
            "refused": num_refused,
            "lost": {cause: number for cause, number in lost.items() if number},
            "resident": resident,
            "evicted": evicted,
            "balanced": num_sent == num_inserted + num_refused + sum(lost.values()) and num_inserted == resident + evicted,
        }
