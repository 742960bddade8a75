"""KVCaches that cannot be, as users and attackers write them: each is refused by a sentence that names the field, or said to
have no effect. `render` answers them without a cluster, and without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from kvkern.errors import ConfigError
from kvkern.operator.forms import read_kvcache
from kvkern.operator.yaml_files import read_manifests, to_yaml


def own(spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "kvkern.io/v1alpha1", "kind": "KVCache", "metadata": {"name": "c"} | metadata, "spec": spec}


def published(spec: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return own(spec, **metadata) | {"apiVersion": "orchestration.aibrix.ai/v1alpha1"}


def env(*entries: Any) -> dict[str, Any]:
    return own({"env": list(entries)})


SECRET = {"secretKeyRef": {"name": "s", "key": "k"}}
REFUSED = [
    (own({}, namespace="../../../etc"), "metadata.namespace"),
    (own({}, namespace="a" * 64), "metadata.namespace"),
    (own({}, name="a" * 47), "metadata.name"),
    (env({"name": "A=B", "value": "x"}), "spec.env[0]"),
    (env({"name": "A", "value": 750}), "put it in quotes"),
    (env({"name": "A", "value": True}), "put it in quotes"),
    (env({"name": "A", "value": "x", "valueFrom": SECRET}), "spec.env[0]"),
    (env({"name": "A", "valueFrom": "a"}), "spec.env[0]"),
    (env({"name": "A", "vlaue": "a"}), "'vlaue'"),
    (env({"name": "KVKERN_DRAIN", "value": "abc"}), "drain"),
    (own({"memory": "4Gi\n"}), "spec.memory"),
    (own({"cpu": "\u0662"}), "spec.cpu"),
    (own({"workload": {"name": "a b"}}), "spec.workload.name"),
    (own({"workload": {"name": "a", "labelKey": "a b"}}), "spec.workload.labelKey"),
    (own({"podLabels": {"bad key!": "x"}}), "spec.podLabels"),
    (own({"podLabels": {"a": None}}), "spec.podLabels.a"),
    (own({"nodeSelector": {"a": "b c"}}), "spec.nodeSelector.a"),
    (own({"tolerations": [1]}), "spec.tolerations[0]"),
    (own({"imagePullSecrets": ["abc"]}), "spec.imagePullSecrets[0]"),
    (own({"remote": {"urlSecretRef": {"key": "k"}}}), "spec.remote.urlSecretRef.name"),
    (own({"remote": {"redis": {"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}}}}), "above the limit"),
    (own({"remote": {"redis": {"resources": {"limits": {"foo": "1"}}}}}), "resources.limits"),
    (published({"service": {"ports": [{"name": "A_B", "port": 1}]}}), "spec.service.ports[0].name"),
    (published({"service": {"ports": [{"name": "a", "port": 1}, {"name": "b", "port": 1}]}}), "the same port twice"),
    (published({"metadata": {"redis": {"externalConnection": {"address": "r:99999"}}}}), "address"),
    (
        published({"metadata": {"redis": {"externalConnection": {"address": "r:1", "passwordSecretRef": "A B/c/d"}}}}),
        "passwordSecretRef",
    ),
    (published({"cache": {"template": {"metadata": {"labels": {"a": "b c"}}}}}), "labels.a"),
]
WITHOUT_EFFECT = [
    (own({}) | {"sepc": {}}, "sepc"),
    (own({"podLabels": {"model.aibrix.ai/name": "coder"}}), "spec.podLabels.model.aibrix.ai/name"),
    (own({"podLabels": {"app.kubernetes.io/name": "mine"}}), "spec.podLabels.app.kubernetes.io/name"),
    (env({"name": "A", "value": "1"}, {"name": "A", "value": "2"}), "spec.env[0]"),
    (
        own({"workload": {"name": "a"}}, annotations={"kvcache.orchestration.aibrix.ai/pod-affinity-workload": "b"}),
        "metadata.annotations.kvcache.orchestration.aibrix.ai/pod-affinity-workload",
    ),
    (own({"remote": {"redis": {"storage": {"size": "5Gi"}}}}), "spec.remote.redis.storage.size"),
    (published({"metadata": {"etcd": {"env": [{"name": "DATA_DIR", "value": "/x"}]}}}), "spec.metadata.etcd.env[0]"),
    (published({"cache": {"resources": {"limits": {"x/rdma": "1"}}}}), "spec.cache.resources.limits.x/rdma"),
    (
        published({"metadata": {"etcd": {"externalConnection": {"address": "e:2379"}, "runtime": {"replicas": 3}}}}),
        "spec.metadata.etcd.runtime",
    ),
]


@pytest.mark.parametrize(("manifest", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_kubernetes_would_refuse_is_refused(manifest: dict[str, Any], words: str) -> None:
    errors = [str(each) for each in read_kvcache(manifest).errors]
    assert any(words in each for each in errors), errors


@pytest.mark.parametrize(
    ("manifest", "field"), WITHOUT_EFFECT, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_has_no_effect_is_said(manifest: dict[str, Any], field: str) -> None:
    cache = read_kvcache(manifest)
    assert not cache.errors
    assert field in [each.field for each in cache.notes]


def test_a_form_of_later_versions_without_cache() -> None:
    """There `cache` has a default, and an external Redis is one."""
    cache = read_kvcache(
        published({
            "metadata": {"redis": {"externalConnection": {"address": "mine:6379"}}},
            "service": {"ports": [{"name": "service", "port": 9600}]},
        })
    )  # fmt: skip
    assert (cache.form, cache.errors, cache.notes, cache.redis) == ("runtime", (), (), None)
    assert cache.external_redis is not None


@pytest.mark.parametrize("text", [
    "a: &x {b: *x}", "kind: KVCache\nspec: &x {tolerations: [*x]}", "kind: List\nitems: &x [{kind: List, items: *x}]",
    "kind: KVCache\nkind: KVCache", "{", "[" * 20000, "kind: KVCache\nspec: " + "9" * 5000, "- 1", "\x00",
])  # fmt: skip
def test_odd_files(text: str) -> None:
    command = [sys.executable, "-m", "kvkern", "operator", "render", "-f", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("kvkern: ")


def test_one_file_names_a_kvcache_once() -> None:
    command = [sys.executable, "-m", "kvkern", "operator", "render", "-f", "-"]
    text = to_yaml([own({}), published({})])
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "two KVCaches default/c" in done.stderr


def test_an_empty_choice_is_the_default() -> None:
    assert read_kvcache(own({"arena": "", "service": {"type": ""}})) == read_kvcache(own({}))


def test_odd_texts_are_quoted(tmp_path: Any) -> None:
    """A text of letters and spaces is not."""
    texts = [
        "08",
        "7e5",
        "n",
        "Y",
        "8E_1",
        "12:30",
        "2024-01-01",
        "~",
        "",
        "0x10",
        ".5",
        "-",
        "null",
        "a: b",
        "two words",
        "64Gi",
    ]
    written = to_yaml([{"kind": "X", "texts": texts}])
    assert yaml.safe_load(written)["texts"] == texts
    for text in texts[:-3]:
        assert f"- '{text}'" in written
    assert "- two words" in written
    assert "- 64Gi" in written
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"kind": "X", "day": "2024-01-01"}) + "\n---\nkind: X\nday: 2024-01-01\n")
    assert [each["day"] for each in read_manifests(str(path))] == ["2024-01-01"] * 2


def test_the_error_says_where() -> None:
    with pytest.raises(ConfigError, match=r"apiVersion is kvkern\.io/v9"):
        read_kvcache({"apiVersion": "kvkern.io/v9", "kind": "KVCache"})
