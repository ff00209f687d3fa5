"""The layout of a run's logs: what an altered one is refused with."""

from dataclasses import replace

import pytest

from common.errors import UserError
from deploy.recipes import gridworld
from deploy.replay_logs import ReplayLogs


def test_an_altered_layout_is_refused_with_what_to_do_whatever_the_byte(tmp_path):
    """Kills: a layout that is believed, so that logs are taken for those of other shards."""
    config = gridworld()
    config = replace(config, replay=replace(config.replay, num_shards=2))
    ReplayLogs(tmp_path, config).begin({})
    path = tmp_path / "replay" / "layout.msgpack"
    data = path.read_bytes()
    for offset in range(len(data)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(UserError, match="its checksum is wrong: restore it, or delete"):
            ReplayLogs(tmp_path, config).begin({"shards": []})
        path.write_bytes(data[:offset])
        with pytest.raises(UserError, match="its checksum is wrong"):
            ReplayLogs(tmp_path, config).begin({"shards": []})
