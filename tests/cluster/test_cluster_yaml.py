"""Validate cluster.yaml and the manifests with the schemas of Ray, EC2 and KubeRay, without network or cluster."""

import copy
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "platform" / "deploy"
CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
NODE_TYPES = CONFIG["available_node_types"]

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def run_instances() -> botocore.model.Shape:
    """Return the input schema of EC2's RunInstances."""
    model = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    return botocore.model.ServiceModel(model, "ec2").operation_model("RunInstances").input_shape


def faults(value: Any, shape: botocore.model.Shape) -> list[str]:
    """List what EC2 would refuse, including invalid enum values, which botocore does not check."""
    report = botocore.validate.ParamValidator().validate(value, shape)
    return [*([report.generate_report()] if report.has_errors() else []), *invalid_enum_values(value, shape)]


def invalid_enum_values(value: Any, shape: botocore.model.Shape) -> Iterator[str]:
    if shape.type_name == "structure" and isinstance(value, dict):
        for name, member in shape.members.items():
            if name in value:
                yield from invalid_enum_values(value[name], member)
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from invalid_enum_values(item, shape.member)
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{value!r} is not a valid {shape.name}"


def instance(node_type: str) -> dict[str, Any]:
    return {"MinCount": 1, "MaxCount": 1, **copy.deepcopy(NODE_TYPES[node_type]["node_config"])}


def commands() -> list[str]:
    return [*CONFIG["head_start_ray_commands"], *CONFIG["worker_start_ray_commands"]]


def environment() -> dict[str, str]:
    options = [shlex.split(option) for option in CONFIG["docker"]["run_options"]]
    return dict(option[1].split("=", 1) for option in options if option[0] == "--env")


def test_ray_accepts_the_file() -> None:
    validate_config(prepare_config(copy.deepcopy(CONFIG)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(idle_timeout="10"),
        lambda c: c.update(max_workers="16"),
        lambda c: c["docker"].update(run_option=[]),
        lambda c: c["auth"].update(ssh_key="x"),
        lambda c: c["available_node_types"]["gpu_spot"].update(max=8),
        lambda c: c["available_node_types"]["gpu_spot"].pop("resources"),
        lambda c: c.update(head_node_type="heads"),
        lambda c: c.update(max_workers=0, available_node_types=with_min_workers(1)),
    ],
)
def test_ray_refuses_a_file_with_a_mistake(change: Change) -> None:
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))


def with_min_workers(count: int) -> dict[str, Any]:
    types = copy.deepcopy(NODE_TYPES)
    types["cpu_worker"]["min_workers"] = count
    return types


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_ec2_accepts_every_node(node_type: str, run_instances: botocore.model.Shape) -> None:
    assert faults(instance(node_type), run_instances) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(Instancetype="g5.2xlarge"),
        lambda c: c.update(InstanceType="g5.3xlarge"),
        lambda c: c.update(IamInstanceProfile="raydetr"),
        lambda c: c.update(SecurityGroupIds="sg-1"),
        lambda c: c["InstanceMarketOptions"].update(MarketType="spots"),
        lambda c: c["InstanceMarketOptions"].update(MaxPrice="1"),
        lambda c: c["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="200"),
        lambda c: c["MetadataOptions"].update(HttpTokens="yes"),
    ],
)
def test_ec2_refuses_a_node_with_a_mistake(change: Change, run_instances: botocore.model.Shape) -> None:
    config = instance("gpu_spot")
    change(config)
    assert faults(config, run_instances)


def test_the_head_has_no_cpus_and_spot_nodes_equal_on_demand_nodes() -> None:
    assert NODE_TYPES[CONFIG["head_node_type"]]["resources"] == {"CPU": 0}
    spot, on_demand = NODE_TYPES["gpu_spot"], NODE_TYPES["gpu_on_demand"]
    market = spot["node_config"].pop("InstanceMarketOptions")
    try:
        assert market == {"MarketType": "spot"}
        assert spot == on_demand
    finally:
        spot["node_config"]["InstanceMarketOptions"] = market


def test_the_autoscaler_has_limits() -> None:
    assert CONFIG["idle_timeout_minutes"] > 0
    for name, node_type in NODE_TYPES.items():
        if name != CONFIG["head_node_type"]:
            assert node_type["min_workers"] == 0 < node_type["max_workers"] <= CONFIG["max_workers"]


