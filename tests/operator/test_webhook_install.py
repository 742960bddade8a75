"""The files that install the webhook: kustomize and the chart give the same, and the names in them are those of the code."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from helm_python.chart import lint
from typer.testing import CliRunner

from kvkern.cli.kubernetes import operator
from kvkern.operator.webhook.registration import Place, registration
from tests.operator.test_install_files import CHART, charted, kustomized, of_kind

PLACE = Place("kvkern-operator-webhook", "kvkern-system")


def both() -> list[list[dict[str, Any]]]:
    values = {"webhook": {"enabled": True, "engineImage": "vllm-kvkern:0.1.0"}}
    report = lint(CHART, values, strict=True)
    assert not report["errors"], report
    return [kustomized("overlays/webhook"), charted(values)]


def test_both_ways_install_the_same_webhook() -> None:
    found = both()
    for objects in found:
        for each in objects:
            for version in ("1.27", "1.37"):
                kubernetes_validate.validate(each, version, strict=True)
        (service,) = of_kind(objects, "Service")
        assert (service["metadata"]["name"], service["metadata"]["namespace"]) == (PLACE.service, PLACE.namespace)
        (operator,) = of_kind(objects, "Deployment")
        template = operator["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        names = [name for role in of_kind(objects, "ClusterRole") for rule in role["rules"]
                 for name in rule.get("resourceNames", ())]  # fmt: skip
        assert names == [PLACE.registration]
    one, two = found
    for kind in ("ClusterRole", "Role"):
        assert [each["rules"] for each in of_kind(one, kind)] == [each["rules"] for each in of_kind(two, kind)]
    containers = [of_kind(each, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0] for each in found]
    for name in ("ports", "readinessProbe"):
        assert containers[0][name] == containers[1][name]
    variables = [{each["name"]: each.get("value") for each in container["env"]} for container in containers]
    for name in ("KVKERN_OPERATOR_WEBHOOK", "KVKERN_OPERATOR_ENGINE_IMAGE"):
        assert variables[0][name] == variables[1][name]


@pytest.mark.parametrize("files", ["base", "chart"])
def test_without_it_there_are_none_of_its_rights(files: str) -> None:
    objects = kustomized("base") if files == "base" else charted({})
    rules = [rule for kind in ("ClusterRole", "Role") for role in of_kind(objects, kind) for rule in role["rules"]]
    assert not any("secrets" in rule["resources"] or "admissionregistration" in str(rule) for rule in rules)
    assert not of_kind(objects, "Service")


@pytest.mark.parametrize("namespaces", [(), ("models", "more")])
def test_the_registration_fits_the_schemas(namespaces: tuple[str, ...]) -> None:
    found = registration(Place("hook", "system", namespaces), b"CA")
    for version in ("1.27", "1.37"):
        kubernetes_validate.validate(found, version, strict=True)
    (hook,) = found["webhooks"]
    assert (hook["failurePolicy"], hook["sideEffects"], hook["timeoutSeconds"]) == ("Ignore", "None", 5)
    assert len(hook["namespaceSelector"]["matchExpressions"]) == 1 + bool(namespaces)
    assert hook["clientConfig"]["caBundle"] == "Q0E="


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--webhook", "nine"], "webhook is 'nine'; expected an IP address and a port"),
        (["--webhook", ":9443"], "give --webhook-namespace"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    done = CliRunner().invoke(operator, ["run", *options])
    assert done.exit_code == 2
    assert message in done.output
