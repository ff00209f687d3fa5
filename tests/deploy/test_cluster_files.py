"""The files of deploy/cluster: each is what its reader takes, a misspelled field anywhere in it is found, and its commands exist.

python -m pytest tests/deploy/test_cluster_files.py
"""

import copy
import os
import re
import signal
import subprocess
import time
from importlib.metadata import version

import pytest
import yaml

from deploy import cli
from deploy.recipes import RECIPES
from tests.deploy.cluster_files import (
    FOLDER,
    ROOT,
    TEXT_CHECKS,
    YAML_CHECKS,
    check_commands,
    copied,
    load,
    qfleet_commands,
)

PAGES = ["cluster-launcher.md", "docker.md", "kuberay.md", "ray-jobs.md", "slurm.md"]
ALL = [*YAML_CHECKS, *TEXT_CHECKS]

# Mappings whose keys are names that the file itself gives: any name is right there, or another test knows the right ones.
NAMES_OF_ITS_OWN = {
    "launcher-aws.yaml": {"available_node_types", "labels", "resources", "file_mounts"},
    "kuberay-cluster.yaml": {"labels"},
    "kuberay-job.yaml": {"labels"},
    "compose.yaml": {"environment", "services", "volumes", "secrets", "ulimits"},
    "compose.gpu.yaml": {"services"},
}