def test_no_port_is_open_to_the_world() -> None:
    # Ray opens SSH to the world in every security group that it creates, so it must not create one.
    assert all(node_type["node_config"].get("SecurityGroupIds") for node_type in NODE_TYPES.values())
    assert "security_group" not in CONFIG["provider"]
    assert CONFIG["provider"]["use_internal_ips"] is True
    (head,) = [command for command in CONFIG["head_start_ray_commands"] if "ray start --head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert not any("0.0.0.0" in command for command in commands())
    for document in manifests():
        for service in (document["spec"].get("type"), *find(document, "serviceType")):
            assert service in (None, "ClusterIP")
        assert not any(find(document, "hostPort"))


def test_a_token_is_required_everywhere() -> None:
    assert environment()["RAY_AUTH_MODE"] == "token"
    assert CONFIG["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert [job["rayClusterSpec"]["authOptions"] for job in rayjobs()] == [{"mode": "token"}] * 2


def test_no_credentials_are_stored_in_files() -> None:
    text = (ROOT / "cluster.yaml").read_text() + "".join(file.read_text() for file in DEPLOY.glob("*.*"))
    assert all(node_type["node_config"]["IamInstanceProfile"] for node_type in NODE_TYPES.values())
    assert not any(word in text for word in ("AWS_ACCESS_KEY", "AWS_SECRET", "RAY_AUTH_TOKEN="))


def test_storage_and_tracking_are_shared_on_every_node() -> None:
    assert environment()["RAYDETR_STORAGE"].startswith("s3://")
    starts = [command for command in commands() if "ray start" in command]
    assert len(starts) == 2
    for start in starts:
        assert "MLFLOW_TRACKING_URI=" in start
        assert "PYTHONPATH=.:platform ray start" in start


def manifests() -> Iterator[dict[str, Any]]:
    """Yield the Kubernetes documents; serve.yaml is for `serve deploy`."""
    for file in sorted(DEPLOY.glob("*.yaml")):
        if file.name != "serve.yaml":
            yield from yaml.safe_load_all(file.read_text())


def rayjobs() -> list[dict[str, Any]]:
    """Return the job specs of the training and of the scheduled evaluation."""
    kinds = {document["kind"]: document["spec"] for document in manifests()}
    return [kinds["RayJob"], kinds["RayCronJob"]["jobTemplate"]]


def find(value: Any, name: str) -> Iterator[Any]:
    """Yield the values of a key at any depth."""
    if isinstance(value, dict):
        if name in value:
            yield value[name]
        for item in value.values():
            yield from find(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from find(item, name)


def test_the_jobs_declare_their_kubernetes_api() -> None:
    ours = [each for each in manifests() if each["kind"].startswith("Ray")]
    assert {document["apiVersion"] for document in ours} == {"ray.io/v1"}
    (cron,) = [document for document in ours if document["kind"] == "RayCronJob"]
    assert len(cron["spec"]["schedule"].split()) == 5


@pytest.mark.parametrize("number", [0, 1], ids=["train", "evaluate"])
def test_the_rayjobs_have_what_kuberay_requires(number: int) -> None:
    cluster = rayjobs()[number]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"]
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert isinstance(group["rayStartParams"], dict)
    for pod in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = pod["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["PYTHONPATH"] == ".:platform"
        assert environment["RAYDETR_STORAGE"].startswith("s3://")
        assert json.dumps(environment)  # Kubernetes requires strings
        assert all(isinstance(value, str) for value in environment.values())


def test_the_entrypoints_exist() -> None:
    known = (ROOT / "docs" / "interfaces.md").read_text()
    for job in rayjobs():
        python, script, *flags = shlex.split(job["entrypoint"])
        assert python == "python"
        assert (ROOT / script).is_file()
        assert script.startswith("pipelines/")
        assert all(flag in known for flag in flags if flag.startswith("--"))
    for command in (c for document in manifests() for c in find(document, "command")):
        assert (ROOT / command[1]).is_file()
    for command in commands():
        for word in command.split():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word


def test_the_image_copies_files_that_exist() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    version = next(line for line in lines if line.startswith("FROM ")).split(":")[1].split("-")[0]
    assert version == "3.11"
