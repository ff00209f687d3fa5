"""The broadcast of parameters on a local Ray: one object a version whoever asks, and the old ones freed."""

import os
import shutil
import sys
import tempfile
import time

import numpy as np
import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

import deploy
from common import wire
from common.messages import ParamsSnapshot
from deploy import roles
from deploy.ray_handles import Worker
from deploy.ray_params import RayParamsReader, RayParamsWriter

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]

LARGE = 500_000  # Parameters: 2 MB a message.
SMALL = 1_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def local_ray():
    temp_dir = tempfile.mkdtemp(prefix="qfleet-test-")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Workers cannot import a test.
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=128 * MIB,
        log_to_driver=False,
        _temp_dir=temp_dir,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def worker(local_ray):
    """Makes Ray workers and ends them."""
    workers = []

    def make(function, *args):
        workers.append(ray.remote(Worker).options(num_cpus=0.1, max_restarts=0).remote())
        ray.get(workers[-1].build.remote(function, *args), timeout=60)
        return workers[-1]

    yield make
    for each in workers:
        ray.kill(each)


@pytest.fixture
def store(worker):
    return worker(roles.make_params_store)


class Reading:
    """An actor's side in a worker: polls until it has what it waits for, and tells what it cost."""

    def __init__(self, store):
        self._reader = RayParamsReader(store)
        self.slowest_poll = 0.0

    def poll_until(self, epoch, version, seconds=30.0):
        """Returns (epoch, version) of the first that is newer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            started = time.monotonic()
            message = self._reader.poll(epoch, version)
            self.slowest_poll = max(self.slowest_poll, time.monotonic() - started)
            if message is not None:
                snapshot = wire.unpack(message, ParamsSnapshot)
                assert (snapshot.params == snapshot.version).all()
                return snapshot.epoch, snapshot.version
            time.sleep(0.001)
        return None

    def age_seconds(self):
        return self._reader.age_seconds()

    def slowest(self):
        return self.slowest_poll

    def imported_from(self):
        return deploy.__path__[0]


def packed(version, num_params, epoch=0):
    params = np.full(num_params, version, np.float32)
    return wire.pack(ParamsSnapshot(run="r", epoch=epoch, version=version, layout="w", params=params))


def publish(store, message):
    ray.get(store.call.remote("publish", message), timeout=30)


def version_of(message):
    return None if message is None else wire.unpack(message, ParamsSnapshot).version


def shared_memory():
    """Returns (bytes in the object store, bytes ever spilled, objects)."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.object_store_bytes_used, stats.spilled_bytes_total, stats.num_local_objects


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s"
        time.sleep(0.1)


def test_workers_run_this_checkout(worker, store):
    reading = worker(Reading, store)
    assert ray.get(reading.call.remote("imported_from"), timeout=30) == os.path.dirname(
        os.path.abspath(deploy.ray_params.__file__)
    )


@pytest.mark.parametrize("num_params", [SMALL, LARGE], ids=["inside_the_answer", "by_reference"])
def test_a_reader_gets_what_is_newer_and_nothing_else(store, num_params):
    reader = RayParamsReader(store)
    assert reader.fetch(-1, 0, 30.0) is None and reader.age_seconds() is None
    publish(store, packed(3, num_params))
    assert version_of(reader.fetch(-1, 0, 30.0)) == 3
    assert 0 <= reader.age_seconds() < 30
    assert reader.fetch(0, 3, 30.0) is None
    publish(store, packed(2, num_params, epoch=1))  # Fewer updates, a later start.
    publish(store, packed(900, num_params, epoch=0))  # Too late.
    assert version_of(reader.fetch(0, 3, 30.0)) == 2


@pytest.mark.parametrize("num_params", [SMALL, LARGE], ids=["inside_the_answer", "by_reference"])
def test_poll_gets_every_new_version_and_never_blocks(worker, store, num_params):
    reading = worker(Reading, store)
    for version in range(1, 20):
        publish(store, packed(version, num_params))
        got = ray.get(reading.call.remote("poll_until", 0 if version > 1 else -1, version - 1), timeout=60)
        assert got == (0, version)
    time.sleep(1.0)
    assert ray.get(reading.call.remote("age_seconds"), timeout=30) >= 1.0
    assert ray.get(reading.call.remote("slowest"), timeout=30) < 1.0  # Of a machine that others may keep busy.


