"""A cluster of hosts that the tests of this folder share."""

import pytest
from hosts import Hosts, why_no_hosts


@pytest.fixture
def make_hosts(tmp_path):
    """Returns hosts of these names, for one test; skips it where none can be made."""
    made = []

    def make(*names):
        if reason := why_no_hosts():
            pytest.skip(reason)
        made.append(Hosts(tmp_path, *names))
        return made[-1]

    yield make
    for hosts in made:
        hosts.close()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """Ray on four hosts: `head`, `learner` (role=learner), `w1` and `w2` (role=env). Tests leave these four as they are, and add others."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("cluster"), "head", "learner", "w1", "w2") as hosts:
        head = hosts["head"]
        head.ray_start(num_cpus=1)
        head.wait_for_ray()
        hosts["learner"].ray_start(head, num_cpus=4, labels="role=learner")
        for name in ("w1", "w2"):
            hosts[name].ray_start(head, num_cpus=2, labels="role=env")
        for name in ("learner", "w1", "w2"):
            hosts[name].wait_for_ray()
        yield hosts
