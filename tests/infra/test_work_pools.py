"""Templates of work pools: whole by Prefect's own rules, and what they make is what Docker and Kubernetes take."""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from docker.types import HostConfig
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration

from flows.settings import FactorySettings
from tests.flows.conftest import ROOT

FOLDER = ROOT / "infra" / "work-pools"
KINDS = sorted(path.stem for path in FOLDER.glob("*.json"))
SCHEMA = "1.34"  # of Kubernetes
_PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")

Template = dict[str, Any]  # JSON that Prefect reads


def template(kind: str) -> Template:
    """A template as it is on disk."""
    read: Template = json.loads((FOLDER / f"{kind}.json").read_text())
    return read


def made(kind: str, **chosen: object) -> Template:
    """What Prefect makes of a template's defaults and of what a deployment chooses."""
    variables = template(kind)["variables"]
    values = {name: one["default"] for name, one in variables["properties"].items() if "default" in one} | chosen
    jsonschema.validate(values, variables)
    filled: Template = apply_values(template(kind)["job_configuration"], {"name": "run", "labels": {}} | values)
    return filled


def manifest(**chosen: object) -> Template:
    """The job that Kubernetes is given, but for two fields that Prefect's worker wants in a wrong place."""
    job: Template = deepcopy(made("kubernetes", **chosen)["job_manifest"])
    spec = job["spec"]["template"]["spec"]
    assert (spec.pop("parallelism"), spec.pop("completions")) == (1, 1)
    container = spec["containers"][0]
    container["args"] = container["args"].split()  # as the worker does, with the two below
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    return job


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_one_by_prefects_rules(kind: str) -> None:
    """Its variables are a JSON schema, every placeholder is a variable, and no variable is without use."""
    whole = template(kind)
    jsonschema.Draft202012Validator.check_schema(whole["variables"])
    WorkPoolCreate(name="gpu", type=kind, base_job_template=whole)

    named = set(_PLACEHOLDER.findall(json.dumps(whole["job_configuration"])))

    assert named == set(whole["variables"]["properties"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_deployment_may_choose_is_checked(kind: str) -> None:
    """A wrong type is refused by the schema that Prefect asks."""
    for wrong in ({"env": "LORA_HOME=/x"}, {"command": 7}, {"stream_output": "yes"}):
        with pytest.raises(jsonschema.ValidationError):
            made(kind, **wrong)


def test_a_process_is_what_prefects_worker_takes() -> None:
    """The engine itself is run, so that nobody stands between it and a signal."""
    configuration = ProcessJobConfiguration(**made("process", env={"LORA_DEVICE": "cuda:1"}))

    assert configuration.command == "python -m prefect.engine"
    assert configuration.env["LORA_DEVICE"] == "cuda:1"


def test_a_job_is_valid_by_kubernetes_own_schema() -> None:
    """With the defaults, and without a GPU, on chosen nodes."""
    kubernetes_validate.validate(manifest(), SCHEMA, strict=True)
    kubernetes_validate.validate(manifest(gpus=0, node_selector={"gpu": "h100"}, tolerations=[]), SCHEMA, strict=True)

    wrong = manifest(tolerations=[{"key": "spot", "operator": "Perhaps", "seconds": "many"}])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, SCHEMA, strict=True)


def test_a_pod_has_its_gpu_gives_way_and_has_time_to_go() -> None:
    """The grace that the flow plans with ends before Kubernetes' does."""
    spec = manifest()["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    settings = {one["name"]: one["value"] for one in container["env"]}
    spot = {one["key"] for one in spec["tolerations"]}

    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert FactorySettings.read(grace=settings["LORA_GRACE"]).grace + 30 <= spec["terminationGracePeriodSeconds"]
    assert settings["LORA_SAVE_TO"] == "store"
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= spot
    assert spec["securityContext"]["runAsNonRoot"]


def test_a_container_has_one_gpu_by_dockers_own_types() -> None:
    """They refuse a request that is not in Docker's words."""
    given: Mapping[str, Any] = made("docker", gpus=["1"])["container_create_kwargs"]
    taken = {name: given[name] for name in ("device_requests", "init", "cap_drop", "security_opt", "shm_size")}

    host = HostConfig(version="1.44", **taken)

    assert host["DeviceRequests"][0]["DeviceIDs"] == ["1"]
    with pytest.raises(jsonschema.ValidationError):
        made("docker", gpus=["0", "1"])


def test_the_workers_image_has_the_compiler_that_kernels_of_a_gpu_ask_for() -> None:
    """Triton compiles what calls them when the first user takes a step; a slim image of Python's has no compiler."""
    worker = (ROOT / "infra" / "Dockerfile").read_text().partition(" AS worker\n")[2]

    assert "apt-get install --yes --no-install-recommends g++" in worker


def test_deployments_name_pools_that_are_made() -> None:
    """By the compose file, from these templates."""
    deployments = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    deploy = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["deploy"]["command"][-1]

    for deployment in deployments:
        assert f"work-pool create {deployment['work_pool']['name']} " in deploy
    for path in re.findall(r"\S+\.json", deploy):
        assert (ROOT / path).is_file()
