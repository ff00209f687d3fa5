"""Where every transition went: sent = inserted + refused + lost, and inserted = resident + evicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from common.metrics import UNANSWERED, UNKNOWN_SENDER, PushCounts, ShardStats

_FORGOTTEN = "inserted, and not in the log of a shard that died"
_DIED = "actor died"
_EARLIER = "on its way when an earlier command ended"


class Ledger:
    """What actors say they sent, set against what shards say they have.

    An incarnation that was killed could not report its last sends. Every chunk says how many transitions were sent before
    it, so the shards know it better; what they did not get of that is lost with the cause "actor died", or, where it was of an
    earlier command on the run, with that. What a shard had and has lost is lost with the cause that the shard gives.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[int, int], int] = defaultdict(int)
        self._pushed: dict[tuple[int, int], PushCounts] = {}
        self._died: set[tuple[int, int]] = set()

    def report(self, slot: int, incarnation: int, sent: int, pushed: PushCounts) -> None:
        """Takes the newest counts of one incarnation."""
        self._sent[slot, incarnation] = sent
        self._pushed[slot, incarnation] = pushed

    def died(self, slot: int, incarnation: int) -> None:
        """Notes that an incarnation will report no more."""
        self._died.add((slot, incarnation))

    @staticmethod
    def faults(shards: Sequence[ShardStats]) -> list[str]:
        """Returns a sentence for each shard whose own books are wrong at this moment, whatever is on its way."""
        sentences = []
        for shard in shards:
            in_books = sum(count.inserted for count in shard.senders.values())
            had = shard.num_inserted + sum(shard.lost.values())
            if in_books != had or shard.num_inserted != shard.size + shard.num_evicted:
                sentences.append(
                    f"the ledger of shard {shard.shard_index} does not balance: {in_books} by its senders, {had} inserted or lost, "
                    f"{shard.size} resident, {shard.num_evicted} evicted: please report this"
                )
        return sentences

    def balance(self, shards: Sequence[ShardStats]) -> dict[str, Any]:
        """Returns the ledger of summary.json, in transitions.

        `balanced` says whether all of this holds: every incarnation that lives to tell sent what was inserted, refused or lost; what
        shards have in their books of all senders is what they hold, have evicted or have lost; and inserted = resident + evicted.
        """
        inserted: dict[tuple[int, int], int] = defaultdict(int)
        refused: dict[tuple[int, int], int] = defaultdict(int)
        sent = dict(self._sent)
        lost: dict[str, int] = defaultdict(int)
        for shard in shards:
            for sender, count in shard.senders.items():
                inserted[sender] += count.inserted
                refused[sender] += count.refused
                sent[sender] = max(sent.get(sender, 0), count.sent)
            for cause, number in shard.lost.items():
                lost[cause] += number
        in_books = sum(inserted.values()) == sum(shard.num_inserted + sum(shard.lost.values()) for shard in shards)
        is_balanced = in_books
        num_refused = 0
        num_unknown = inserted.pop(UNKNOWN_SENDER, 0)
        sent.pop(UNKNOWN_SENDER, None)
        for sender in sent:
            pushed = self._pushed.get(sender, PushCounts())
            num_lost = sum(pushed.lost.values())
            for cause, number in pushed.lost.items():
                lost[cause] += number
            # A shard that hung took what its actor had given up.
            late = min(max(inserted[sender] - pushed.inserted, 0), pushed.lost.get(UNANSWERED, 0))
            lost[UNANSWERED] -= late
            num_lost -= late
            if sender in self._died or sender not in self._sent:
                cause = _DIED if sender in self._died else _EARLIER
                lost[cause] += sent[sender] - inserted[sender] - refused[sender] - num_lost
                num_refused += refused[sender]
            else:
                told = pushed.inserted + late
                lost[_FORGOTTEN] += told - inserted[sender]
                num_refused += pushed.refused
                is_balanced &= sent[sender] == told + pushed.refused + num_lost and told >= inserted[sender]
        for cause in (_FORGOTTEN, _EARLIER, _DIED):  # Where somebody misses what a shard had of nobody it knows.
            found = min(num_unknown, lost[cause])
            lost[cause] -= found
            num_unknown -= found
        num_sent, num_inserted = sum(sent.values()) + num_unknown, sum(shard.num_inserted for shard in shards)
        resident, evicted = sum(shard.size for shard in shards), sum(shard.num_evicted for shard in shards)
        is_balanced &= num_sent == num_inserted + num_refused + sum(lost.values()) and num_inserted == resident + evicted
        return {
            "sent": num_sent,
            "inserted": num_inserted,
            "refused": num_refused,
            "lost": {cause: number for cause, number in lost.items() if number},
            "resident": resident,
            "evicted": evicted,
            "sampled": sum(shard.num_sampled for shard in shards),
            "priorities_applied": sum(shard.num_priority_updates for shard in shards),
            "priorities_stale": sum(shard.num_stale_priority_updates for shard in shards),
            "balanced": is_balanced,
        }