def test_one_copy_for_all_readers_and_old_versions_are_freed(worker, store):
    """200 versions of 2 MB, twice each on their way, are six times what the object store holds.

    Ray frees what nobody refers to in batches, once a second: after that there are the two that the store keeps.
    """
    readings = [worker(Reading, store) for _ in range(3)]
    writer = RayParamsWriter(store)
    wait_until(lambda: shared_memory()[0] < MIB)
    spilled, message_bytes = shared_memory()[1], packed(0, LARGE).nbytes
    held = -1, 0
    for version in range(1, 201):
        writer.publish(packed(version, LARGE))
        if version % 4 == 0:
            got = ray.get([reading.call.remote("poll_until", *held) for reading in readings], timeout=60)
            assert all(g is not None and g > held for g in got)
            held = min(got)
        if version % 50 == 0:
            wait_until(lambda: shared_memory()[0] <= 2.1 * message_bytes)
    assert shared_memory()[1] == spilled


def test_readers_share_the_object(store):
    """Kills: a copy for each answer. Twenty answers, all held, are still one object."""
    publish(store, packed(1, LARGE))
    wait_until(lambda: shared_memory()[0] <= 1.1 * packed(0, LARGE).nbytes)
    messages = [RayParamsReader(store).fetch(-1, 0, 30.0) for _ in range(20)]
    assert len({message.__array_interface__["data"][0] for message in messages}) == 1
    assert all(not message.flags.writeable for message in messages)
    assert shared_memory()[0] <= 1.1 * packed(0, LARGE).nbytes


def test_small_messages_take_no_shared_memory(store):
    wait_until(lambda: shared_memory()[0] < MIB)
    before = shared_memory()[2]
    publish(store, packed(1, SMALL))
    messages = [RayParamsReader(store).fetch(-1, 0, 30.0) for _ in range(20)]
    assert [version_of(message) for message in messages] == [1] * 20
    assert shared_memory()[2] == before


def test_a_reader_outlives_the_publisher_and_one_that_was_told_the_version_before(worker, store):
    """The store owns what it was sent: a learner that dies takes nothing with it. An answer taken late is still good."""
    publisher = worker(RayParamsWriter, store)
    ray.get(publisher.call.remote("publish", packed(1, LARGE)), timeout=30)
    reader = RayParamsReader(store)
    wait_until(lambda: ray.get(store.call.remote("latest", -1, 0), timeout=30) is not None)
    assert reader.poll(-1, 0) is None  # Asks, and is told of version 1.
    ray.wait([reader._question], timeout=30)
    publish(store, packed(2, LARGE))
    ray.kill(publisher)
    time.sleep(1.0)
    got = []
    wait_until(lambda: got.append(reader.poll(-1, 0)) or got[-1] is not None)
    assert version_of(got[-1]) == 1


@pytest.mark.parametrize("num_params", [SMALL, LARGE], ids=["inside_the_answer", "by_reference"])
def test_a_dead_store_costs_nobody_anything(worker, num_params):
    """At any moment of a pull: before the question, with the question asked, and with the answer there."""
    for polls_before in range(3):
        store = worker(roles.make_params_store)
        publish(store, packed(1, num_params))
        reader = RayParamsReader(store)
        for _ in range(polls_before):
            if reader.poll(-1, 0) is not None:
                break
            time.sleep(0.2)
        ray.kill(store)
        time.sleep(1.0)
        for _ in range(20):
            started = time.monotonic()
            message = reader.poll(-1, 0)
            assert time.monotonic() - started < 5.0
            assert message is None or version_of(message) == 1
            time.sleep(0.02)
        assert reader.fetch(-1, 0, 5.0) is None


def test_a_version_that_never_comes_is_given_up_for_the_newest(store, monkeypatch):
    publish(store, packed(1, LARGE))
    reader = RayParamsReader(store)
    is_here = deploy.ray_params._is_here
    lost = []

    def all_but_the_first_object(reference):
        if reference is not reader._question:
            lost.append(reference) if not lost else None
            return reference != lost[0] and is_here(reference)
        return is_here(reference)

    monkeypatch.setattr(deploy.ray_params, "_is_here", all_but_the_first_object)
    monkeypatch.setattr(deploy.ray_params, "_FETCH_SECONDS", 0.5)
    wait_until(lambda: reader.poll(-1, 0) is None and lost)
    publish(store, packed(2, LARGE))
    got = []
    wait_until(lambda: got.append(reader.poll(-1, 0)) or got[-1] is not None)
    assert version_of(got[-1]) == 2
