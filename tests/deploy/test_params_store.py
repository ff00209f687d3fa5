"""The params store and its local handle: the newest by (epoch, version), and how old it is."""

import numpy as np
import pytest

from common import wire
from common.errors import WireError
from common.messages import ParamsSnapshot
from deploy import local_handles, params_store
from deploy.local_handles import LocalParams
from deploy.params_store import ParamsStore


def packed(epoch, version):
    params = np.array([epoch, version], np.float32)
    return wire.pack(ParamsSnapshot(run="r", epoch=epoch, version=version, layout="w(2,)", params=params))


def held(store):
    message = store.latest(-1, 0)
    return None if message is None else (lambda s: (s.epoch, s.version))(wire.unpack(message, ParamsSnapshot))


def test_latest_is_what_is_newer_than_the_askers():
    store = ParamsStore()
    assert store.latest(-1, 0) is None
    store.publish(packed(1, 850))
    assert [store.latest(*asker) is not None for asker in ((-1, 0), (0, 900), (1, 849), (1, 850), (1, 851), (2, 0))] == [
        *[True, True, True],
        *[False, False, False],
    ]


def test_an_older_publication_is_dropped():
    """Also the late one of a learner that was given up: its epoch is past, however great its version."""
    store = ParamsStore()
    for epoch, version, expected in ((0, 900, (0, 900)), (1, 850, (1, 850)), (0, 950, (1, 850)), (1, 860, (1, 860))):
        store.publish(packed(epoch, version))
        assert held(store) == expected


def test_publish_copies_and_refuses_what_it_cannot_read():
    store = ParamsStore()
    message = packed(0, 1)
    store.publish(message)
    message[:] = 0
    with pytest.raises(WireError):
        store.publish(message)
    assert held(store) == (0, 1)


def test_age_is_of_the_snapshot_that_was_returned(monkeypatch):
    now = [10.0]
    for module in (params_store, local_handles):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    params = LocalParams(ParamsStore())
    assert params.age_seconds() is None
    params.publish(packed(0, 1))
    now[0] = 12.0
    assert params.poll(-1, 0) is not None and params.age_seconds() == 2.0
    params.publish(packed(0, 2))
    now[0] = 13.0
    assert params.age_seconds() == 3.0
    assert params.poll(0, 1) is not None and params.age_seconds() == 1.0
