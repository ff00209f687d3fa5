"""The layers of the two networks that all learners and systems of this folder have. Needs nothing."""

from __future__ import annotations

CONVOLUTIONS = {"nature": [[32, 8, 4], [64, 4, 2], [64, 3, 1]], "dqn2013": [[16, 8, 4], [32, 4, 2]]}
"""Channels, side and stride of each."""
HIDDEN = {"nature": 512, "dqn2013": 256}
