"""Factories of messages that tests of several folders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.messages import Array, TransitionChunk
from common.planes import codec_of, encode_block, join_blocks, planes_per_block
from deploy import ray_environment

ray_environment.prepare()  # Before any test imports Ray, which reads it then.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a folder's tests that start Ray in one process, where several run the tests."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group(f"ray in {item.path.parent.name}"))


@pytest.fixture
def encode_planes() -> Callable[[Array], dict[str, Any]]:
    """Returns the `Planes` fields of [P, *plane_shape] observations, as a chunk or a batch takes them.

    The last block is filled up with planes of zeros.
    """

    def encode(planes: Array, codec: str | None = None) -> dict[str, Any]:
        codec = codec or codec_of(planes.dtype.str)
        per_block = planes_per_block(planes.shape[1:], planes.dtype.str) if codec == "lz4" else 1
        padding = np.zeros((-len(planes) % per_block, *planes.shape[1:]), planes.dtype)
        blocks = np.concatenate([planes, padding]).reshape(-1, per_block, *planes.shape[1:])
        offsets, data = join_blocks([encode_block(block, codec) for block in blocks])
        return {
            "codec": codec,
            "plane_dtype": planes.dtype.str,
            "planes_per_block": per_block,
            "plane_shape": np.array(planes.shape[1:], np.int32),
            "block_offsets": offsets,
            "plane_data": data,
        }

    return encode


@pytest.fixture
def make_chunk(encode_planes: Callable[[Array], dict[str, Any]]) -> Callable[..., TransitionChunk]:
    """Returns a chunk of random content. Its planes are noise, so that no two are alike; any field may be given."""

    def make(
        rng: np.random.Generator,
        *,
        num_transitions: int = 3,
        num_planes: int = 20,
        frame_stack: int = 2,
        plane_shape: tuple[int, ...] = (4, 6),
        plane_dtype: str = "|u1",
        num_actions: int = 4,
        **fields: Any,
    ) -> TransitionChunk:
        noise = rng.integers(256, size=(num_planes, *plane_shape))
        stacks = rng.integers(num_planes, size=(2, num_transitions, frame_stack)).astype(np.uint16)
        defaults = {
            "run": "run-a",
            "actor_slot": int(rng.integers(4)),
            "incarnation": int(rng.integers(2)),
            "seq": int(rng.integers(1000)),
            "num_sent_before": int(rng.integers(1000)),
            "params_version": int(rng.integers(1 << 40)),
            "s_tm1": stacks[0],
            "s_t": stacks[1],
            "a_tm1": rng.integers(num_actions, size=num_transitions).astype(np.int32),
            "r_t": rng.normal(size=num_transitions).astype(np.float32),
            "discount_t": rng.random(num_transitions).astype(np.float32),
            "priority": rng.integers(1, 10, size=num_transitions).astype(np.float64),
        }
        planes = fields.pop("planes", noise.astype(plane_dtype))
        return TransitionChunk(**encode_planes(planes) | defaults | fields)

    return make
