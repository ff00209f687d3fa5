"""A video is one whole episode, in colour, that a player can decode."""

import io

import av
import numpy as np
import pytest

from actors.environments import probe
from actors.gridworld import GRIDWORLD_ID
from common.config import EnvConfig, NetworkConfig
from common.networks import make_network
from deploy import video


@pytest.mark.parametrize(
    ("config", "torso", "size"),
    [
        (EnvConfig(game="pong", frame_stack=4, max_episode_frames=600), "dqn2013", (420, 320)),
        (EnvConfig(game="CartPole-v1"), "mlp", (800, 1200)),
        (EnvConfig(game=GRIDWORLD_ID), "mlp", (288, 384)),
    ],
    ids=["atari", "gymnasium", "gridworld"],
)
def test_record_writes_one_picture_a_step(tmp_path, monkeypatch, config, torso, size):
    network = make_network(NetworkConfig(torso=torso, hidden_sizes=(16,)), probe(config), 0)
    path = tmp_path / "episode.mp4"
    steps = []
    play = video._play

    def counted(*arguments):
        for picture, reward in play(*arguments):
            steps.append(reward)
            yield picture, reward

    monkeypatch.setattr(video, "_play", counted)
    episode_return = video.record(config, network, path, epsilon=1.0, seed=0)
    assert episode_return == pytest.approx(sum(steps))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(steps) > 1
    assert frames[0].shape == (*size, 3)
    assert any((frame != frames[0]).mean() > 1e-3 for frame in frames)  # It moves.
    with av.open(io.BytesIO(video.still(path))) as picture:
        shown = next(picture.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    nearest = min(range(len(frames)), key=lambda i: np.abs(frames[i] - shown).mean())
    assert np.abs(frames[nearest] - shown).mean() < 8  # What JPEG takes.


def test_what_cannot_be_decoded_has_no_still(tmp_path):
    (tmp_path / "torn.mp4").write_bytes(b"moving pictures")
    assert video.still(tmp_path / "torn.mp4") is None
