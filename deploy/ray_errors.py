"""What Ray's errors say, in one line for a person."""

from __future__ import annotations

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

# By what Ray 2.60 writes, which it wraps in advice for other cases than the one at hand.
_CAUSES = (
    ("NODE_OUT_OF_MEMORY", "its node was running out of memory"),
    ("low on memory", "its node was running out of memory"),
    ("killed by `ray.kill`", "it was ended by ray.kill"),
    ("Worker exit type: SYSTEM_ERROR", "its process was killed or crashed"),
    ("its node has died", "its node died"),
    ("node failure", "its node died"),
    ("its owner has died", "the driver died"),
)


def one_line(error: BaseException) -> str:
    """Returns why a worker died or could not answer: its own error's type and last line, or in short what Ray says of its end."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(error, RayTaskError):
        return f"{type(cause).__name__}: {lines[-1] if lines else ''}"
    if isinstance(error, ActorUnavailableError):
        return "its process or its node is gone"
    if isinstance(error, RayActorError):
        if error.preempted:
            return "its node was preempted"
        for mark, sentence in _CAUSES:
            if mark in str(error):
                return sentence
    return lines[0] if lines else type(error).__name__
