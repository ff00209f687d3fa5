"""Records an episode as H.264 video."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv

from actors.environments import GymnasiumEnvironment, make_environment, push_planes
from actors.policy import epsilon_greedy
from common.config import EnvConfig
from common.messages import Array
from common.networks import QNetwork

_SCALE = 2
_MAX_SECONDS = 600


def record(
    config: EnvConfig, network: QNetwork, path: Path, *, epsilon: float, seed: int, most_steps: int | None = None
) -> float:
    """Plays one episode, or its first `most_steps`, and writes its pictures to `path` (mp4); returns the raw return."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen.
    config = replace(config, life_loss_terminates=False)
    rate = 60 // config.frame_skip if config.is_atari else 30
    total = 0.0
    with av.open(str(path), "w") as container:
        stream: Any = None
        for picture, reward in itertools.islice(_play(config, network, epsilon, seed), most_steps):
            total += reward
            picture = picture.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # H.264 wants even sizes.
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate))
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            if stream.frames < rate * _MAX_SECONDS:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return total


def still(path: Path) -> bytes | None:
    """Returns a JPEG from the middle of a video; None where it cannot be decoded."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek((container.duration or 0) // 2)
            picture = next(container.decode(stream)).to_image()  # type: ignore[no-untyped-call]
    except (av.FFmpegError, IndexError, StopIteration):
        return None
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return data.getvalue()


def _play(config: EnvConfig, network: QNetwork, epsilon: float, seed: int) -> Iterator[tuple[Array, float]]:
    """Yields (u8[H, W, 3], reward) of one episode."""
    environment = make_environment(config, 1, render=True)
    shadow = _colour_twin(config) if config.is_atari else None
    rng = np.random.default_rng(seed)
    spec = environment.spec
    stack = np.zeros((1, spec.frame_stack, *spec.plane_shape), np.dtype(spec.plane_dtype))
    stack[:, -1] = environment.reset(seed)
    picture = shadow.reset(seed=seed)[0][0, 0] if shadow else _render(environment)
    yield picture, 0.0
    ended = False
    while not ended:
        with torch.inference_mode():
            values = network(torch.from_numpy(stack)).numpy()
        actions = epsilon_greedy(rng, values, epsilon)
        step = environment.step(actions)
        push_planes(stack, step.planes, step.is_first)
        ended = bool(step.terminated[0] or step.truncated[0])
        if shadow is not None:
            pictures, reward, terminated, truncated, _ = shadow.step(actions)
            assert reward[0] == step.reward[0] and (terminated[0] or truncated[0]) == ended, "the colour twin fell out of step"
            picture = pictures[0, 0]
        else:
            picture = _render(environment)
        yield picture, float(step.reward[0])


def _colour_twin(config: EnvConfig) -> Any:
    """Returns the same game in colour and at full size: with the same seed and actions it is the same episode."""
    return AtariVectorEnv(
        config.game,
        1,
        num_threads=1,
        max_num_frames_per_episode=config.max_episode_frames,
        repeat_action_probability=config.sticky_action_probability,
        full_action_space=config.full_action_set,
        stack_num=1,
        frameskip=config.frame_skip,
        noop_max=config.noop_max,
        use_fire_reset=config.fire_reset,
        reward_clipping=False,
        grayscale=False,
        img_height=210,
        img_width=160,
    )


def _render(environment: Any) -> Array:
    assert isinstance(environment, GymnasiumEnvironment)
    return environment.render()
