"""What is wrong with a file of deploy/cluster: against published schemas, the rules of who reads it, and the commands that it runs.

Ray's launcher: the JSON schema in Ray's wheel. KubeRay: its published fields (kuberay_fields.yaml). Pods and volumes: the Kubernetes API, by
kubernetes-validate. Compose: the Compose Specification's schema, as check-jsonschema carries it. Dockerfile: hadolint. Scripts: shellcheck.
`ray` and `qfleet` commands: the options that those programs have. Nothing here needs a network.
"""

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import ray
import yaml
from ray.dashboard.modules.job.cli import job_cli_group
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_cli

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "cluster"
KUBERNETES = "1.34"
_FIELDS = Path(__file__).with_name("kuberay_fields.yaml")
_BIN = Path(sys.executable).parent

# Of EC2's RunInstances, as the launcher passes them on: what a file of ours may use. Ray's schema takes any object here.
_EC2_FIELDS: dict[str, Any] = {
    "InstanceType": str,
    "ImageId": str,
    "KeyName": str,
    "SubnetIds": list,
    "SecurityGroupIds": list,
    "IamInstanceProfile": {"Arn": str, "Name": str},
    "InstanceMarketOptions": {"MarketType": str, "SpotOptions": {"MaxPrice": str}},
    "BlockDeviceMappings": [{"DeviceName": str, "Ebs": {"VolumeSize": int, "VolumeType": str, "DeleteOnTermination": bool}}],
}


def load(path: Path) -> Any:
    """Returns a YAML file's one document, with a copy of what aliases and merges stand for."""
    return json.loads(json.dumps(yaml.safe_load(path.read_text())))


def check_launcher(config: dict[str, Any]) -> None:
    """Raises ValueError where Ray's cluster launcher would not take this, or a field of the cloud's is unknown."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    schema["properties"]["provider"]["additionalProperties"] = False  # Ray passes what it does not know on to the provider.
    _check_schema(schema, config)
    types = config["available_node_types"]
    _require(config["head_node_type"] in types, f"head_node_type {config['head_node_type']!r} is no node type")
    _require(sum(kind.get("min_workers", 0) for kind in types.values()) <= config["max_workers"], "max_workers < min_workers")
    for name, kind in types.items():
        _check_shape(_EC2_FIELDS, kind["node_config"], f"{name}.node_config")
        _require("InstanceType" in kind["node_config"] and "ImageId" in kind["node_config"], f"{name}: no machine or no image")
    for name in (key for key in config if key.endswith("_commands")):
        check_commands("\n".join(config[name]))


def check_kuberay(document: dict[str, Any]) -> None:
    """Raises ValueError where KubeRay's or Kubernetes' API has no such field, or KubeRay's operator would refuse the object."""
    kind = document.get("kind")
    _require(kind in ("RayJob", "RayCluster"), f"kind {kind}")
    _check_schema(_kuberay_schema(str(kind)), document)
    spec = document["spec"] if kind == "RayCluster" else document["spec"].get("rayClusterSpec", {})
    _require(bool(spec), "no rayClusterSpec")
    name = document["metadata"]["name"]
    _require(re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name) is not None, f"name {name!r} is no DNS label of at most 47")
    if kind == "RayJob":
        job = document["spec"]
        _require(
            job.get("ttlSecondsAfterFinished", 0) == 0 or job.get("shutdownAfterJobFinishes", False), "ttl without shutdown"
        )
        _require("entrypoint" in job, "no entrypoint")
        check_commands(job["entrypoint"])
    _require(spec.get("authOptions", {}).get("mode") == "token", "no authOptions.mode: token")
    _require("rayVersion" in spec, "token mode needs rayVersion")
    _check_requests(spec.get("autoscalerOptions", {}), "autoscaler")
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        where = group.get("groupName", "head")
        params = group.get("rayStartParams", {})
        _require("labels" not in params, f"{where}: labels belong into the group's field")
        _require(
            not (group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params)),
            f"{where}: resources twice",
        )
        _require(group.get("minReplicas", 0) <= group.get("maxReplicas", 0), f"{where}: minReplicas > maxReplicas")
        check_commands("ray start " + " ".join(f"--{option}={value}" for option, value in params.items()))
        pod = group["template"].get("spec", {})
        _require(pod.get("restartPolicy", "Never") == "Never", f"{where}: the autoscaler takes restartPolicy Never only")
        check_kubernetes(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]},
        )
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            _check_requests(container, where)
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            _require(mounts == volumes, f"{where}: mounts {mounts} of volumes {volumes}")


