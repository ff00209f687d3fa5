"""The protocol card: what a reader must know of an evaluation before comparing its return with another one.

It is in summary.json and in what `qfleet evaluate --json` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.config import ATARI_PROTOCOLS, EnvConfig, ProtocolName, RunConfig
from common.metrics import EvaluationResult
from deploy import human_scores


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolCard:
    """How an evaluation was played and what was trained for it. None: it has no meaning outside Atari, or is off."""

    protocol: str
    """What was really played, not what was asked for: legacy, machado or custom for Atari, gymnasium else."""

    sticky_action_probability: float | None
    """Chance that the emulator repeated the last action, in evaluation."""

    noop_max: int | None
    """At most so many no-op frames at the start of an episode, in evaluation."""

    fire_reset: bool | None
    """An episode began with a frame of FIRE, in evaluation, where the game has that action."""

    max_episode_frames: int | None
    """Frames after which an episode was cut, in evaluation."""

    frame_skip: int | None
    """Frames per step, in evaluation."""

    action_set: Literal["minimal", "full"] | None
    """minimal: the actions that the game uses; full: all 18."""

    num_actions: int
    """Outputs of the network."""

    life_loss_signal: bool | None
    """Training saw a lost life as a terminal state. Evaluation never does."""

    reward_clip: float | None
    """Training rewards were clipped to [-reward_clip, reward_clip]. Evaluation adds up raw ones."""

    epsilon: float
    """Chance of a random action, in evaluation."""

    episodes: int
    """Episodes that the mean return is of."""

    training_frames: int
    """Emulator frames (outside Atari: env steps) that training had seen when the evaluated parameters were taken."""

    human_scores: str | None
    """Source of the random and human scores behind human_normalized_score; None for a game that is not of the 57."""

    commit: str | None
    """Git commit of the qfleet that evaluated, with -dirty where it was changed; None where it was not run from a checkout."""

    warnings: list[str]
    """What forbids or limits a comparison, a sentence each."""


def make_card(
    config: RunConfig,
    result: EvaluationResult,
    *,
    env: EnvConfig,
    num_actions: int,
    training_frames: int,
    commit: str | None,
    warnings: Sequence[str] = (),
) -> ProtocolCard:
    """Describes an evaluation of the run `config` that was played in `env`."""
    is_atari = env.is_atari
    action_set: Literal["minimal", "full"] = "full" if env.full_action_set else "minimal"
    return ProtocolCard(
        protocol=result.protocol,
        sticky_action_probability=env.sticky_action_probability if is_atari else None,
        noop_max=env.noop_max if is_atari else None,
        fire_reset=env.fire_reset if is_atari else None,
        max_episode_frames=env.max_episode_frames if is_atari else None,
        frame_skip=env.frame_skip if is_atari else None,
        action_set=action_set if is_atari else None,
        num_actions=num_actions,
        life_loss_signal=config.env.life_loss_terminates if is_atari else None,
        reward_clip=config.actors.reward_clip,
        epsilon=result.epsilon,
        episodes=result.episodes,
        training_frames=training_frames,
        human_scores=human_scores.SOURCE if env.game in human_scores.reference_scores() else None,
        commit=commit,
        warnings=[*warnings, *_VIDEO_PINBALL] if env.game == "video_pinball" else list(warnings),
    )


_VIDEO_PINBALL = [
    "random play of video_pinball has 16256.9 in the table used here and 0.0 in that of Atari-5: "
    "human-normalized scores of this game differ by their source"
]


def mismatches(trained: EnvConfig, evaluated: EnvConfig, protocol: ProtocolName, num_actions: int) -> list[str]:
    """Says, a sentence each, where training differs from an evaluation under `protocol`, and where that is not what was played."""
    sentences = []
    for name, wanted in ATARI_PROTOCOLS[protocol].items():
        before, now = getattr(trained, name), getattr(evaluated, name)
        if name == "full_action_set":
            if now != wanted:
                kind = "full" if now else "minimal"
                sentences.append(
                    f"named {protocol}, but with the {kind} action set ({num_actions}), since the network has {num_actions} outputs"
                )
        elif name == "life_loss_terminates":
            if before != wanted:
                sentences.append(
                    f"named {protocol}, but trained with a lost life as a terminal state, which {protocol} does not allow"
                )
        elif before != now:
            sentences.append(
                f"trained {_phrase(name, before)}, evaluated {_phrase(name, now)}: "
                f"this is not comparable with runs trained under {protocol}"
            )
    return sentences


def _phrase(name: str, value: float) -> str:
    return {
        "sticky_action_probability": f"with sticky actions {value:g}" if value else "without sticky actions",
        "noop_max": f"with up to {value} no-ops at the start" if value else "without no-ops at the start",
        "fire_reset": f"{'with' if value else 'without'} a frame of FIRE at the start",
        "max_episode_frames": f"with episodes of up to {value:,} frames",
        "frame_skip": f"with {value} frames a step",
    }[name]
