"""Tells when an actor's parameters stand still: it acts on with old ones, and nothing else in a run would show it."""

from __future__ import annotations

from dataclasses import dataclass

Version = tuple[int, int]  # (epoch, version), which rises lexicographically.

_MIN_REPORTS = (
    5  # Looks for newer parameters, one a report at least: more than a pull needs, however late the reports are read.
)
_MAX_SENTENCES = 3  # Of one call: where all stand still, the first few say enough.
_ADVICE = "check that its host reaches the params store's (workers.json names both), and its process with py-spy dump --pid PID"


@dataclass(slots=True)
class _Slot:
    """An actor slot as its last report showed it."""

    incarnation: int
    version: Version
    since: float
    """Of its first report with this version."""
    behind_since: float | None
    """Since when a newer one has been known; None where there is none."""
    num_reports_behind: int = 0
    told: bool = False


class ParamsWatch:
    """Compares the versions that actors report with the newest that the learner has published; the clock is the caller's.

    An actor is judged by its reports alone: one that starts, hangs or is told to rest says nothing, and others watch over it. A
    learner that publishes seldom is no reason: what counts is the time for which a newer version could have been pulled.
    """

    def __init__(self, alarm_seconds: float | None) -> None:
        self._alarm_seconds = alarm_seconds
        self._newest: Version = (-1, -1)
        self._slots: dict[int, _Slot] = {}
        self._sentences: list[str] = []

    def on_published(self, now: float, version: Version) -> None:
        """Takes the version that the learner published last."""
        self._newest = max(self._newest, version)
        for slot in self._slots.values():
            if slot.behind_since is None and slot.version < self._newest:
                slot.behind_since = now

    def on_actor(self, now: float, index: int, incarnation: int, version: Version) -> None:
        """Takes the version that an actor acts with; its epoch is -1 where it has never received any."""
        slot = self._slots.get(index)
        if slot is None or (slot.incarnation, slot.version) != (incarnation, version):
            behind_since = now if version < self._newest else None
            self._slots[index] = _Slot(incarnation, version, now, behind_since)
        elif slot.behind_since is not None:
            slot.num_reports_behind += 1
            if self._stands_still(now, slot) and not slot.told:
                slot.told = True
                self._sentences.append(self._sentence(now, index, slot))

    def forget(self, index: int) -> None:
        """Drops an actor that died."""
        self._slots.pop(index, None)

    def new_alarms(self) -> list[str]:
        """Returns a sentence for each actor found standing still since the last call; none twice before it has moved."""
        sentences, self._sentences = self._sentences, []
        more = len(sentences) - _MAX_SENTENCES
        return [*sentences[:_MAX_SENTENCES], f"so do the parameters of {more} more actors"] if more > 0 else sentences

    def _stands_still(self, now: float, slot: _Slot) -> bool:
        if self._alarm_seconds is None or slot.behind_since is None:
            return False
        return now - slot.behind_since >= self._alarm_seconds and slot.num_reports_behind >= _MIN_REPORTS

    def _sentence(self, now: float, index: int, slot: _Slot) -> str:
        seconds = now - slot.since
        what = (
            f"actor {index} has never received parameters and acts for {seconds:.0f} s with those it was built with"
            if slot.version[0] < 0
            else f"the parameters of actor {index} stand still: it acts for {seconds:.0f} s with {_name(slot.version)}"
        )
        return f"{what}, while the learner has published {_name(self._newest)}; {_ADVICE}"


def _name(version: Version) -> str:
    return f"version {version[1]} (epoch {version[0]})"
