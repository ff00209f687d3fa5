"""`qfleet train` on a cluster whose nodes are all on this machine: what can be tested of one where no hosts can be made.

It runs with `make test` only there.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from hosts import why_no_hosts
from ray_runs import Run, check_ledger, check_logs, end_all

pytestmark = [pytest.mark.ray] if why_no_hosts() else [pytest.mark.ray, pytest.mark.slow]

# Nodes join and leave as the lines of its input say.
NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes = {}
print(cluster.address, flush=True)
for line in sys.stdin:
    name, *role = line.split()
    if role:
        nodes[name] = cluster.add_node(num_cpus=4 if role == ["learner"] else 2, labels={"role": role[0]})
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""


@pytest.fixture
def nodes():
    """Returns the cluster's address and a function that has a node join or leave: `learner`, `w1` and `w2` are there."""
    directory = tempfile.mkdtemp(prefix="qf-")  # Short, for the paths of Ray's sockets.
    process = subprocess.Popen(
        [sys.executable, "-c", NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_TMPDIR": directory},
    )

    def tell(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    try:
        address = process.stdout.readline().strip()
        for line in ("learner learner", "w1 env", "w2 env"):
            tell(line)
        yield address, tell
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(directory)


def test_nodes_join_and_leave_and_the_run_goes_on(nodes, tmp_path):
    address, tell = nodes
    words = ["train", "gridworld", "--address", address, "--max-updates", "1000000000", "--max-minutes", "60"]
    words += ["--log-period-seconds", "1", "--actors.num-actors", "6", "--evaluation.period-seconds", "5"]
    words += ["--actors.node-labels", "role=env", "--learner.node-labels", "role=learner", "--run-dir", tmp_path / "run"]
    run = Run(tmp_path / "run", *words)

    def wait_for_actors(number):
        run.wait_for(f"{number} actors that act", lambda: run.rows() and run.rows()[-1].get("actor/num_alive") == number)

    try:
        wait_for_actors(4)
        tell("w3 env")
        wait_for_actors(6)
        tell("w2")
        wait_for_actors(4)
        then = run.updates()
        run.wait_for("more updates", lambda: run.updates() > then + 100)
        run.process.send_signal(signal.SIGINT)
        status, summary = run.end()
    finally:
        end_all([run])
    assert status == 130 and summary["updates"] > 0
    check_ledger(summary["ledger"])
    check_logs(run.path, num_learner_deaths=0)
