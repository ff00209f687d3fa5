"""The ledger: sent = inserted + refused + lost, also when an actor could not say what it sent."""

from common.metrics import UNANSWERED, UNKNOWN_SENDER, PushCounts, SenderCount, ShardStats
from deploy.ledger import Ledger


def shard(index, size, evicted, senders, lost=None):
    """A shard's statistics; senders are {(slot, incarnation): (inserted, refused, sent)}."""
    return ShardStats(
        shard_index=index,
        shard_epoch=0,
        size=size,
        capacity=100,
        num_inserted=size + evicted,
        num_evicted=evicted,
        num_sampled=0,
        num_refused_chunks=0,
        last_refusal=None,
        num_priority_updates=0,
        num_stale_priority_updates=0,
        resident_bytes=0,
        waits=[],
        senders={sender: SenderCount(*counts) for sender, counts in senders.items()},
        lost=lost or {},
        log=None,
    )


def pushed(inserted, refused=0, lost=None):
    return PushCounts(inserted=inserted, refused=refused, lost=lost or {})


def test_an_undisturbed_run_balances():
    ledger = Ledger()
    ledger.report(0, 0, 30, pushed(30))
    ledger.report(0, 0, 50, pushed(50))  # Counts are totals: the newer one stands.
    ledger.report(1, 0, 20, pushed(20))
    shards = [
        shard(0, 30, 5, {(0, 0): (25, 0, 50), (1, 0): (10, 0, 10)}),
        shard(1, 35, 0, {(0, 0): (25, 0, 45), (1, 0): (10, 0, 20)}),
    ]
    assert ledger.balance(shards) == {
        "sent": 70,
        "inserted": 70,
        "refused": 0,
        "lost": {},
        "resident": 65,
        "evicted": 5,
        "sampled": 0,
        "priorities_applied": 0,
        "priorities_stale": 0,
        "balanced": True,
    }


def test_what_a_killed_actor_sent_is_known_from_its_chunks():
    """It reported 10, but a chunk that arrived says 40 were sent with it; 30 of these came: 10 are lost with it."""
    ledger = Ledger()
    ledger.report(2, 0, 10, pushed(10))
    ledger.died(2, 0)
    ledger.report(2, 1, 8, pushed(8))
    balance = ledger.balance([shard(0, 38, 0, {(2, 0): (30, 0, 40), (2, 1): (8, 0, 8)})])
    assert balance["sent"] == 48 and balance["lost"] == {"actor died": 10} and balance["balanced"]


def test_a_killed_actor_that_no_shard_heard_of_lost_what_it_reported():
    ledger = Ledger()
    ledger.report(0, 0, 12, pushed(0, 0, {"shard 1 died": 4}))
    ledger.died(0, 0)
    balance = ledger.balance([shard(0, 0, 0, {})])
    assert balance["lost"] == {"shard 1 died": 4, "actor died": 8} and balance["balanced"]


def test_transitions_that_nobody_accounts_for_are_noticed():
    """Kills: a rest that is always called lost."""

    def balanced(pushed, *shard_of):
        ledger = Ledger()
        ledger.report(0, 0, 50, pushed)
        return ledger.balance([shard(*shard_of)])["balanced"]

    assert balanced(pushed(49, 1), 0, 49, 0, {(0, 0): (49, 1, 50)})
    assert not balanced(pushed(49), 0, 49, 0, {(0, 0): (49, 0, 50)}), "the actor knows nothing of one"
    assert not balanced(pushed(49, 1), 0, 50, 0, {(0, 0): (50, 0, 50)}), "one is there that was refused"
    assert not balanced(pushed(50), 0, 49, 0, {(0, 0): (50, 0, 50)}), "the shard has one in its books, and has it not"


def test_what_a_shard_lost_is_lost():
    """50 came, 8 of them are not in its log any more; of 6 more that it had answered for, the restarted shard knows nothing."""
    ledger = Ledger()
    ledger.report(0, 0, 60, pushed(56, 0, {"shard 0 died": 4}))
    balance = ledger.balance([shard(0, 30, 12, {(0, 0): (50, 0, 60)}, {"not in the log": 8})])
    assert balance["lost"] == {"not in the log": 8, "shard 0 died": 4, "inserted, and not in the log of a shard that died": 6}
    assert balance["balanced"] and balance["sent"] == 60 and balance["inserted"] == 42


def test_an_earlier_command_is_known_from_the_shards():
    ledger = Ledger()
    ledger.report(0, 1_000, 5, pushed(5))
    balance = ledger.balance([shard(0, 25, 10, {(0, 0): (30, 2, 40), (0, 1_000): (5, 0, 5)})])
    assert (
        balance["lost"] == {"on its way when an earlier command ended": 8} and balance["refused"] == 2 and balance["balanced"]
    )


def test_what_a_shard_cannot_read_any_more_is_lost_once():
    """Eight transitions of an altered record. Kills: a loss that is counted for the shard and again for whoever sent them."""
    books = {(0, 0): (42, 0, 50), UNKNOWN_SENDER: (8, 0, 0)}
    altered = shard(0, 42, 0, books, lost={"altered": 8})
    assert Ledger().balance([altered])["lost"] == {"altered": 8}
    assert Ledger().balance([altered])["balanced"] and Ledger().balance([altered])["sent"] == 50
    alive = Ledger()
    alive.report(0, 0, 50, pushed(50))
    assert alive.balance([altered])["lost"] == {"altered": 8} and alive.balance([altered])["balanced"]
    last = shard(0, 42, 0, books | {(0, 0): (42, 0, 42)}, lost={"altered": 8})
    balance = Ledger().balance([last])
    assert (balance["sent"], balance["lost"], balance["balanced"]) == (50, {"altered": 8}, True), (
        "its sender sent nothing later"
    )


def test_what_a_hanging_shard_took_after_all_is_not_lost():
    ledger = Ledger()
    ledger.report(0, 0, 50, pushed(42, lost={UNANSWERED: 8}))
    balance = ledger.balance([shard(0, 50, 0, {(0, 0): (50, 0, 50)})])
    assert balance["balanced"] and balance["lost"] == {} and balance["sent"] == balance["inserted"] == 50


def test_a_shards_own_books_are_checked_at_any_moment():
    right = shard(0, 30, 5, {(0, 0): (25, 0, 50), (1, 0): (10, 0, 10)})
    assert Ledger.faults([right]) == []
    wrong = shard(1, 30, 5, {(0, 0): (25, 0, 50)})
    (sentence,) = Ledger.faults([right, wrong])
    assert "shard 1" in sentence and "25 by its senders, 35 inserted" in sentence