def places(value, path=()):
    """Yields the path of every key in a document, at every depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def misspelled(document, path):
    """Returns the document with the last letter of one key doubled."""
    changed = copy.deepcopy(document)
    *parents, key = path
    holder = changed
    for step in parents:
        holder = holder[step]
    items = [(name + name[-1] if name == key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)
    return changed


def is_wrong(check, value):
    try:
        check(value)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", YAML_CHECKS)
def test_file_is_what_its_reader_takes(name):
    YAML_CHECKS[name](load(FOLDER / name))


@pytest.mark.parametrize("name", TEXT_CHECKS)
def test_script_has_no_fault(name):
    TEXT_CHECKS[name]((FOLDER / name).read_text())


def test_every_file_is_checked():
    assert {path.name for path in FOLDER.iterdir()} == set(ALL)


@pytest.mark.parametrize("name", YAML_CHECKS)
def test_misspelled_field_is_found_at_every_depth(name):
    document = {key: value for key, value in load(FOLDER / name).items() if not key.startswith("x-")}
    free = NAMES_OF_ITS_OWN.get(name, set())
    tried = [path for path in places(document) if len(path) == 1 or path[-2] not in free]
    missed = [path for path in tried if not is_wrong(YAML_CHECKS[name], misspelled(document, path))]
    assert tried and not missed


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("launcher-aws.yaml", ("max_workers",)),
        ("launcher-aws.yaml", ("provider", "region")),
        ("launcher-aws.yaml", ("available_node_types", "env", "max_workers")),
        ("launcher-aws.yaml", ("available_node_types", "env", "node_config", "InstanceMarketOptions", "MarketType")),
        ("kuberay-job.yaml", ("spec", "backoffLimit")),
        ("kuberay-job.yaml", ("spec", "rayClusterSpec", "workerGroupSpecs", 1, "maxReplicas")),
        ("kuberay-job.yaml", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "image")),
        ("kuberay-cluster.yaml", ("spec", "authOptions", "mode")),
        ("kuberay-cluster.yaml", ("spec", "workerGroupSpecs", 0, "rayStartParams", "object-store-memory")),
        (
            "kuberay-cluster.yaml",
            ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMounts", 0, "mountPath"),
        ),
        ("kuberay-runs.yaml", ("spec", "accessModes")),
        ("compose.yaml", ("services", "worker", "deploy", "replicas")),
        ("compose.yaml", ("services", "head", "shm_size")),
        ("compose.gpu.yaml", ("services", "head", "deploy", "resources", "reservations", "devices", 0, "capabilities")),
        ("runtime-env.yaml", ("excludes",)),
    ],
    ids=str,
)
def test_misspelled_field_is_found(name, path):
    document = load(FOLDER / name)
    assert path in list(places(document))
    assert is_wrong(YAML_CHECKS[name], misspelled(document, path))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("Dockerfile", "WORKDIR /opt", "WORKDIRR /opt"),
        ("Dockerfile", "COPY actors", "COPY actorss"),
        ("Dockerfile", "USER ${UID}", "USER root"),
        ("slurm.sh", "\nfi\n", "\nif\n"),
        ("slurm.sh", '"$token_file" 2>', "$token_file 2>"),
        ("slurm.sh", "--min-nodes", "--min-nodess"),
        ("slurm.sh", "ray symmetric-run", "ray symmetric-runn"),
    ],
)
def test_fault_of_a_script_is_found(name, right, wrong):
    text = (FOLDER / name).read_text()
    assert right in text
    assert is_wrong(TEXT_CHECKS[name], text.replace(right, wrong))


@pytest.mark.parametrize(
    "change",
    [
        {"head_node_type": "hed"},
        {"head_start_ray_commands": ["ray start --head --dashbord-host=127.0.0.1"]},
        {"max_workers": 0},
    ],
    ids=str,
)
def test_wrong_value_of_the_launcher_is_found(change):
    assert is_wrong(YAML_CHECKS["launcher-aws.yaml"], load(FOLDER / "launcher-aws.yaml") | change)


@pytest.mark.parametrize("wrong", [{"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": "1"}, {"cpu": "16"}, {}], ids=str)
def test_requests_that_are_not_the_limits_are_found(wrong):
    document = load(FOLDER / "kuberay-cluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["requests"] = wrong
    assert is_wrong(YAML_CHECKS["kuberay-cluster.yaml"], document)


# Until --address, the labels of nodes and the recipe `small-cluster` are there; then without this mark.
@pytest.mark.parametrize(
    "path", [*(FOLDER / name for name in ALL), *(ROOT / "docs" / page for page in PAGES)], ids=lambda path: path.name
)
def test_our_commands_exist(path):
    for command, subject, *flags in qfleet_commands(path.read_text()):
        if command in ("train", "plan"):
            assert subject in RECIPES
            cli._run_config(RECIPES[subject](), flags, f"qfleet {command}")
        elif command == "resume":
            cli._run_config(RECIPES["pong"](), cli._without_from(flags)[0], "qfleet resume")
        else:
            assert command in ("report", "evaluate") and not flags


@pytest.mark.parametrize("page", PAGES)
def test_rays_commands_in_the_documentation_exist(page):
    check_commands((ROOT / "docs" / page).read_text())


def test_every_launch_runs_one_of_our_commands():
    for name in ("launcher-aws.yaml", "kuberay-job.yaml", "slurm.sh", "compose.yaml", "runtime-env.yaml"):
        assert qfleet_commands((FOLDER / name).read_text()), name


@pytest.mark.parametrize(
    "path", [*(FOLDER / name for name in ALL), *(ROOT / "docs" / page for page in PAGES)], ids=lambda path: path.name
)
def test_runs_go_to_an_absolute_path_and_actors_to_their_nodes(path):
    for command, _, *flags in qfleet_commands(path.read_text()):
        if command == "train":
            assert flags[flags.index("--run-dir") + 1].startswith(("/", "$"))
            assert flags[flags.index("--address") + 1] == "auto"
            assert flags[flags.index("--actors.node-labels") + 1] == "role=env"
            assert flags[flags.index("--learner.node-labels") + 1] == "role=learner"


@pytest.mark.parametrize("name", ALL)
def test_no_token_is_written_anywhere(name):
    text = (FOLDER / name).read_text()
    assert not re.search(r"RAY_AUTH_TOKEN[ =:]", text) and not re.search(r"\b[0-9a-f]{32,}\b", text)


def test_launcher_asks_for_the_token_and_keeps_the_dashboard_to_itself():
    config = load(FOLDER / "launcher-aws.yaml")
    options = " ".join(config["docker"]["run_options"])
    assert "--env RAY_AUTH_MODE=token" in options and "--env RAY_USAGE_STATS_ENABLED=0" in options
    assert "--env RAY_AUTH_TOKEN_PATH=/home/qfleet/.ray/auth_token" in options
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "--disable-usage-stats" in start


def test_launcher_has_the_gpu_on_the_head_and_actors_on_spot_nodes():
    config = load(FOLDER / "launcher-aws.yaml")
    head, env = (config["available_node_types"][name] for name in ("head", "env"))
    assert config["head_node_type"] == "head" and head["labels"] == {"role": "learner"} and env["labels"] == {"role": "env"}
    assert env["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"] and env["max_workers"] == config["max_workers"]


def test_kuberay_job_has_the_cluster_of_the_other_file():
    job, cluster = load(FOLDER / "kuberay-job.yaml"), load(FOLDER / "kuberay-cluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["backoffLimit"] > 0


def test_kuberay_groups_have_their_labels_and_see_the_same_run_directory():
    spec = load(FOLDER / "kuberay-cluster.yaml")["spec"]
    claim = load(FOLDER / "kuberay-runs.yaml")["metadata"]["name"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    learner, env = spec["workerGroupSpecs"]
    assert (learner["labels"], env["labels"]) == ({"role": "learner"}, {"role": "env"})
    for group in (spec["headGroupSpec"], learner):
        pod = group["template"]["spec"]
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim
        assert container["volumeMounts"][0]["mountPath"] == "/runs"
    limits = learner["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and spec["enableInTreeAutoscaling"] and env["minReplicas"] < env["maxReplicas"]


def test_versions_are_those_of_the_constraints():
    assert load(FOLDER / "kuberay-cluster.yaml")["spec"]["rayVersion"] == version("ray")
    assert f"ray=={version('ray')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_all_clusters_run_the_same_image():
    names = ("launcher-aws.yaml", "kuberay-job.yaml", "kuberay-cluster.yaml", "Dockerfile")
    images = {image for name in names for image in re.findall(r"registry\.example\.com/\S+", (FOLDER / name).read_text())}
    assert len(images) == 1


def test_compose_publishes_nothing_and_takes_the_token_from_a_secret():
    document = load(FOLDER / "compose.yaml")
    (secret,) = document["secrets"]
    for service in document["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["secrets"] == [secret] and service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret}"
        assert service["environment"]["RAY_AUTH_MODE"] == "token" and service["environment"]["RAY_USAGE_STATS_ENABLED"] == "0"
        assert service["shm_size"] and service["ulimits"]["nofile"]["hard"] >= 65536 and service["init"]


def test_image_asks_for_a_token_and_runs_as_no_root():
    text = (FOLDER / "Dockerfile").read_text()
    assert "RAY_AUTH_MODE=token" in text and "RAY_USAGE_STATS_ENABLED=0" in text and "PIP_CONSTRAINT=" in text
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["${UID}"]


def test_context_of_the_image_has_what_is_copied_and_nothing_private():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {".git", ".venv", "runs", "**/auth_token", "**/*.pem"} <= set(lines)
    sources = copied((FOLDER / "Dockerfile").read_text())
    assert not set(sources) & set(lines)
    packages = re.findall(r'packages = \["actors".*\]', (ROOT / "pyproject.toml").read_text())
    assert set(yaml.safe_load(packages[0].partition("= ")[2])) <= set(sources)


@pytest.fixture
def slurm(tmp_path):
    """Returns a start of slurm.sh on two pretended nodes, with a Ray, a Slurm and a qfleet that write down what they are told."""
    checkout, log, token = tmp_path / "checkout", tmp_path / "log", tmp_path / "auth_token"
    started = []
    programs = {
        "scontrol": 'case $1 in show) echo "$3" ;; *) echo "scontrol $*" >>"$LOG" ;; esac',
        "srun": 'echo "srun ${*:1:6}" >>"$LOG"; for NODE in head cpu; do export NODE; bash -c "${*: -1}" & done; wait -n; wait',
        "getent": 'echo "10.0.0.1 STREAM"',
        "hostname": 'echo "$NODE"',
        "ray": 'echo "ray $*" >>"$LOG"; while [[ $1 != -- ]]; do shift; done; shift; [[ $NODE != head ]] || exec "$@"',
        "qfleet": """trap 'echo terminated >>"$LOG"; exit 130' TERM
                     echo "qfleet $*" >>"$LOG"
                     for ((i = 0; i < ${STAY:-0}; i++)); do sleep 0.05; done""",  # No child outlives a signal by more.
    }
    folder = checkout / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    token.write_text("not-to-be-seen")
    token.chmod(0o600)

    def start(**more):
        variables = {
            "QFLEET_CHECKOUT": str(checkout),
            "QFLEET_RUNS": str(tmp_path / "runs"),
            "RAY_AUTH_TOKEN_PATH": str(token),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST_HET_GROUP_0": "head",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "cpu",
            "TMPDIR": str(tmp_path),
            "LOG": str(log),
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables | more
        environment["PATH"] = f"{folder}:{environment['PATH']}"
        script = ["bash", str(FOLDER / "slurm.sh")]
        process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start, log, token
    for process in started:
        with process:  # Closes its output, and waits.
            process.kill()


def test_slurm_starts_one_learner_and_keeps_the_token_off_command_lines(slurm):
    start, log, token = slurm
    process = start()
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 0
    lines = log.read_text().splitlines()
    nodes = sorted(line for line in lines if line.startswith("ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2"))
    assert len(nodes) == 2
    assert "--num-gpus=0 --labels=role=env" in nodes[0] and "--num-gpus=1 --labels=role=learner" in nodes[1]
    assert [line for line in lines if line.startswith("qfleet ")] == [
        "qfleet train apex --address auto --actors.node-labels role=env --learner.node-labels role=learner "
        f"--run-dir {token.parent}/runs/apex"
    ]
    assert "not-to-be-seen" not in log.read_text() and "scontrol requeue" not in log.read_text()


def test_slurm_refuses_a_token_that_others_can_read(slurm):
    start, log, token = slurm
    token.chmod(0o644)
    process = start()
    assert "mode 644" in process.communicate(timeout=60)[0] and process.returncode == 2
    assert not log.exists()


def test_slurm_asks_for_a_checkpoint_and_requeues_when_time_is_over(slurm):
    start, log, _ = slurm
    process = start(STAY="1200")
    deadline = time.monotonic() + 60
    # The driver's own line: Ray's, which has the driver's command in it, comes before there is a driver to be told.
    while not (log.exists() and "\nqfleet train" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert "a checkpoint" in process.communicate(timeout=60)[0]
    assert log.read_text().splitlines()[-2:] == ["terminated", "scontrol requeue 7"]
