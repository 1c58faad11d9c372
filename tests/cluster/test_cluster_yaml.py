"""The AWS cluster file, as far as it can be proved without AWS: Ray's own schema, and launches against a pretended EC2.

Ray checks nothing under `node_config`, so the launches matter: boto3 refuses a key that it does not know.
"""

import copy
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines import cli
from pipelines.jobs import TrainJob

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster" / "ray_cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


@pytest.fixture
def node_types(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"]


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An AWS account of this process alone, in which the roles have been made as cluster/README.md says."""
    with pytest.MonkeyPatch.context() as environment, mock_aws():
        environment.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes the key pair into ~/.ssh
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.delenv("AWS_ENDPOINT_URL", raising=False)
        boto3.client("cloudformation").create_stack(
            StackName="msclip",
            TemplateBody=(ROOT / "cluster" / "aws_roles.yaml").read_text(),
            Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "shards"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        yield


@pytest.fixture(scope="module")
def ready(account: None) -> dict[str, Any]:
    """The cluster file as `ray up` completes it before it launches the head."""
    config = check(yaml.safe_load(CLUSTER.read_text()))
    return AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(config))


@pytest.fixture(scope="module")
def provider(ready: dict[str, Any]) -> AWSNodeProvider:
    return AWSNodeProvider(ready["provider"], ready["cluster_name"])


def check(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_cluster_file(config: dict[str, Any]) -> None:
    assert check(config)["head_node_type"] == "head"


def test_the_file_at_the_top_is_a_link_to_it() -> None:
    link = ROOT / "ray_cluster.yaml"
    assert link.is_symlink()
    assert link.resolve() == CLUSTER.resolve()


@pytest.mark.parametrize("place", [(), ("available_node_types", "gpu_train")])
def test_a_misspelt_key_is_refused(config: dict[str, Any], place: tuple[str, ...]) -> None:
    inner = config
    for key in place:
        inner = inner[key]
    inner["max_worker"] = inner.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        check(config)


def test_the_head_runs_no_tasks_and_the_workers_can_go(node_types: dict[str, Any]) -> None:
    assert node_types["head"]["resources"] == {"CPU": 0}
    assert {name: node["min_workers"] for name, node in node_types.items() if name != "head"} == {
        "gpu_train": 0,
        "cpu_decode": 0,
    }


def test_the_limit_of_nodes_is_the_sum_over_the_types(config: dict[str, Any], node_types: dict[str, Any]) -> None:
    assert config["max_workers"] == sum(node.get("max_workers", 0) for node in node_types.values())


@pytest.mark.parametrize("name", cli.shipped_configs())
def test_the_gpu_nodes_hold_each_shipped_training_job(node_types: dict[str, Any], name: str) -> None:
    cluster = cli.parse(TrainJob, ["--config", name]).cluster
    node = node_types["gpu_train"]
    workers_a_node = min(node["resources"]["GPU"], node["resources"]["CPU"] // max(1, cluster.cpus_per_worker))
    assert cluster.num_workers <= node["max_workers"] * workers_a_node


def test_every_command_that_starts_ray_names_the_authentication(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_what_is_mounted_is_all_that_installing_needs(config: dict[str, Any]) -> None:
    mounted = {local for remote, local in config["file_mounts"].items() if remote.startswith("~/msclip/")}
    assert {"msclip", "pipelines", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= mounted
    assert all((ROOT / path).exists() for path in mounted)
    script = ROOT / "cluster" / "setup_node.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)


def test_declared_resources_are_those_of_the_instance_types(
    config: dict[str, Any], node_types: dict[str, Any], account: None
) -> None:
    undeclared = copy.deepcopy(config)
    for node in undeclared["available_node_types"].values():
        node["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(check(undeclared))["available_node_types"]
    for name in ("gpu_train", "cpu_decode"):
        known = found[name]["resources"]
        assert node_types[name]["resources"] == {key: known[key] for key in ("CPU", "GPU") if key in known}


def test_each_kind_of_node_launches_with_its_own_role(ready: dict[str, Any], provider: AWSNodeProvider) -> None:
    for name, node in ready["available_node_types"].items():
        provider.create_node(node["node_config"], {"ray-node-type": name}, 1)

    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    instances = [instance for reservation in reservations for instance in reservation["Instances"]]
    roles = {i["InstanceType"]: i["IamInstanceProfile"]["Arn"].rpartition("/")[2] for i in instances}
    assert roles == {"m5.xlarge": "msclip-head", "g5.12xlarge": "msclip-worker", "m5.4xlarge": "msclip-worker"}
    assert [i["InstanceType"] for i in instances if i.get("InstanceLifecycle") == "spot"] == ["m5.4xlarge"]
    assert {i["Placement"]["AvailabilityZone"] for i in instances} == {"us-east-1a"}


def test_a_misspelt_key_of_a_node_is_refused_at_launch(ready: dict[str, Any], provider: AWSNodeProvider) -> None:
    node = copy.deepcopy(ready["available_node_types"]["cpu_decode"]["node_config"])
    node["InstanceMarketOption"] = node.pop("InstanceMarketOptions")
    with pytest.raises(ParamValidationError, match="InstanceMarketOption"):
        provider.create_node(node, {}, 1)