def check_kubernetes(document: dict[str, Any]) -> None:
    """Raises ValueError where the Kubernetes API has no such field, or another type for it."""
    fault = _fault_for_kubernetes(json.dumps(document))
    _require(fault is None, str(fault))
    if document["kind"] == "PersistentVolumeClaim":
        _require("storage" in document["spec"].get("resources", {}).get("requests", {}), "a claim without storage")
        _require("accessModes" in document["spec"] and "storageClassName" in document["spec"], "a claim without mode or class")


@cache
def _fault_for_kubernetes(document: str) -> str | None:
    """Cached, as most of what one test asks another has asked before."""
    try:
        kubernetes_validate.validate(json.loads(document), KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return str(getattr(error, "message", error))
    return None


def check_compose(document: dict[str, Any]) -> None:
    """Raises ValueError where the Compose Specification has no such field, or something is named that is not there."""
    source = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    _check_schema(json.loads(source.read_text()), document)
    for name, service in document["services"].items():
        _require(set(service.get("depends_on", {})) <= set(document["services"]), f"{name} depends on what is not there")
        _require(set(service.get("secrets", [])) <= set(document.get("secrets", {})), f"{name} has a secret that is not there")
        for volume in service.get("volumes", []):
            _require(volume.split(":")[0] in document.get("volumes", {}), f"{name} has a volume that is not there")
        check_commands(shlex.join(service["command"]) if "command" in service else "")
        if "build" in service:
            dockerfile = (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).resolve()
            arguments = set(re.findall(r"^ARG (\w+)", dockerfile.read_text(), re.MULTILINE))
            _require(set(service["build"].get("args", {})) <= arguments, f"{name}: {dockerfile.name} has no such ARG")


def check_runtime_env(document: dict[str, Any]) -> None:
    """Raises ValueError where Ray has no such field of a runtime environment: it would only warn."""
    _require(set(document) <= RuntimeEnv.known_fields, f"unknown: {set(document) - RuntimeEnv.known_fields}")
    _check_shape({"excludes": list}, document, "runtime environment")


def check_script(text: str) -> None:
    """Raises ValueError where bash or shellcheck objects, or a command has no such option."""
    _run(["bash", "-n"], text)
    _run([str(_BIN / "shellcheck"), "--shell=bash", "-"], text)
    check_commands(text)


def check_dockerfile(text: str) -> None:
    """Raises ValueError where hadolint objects, or a file that is copied is not there."""
    _run([str(_BIN / "hadolint"), "--no-color", "-"], text)
    for source in copied(text):
        _require((ROOT / source).exists(), f"COPY {source}: there is none")


def copied(dockerfile: str) -> list[str]:
    """Returns what a Dockerfile copies from its context."""
    return [word for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]]


