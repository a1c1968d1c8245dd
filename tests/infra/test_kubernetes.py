"""The manifests are what Kubernetes takes, agree with the compose file, and ask for no right that they do not need."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from registry.settings import RegistrySettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kubernetes"
SCHEMA = "1.34"  # the release of Kubernetes whose schema they are held to
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

Manifest = dict[str, Any]  # of a kind that Kubernetes knows


def manifests(*files: str) -> list[Manifest]:
    """The documents of some files, or of all that are applied."""
    names = files or KUSTOMIZATION["resources"]
    return [one for name in names for one in yaml.safe_load_all((FOLDER / name).read_text())]


def name_of(manifest: Manifest) -> str:
    """How a person would ask kubectl for it."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}".lower()


PODS = {name_of(one): one["spec"]["template"]["spec"] for one in manifests() if "template" in one.get("spec", {})}


@pytest.mark.parametrize("manifest", manifests() + manifests("secrets.example.yaml"), ids=name_of)
def test_a_manifest_is_valid(manifest: Manifest) -> None:
    """By Kubernetes' own schema, with no field that it does not know."""
    kubernetes_validate.validate(manifest, SCHEMA, strict=True)


def test_the_schema_refuses_what_is_misspelt() -> None:
    """So the test above can fail."""
    wrong = manifests("worker.yaml")[0] | {"specs": {}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, SCHEMA, strict=True)


def test_every_file_is_applied() -> None:
    """But for the picture of the secrets."""
    there = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml", "secrets.example.yaml"}

    assert set(KUSTOMIZATION["resources"]) == there


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_runs_what_compose_runs(pod: str) -> None:
    """One truth: who changes a command there changes it here."""
    name = pod.partition("/")[2]

    assert PODS[pod]["containers"][0]["command"] == SERVICES[name]["command"]


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_has_no_right_that_it_does_not_need(pod: str) -> None:
    """What the namespace's pod security `restricted` asks, and no token of the cluster's."""
    spec, container = PODS[pod], PODS[pod]["containers"][0]

    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


def test_prefects_page_is_unpacked_where_its_server_may_write() -> None:
    """Else the server has its API alone: it unpacks the page beside its own code, which is root's and read-only."""
    container = PODS["deployment/prefect"]["containers"][0]
    given = {one["name"]: one.get("value") for one in container["env"]}
    compose, image = SERVICES["prefect"]["environment"], (ROOT / "infra" / "Dockerfile").read_text()

    assert given["PREFECT_UI_STATIC_DIRECTORY"] == compose["PREFECT_UI_STATIC_DIRECTORY"]
    home = str(Path(given["PREFECT_UI_STATIC_DIRECTORY"]).parent)
    assert home in [one["mountPath"] for one in container["volumeMounts"]]
    assert f"--home-dir {home} " in image


def test_only_the_setup_job_knows_the_tables_owner() -> None:
    """A worker with the owner's URL could lift row-level security."""
    assert [pod for pod, spec in PODS.items() if "lora-owner" in yaml.safe_dump(spec)] == ["job/setup"]


def test_settings_say_what_compose_says() -> None:
    """No setting of the compose file is forgotten; what is secret is no setting."""
    settings = manifests("settings.yaml")[0]["data"]
    elsewhere = {"LORA_DATABASE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "HF_TOKEN"}
    optional = {"LORA_COMPILE", "LORA_CUDA_GRAPH"}

    assert set(SERVICES["worker"]["environment"]) - elsewhere - optional <= set(settings)
    assert settings["LORA_SECRETS"] == "/run/secrets/lora"
    for name in ("LORA_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_CLIENT_RETRY_EXTRA_CODES"):
        assert settings[name] == SERVICES["worker"]["environment"][name]


def test_a_gated_base_can_be_fetched_in_compose_and_in_the_cluster() -> None:
    """The operations page names one: the hub's token comes from the .env file, or from the secret."""
    path = Path(manifests("settings.yaml")[0]["data"]["HF_TOKEN_PATH"])
    mounts = [one["mountPath"] for one in PODS["deployment/worker"]["containers"][0]["volumeMounts"]]

    assert SERVICES["worker"]["environment"]["HF_TOKEN"] == "${HF_TOKEN:-}"
    assert str(path.parent) in mounts
    assert path.name in manifests("secrets.example.yaml")[0]["stringData"]


def test_new_workers_do_not_wait_for_gpus_that_the_old_ones_hold() -> None:
    """Kubernetes begins with a pod more by default, which stays pending for ever where every GPU has its worker."""
    (worker,) = (one for one in manifests("worker.yaml") if one["kind"] == "Deployment")

    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_full_cache_leaves_a_workers_home_room_for_bases_and_saves() -> None:
    """Kubernetes throws a pod out whose volume outgrows its limit; a worker keeps every live version that it saw."""
    (home,) = (one["emptyDir"] for one in PODS["deployment/worker"]["volumes"] if one["name"] == "home")
    cache = RegistrySettings.read(cache_size=manifests("settings.yaml")[0]["data"]["LORA_CACHE_SIZE"]).cache_size

    assert 0 < cache <= TypeAdapter(ByteSize).validate_python(f"{home['sizeLimit']}B") / 2


def test_a_secret_of_the_example_is_a_setting() -> None:
    """A file of another name would be read by nobody."""
    secrets, owner = (one["stringData"] for one in manifests("secrets.example.yaml"))
    from flows.settings import FactorySettings

    ours = {name for name in (*secrets, *owner) if name.startswith("lora_")}
    assert ours == {"lora_database_url", "lora_database_owner_url"}
    assert {name.removeprefix("lora_") for name in ours} <= set(FactorySettings.model_fields)


@pytest.mark.parametrize(("number", "name"), [(0, "metrics"), (1, "clock")])
def test_prometheus_asks_where_the_exporters_listen(number: int, name: str) -> None:
    """By the name and port that the service has in compose and in the cluster."""
    scraped = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    service = next(one for one in manifests(f"{name}.yaml") if one["kind"] == "Service")
    policy = next(one for one in manifests("network.yaml") if one["metadata"]["name"] == "metrics")

    port = service["spec"]["ports"][0]["port"]
    assert service["metadata"]["name"] == name
    assert scraped[number]["static_configs"] == [{"targets": [f"{name}:{port}"]}]
    assert name in policy["spec"]["podSelector"]["matchExpressions"][0]["values"]
    assert {"port": port, "protocol": "TCP"} in policy["spec"]["ingress"][0]["ports"]
    assert SERVICES[name]["command"][-1] == str(port)
    for probe in ("livenessProbe", "readinessProbe"):
        assert PODS[f"deployment/{name}"]["containers"][0][probe]["httpGet"]["path"] in ("/healthz", "/readyz")