def check_commands(text: str) -> None:
    """Raises ValueError where a command of Ray's, anywhere in a text, has an option or a subcommand that Ray does not have."""
    for command, words in ray_commands(text):
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        if command.name in ("symmetric-run", "symmetric_run"):
            options |= {option for parameter in ray_cli.commands["start"].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        _require(given <= options | {"--help"}, f"ray {command.name} has no {', '.join(sorted(given - options))}")


def ray_commands(text: str) -> Iterator[tuple[click.Command, list[str]]]:
    """Yields the commands of Ray's in a text, each with its words up to a lone --."""
    for line in _commands(text, r"(?<![\w./-])ray (?=[a-z])"):
        words = line.split()[1:]
        group: Any = job_cli_group if words[0] == "job" else ray_cli
        name = words[1] if words[0] == "job" else words[0]
        if name not in group.commands:
            raise ValueError(f"ray has no command {name!r}: {line}")
        yield group.commands[name], words[: words.index("--")] if "--" in words else words


def qfleet_commands(text: str) -> list[list[str]]:
    """Returns the words of each command of ours in a text, after `qfleet`."""
    lines = _commands(text, r"(?<![\w./-])(?:(?:\.venv/bin/)?qfleet|python -m deploy) (?=[a-z][a-z-]* )")
    return [shlex.split(re.sub(r"^(\S*qfleet|python -m deploy) ", "", line)) for line in lines]


def _commands(text: str, start: str) -> list[str]:
    """Returns what begins so and goes on to the end of its shell command. In Markdown, only code counts."""
    if "```" in text:
        text = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    text = re.sub(r"\\\n\s*", " ", text).replace('\\"', "").replace("\\$", "$")
    text = re.sub(r"^(?!# {3})\s*#.*$", "", text, flags=re.MULTILINE)  # Comments, but for commands in them.
    return [match.group().strip() for match in re.finditer(start + r"[^\n'\"`;|&#]*", _unquoted(text))]


def _unquoted(text: str) -> str:
    """Takes the quotes off single words: --address "$HEAD_IP:6379", --labels="role=$role"."""
    return re.sub(r"(?<=[ =])\"([^\" ]*)\"(?=[ \n]|$)", r"\1", text)


def _check_requests(holder: dict[str, Any], where: str) -> None:
    given = holder.get("resources", {})
    _require("limits" in given and given.get("requests") == given["limits"], f"{where}: requests are not its limits")
    _require(
        {"cpu", "memory"} <= set(given["limits"]) <= {"cpu", "memory", "nvidia.com/gpu"}, f"{where}: {set(given['limits'])}"
    )


def _check_shape(shape: Any, value: Any, where: str) -> None:
    """Checks names and types of what has no published schema."""
    if isinstance(shape, dict):
        _require(isinstance(value, dict) and set(value) <= set(shape), f"{where}: unknown field in {value}")
        for name, inner in value.items():
            _check_shape(shape[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        for inner in value:
            _check_shape(shape[0], inner, where)
    else:
        _require(isinstance(value, shape), f"{where}: {value!r}")


@cache
def _kuberay_schema(kind: str) -> dict[str, Any]:
    fields = yaml.safe_load(_FIELDS.read_text())
    scalars = {"string", "integer", "number", "boolean"}

    def of(name: str) -> dict[str, Any]:
        name = name.removeprefix("!")
        if name in fields:
            return {
                "type": "object",
                "additionalProperties": False,
                "required": [field for field, kind_of in fields[name].items() if kind_of.startswith("!")],
                "properties": {field: of(kind_of) for field, kind_of in fields[name].items()},
            }
        if name.startswith("["):
            return {"type": "array", "items": of(name.strip("[]"))}
        if name == "strings":
            return {"type": "object", "additionalProperties": {"type": "string"}}
        if name.startswith("="):
            return {"const": name.removeprefix("=")}
        return {} if name == "any" else {"type": name} if name in scalars else {"enum": name.split("|")}

    return of(kind)


def _check_schema(schema: dict[str, Any], document: Any) -> None:
    validator = jsonschema.validators.validator_for(schema)(schema)
    for error in validator.iter_errors(copy.deepcopy(document)):
        raise ValueError(f"{error.json_path}: {error.message[:300]}")


def _run(command: list[str], text: str) -> None:
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise ValueError((result.stdout + result.stderr).strip())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


YAML_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "launcher-aws.yaml": check_launcher,
    "kuberay-cluster.yaml": check_kuberay,
    "kuberay-job.yaml": check_kuberay,
    "kuberay-runs.yaml": check_kubernetes,
    "runtime-env.yaml": check_runtime_env,
    "compose.yaml": check_compose,
    "compose.gpu.yaml": check_compose,
}
TEXT_CHECKS: dict[str, Callable[[str], None]] = {"Dockerfile": check_dockerfile, "slurm.sh": check_script}
