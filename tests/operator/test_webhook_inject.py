"""What the webhook changes in a pod: pure, against the published pod, with every reason to do nothing."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
import kubernetes_validate
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkern.config.published import switched_on
from kvkern.operator.forms import read_kvcache
from kvkern.operator.kvcache import KVCache
from kvkern.operator.webhook.inject import Injection, InjectSettings, inject
from tests.operator.conftest import own
from tests.operator.manifests import kvcache

FOLDER = "/var/run/vineyard-kubernetes/default"
ENGINE_IMAGE = InjectSettings("kvkern-engine:1")
PUBLISHED = "aibrix/vllm-openai:v0.6.1-edb07092-20250118"


def cache(**spec: Any) -> KVCache:
    return read_kvcache(own(**spec))


CACHES = [cache()]


def pod(*containers: dict[str, Any], **annotations: str) -> dict[str, Any]:
    """Return a pod of the workload `coder`. Annotations are those of kvkern.io."""
    engine = {"name": "engine", "image": "kvkern-engine:1", "args": ["serve", "model"]}
    metadata: dict[str, Any] = {
        "name": "coder-1",
        "namespace": "default",
        "labels": {"kvkern.io/inject": "true", "model.aibrix.ai/name": "coder"},
    }
    if annotations:
        metadata["annotations"] = {f"kvkern.io/{name}": value for name, value in annotations.items()}
    spec = {"containers": copy.deepcopy(list(containers) or [engine])}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def container(name: str = "engine", image: str = "kvkern-engine:1", **more: Any) -> dict[str, Any]:
    return {"name": name, "image": image} | more


def applied(before: dict[str, Any], found: Injection) -> dict[str, Any]:
    """Return the pod that the API server makes of it, which must be valid."""
    after: dict[str, Any] = jsonpatch.apply_patch(before, found.patch)
    for version in ("1.27", "1.37"):
        kubernetes_validate.validate(after, version, strict=True)
    return after


def injected(
    before: dict[str, Any], caches: list[KVCache] | None = None, settings: InjectSettings = ENGINE_IMAGE
) -> dict[str, Any]:
    """Return the pod after the webhook has changed it. A second call must change nothing."""
    found = inject(before, CACHES if caches is None else caches, settings)
    assert found.skipped == found.text == ""
    after = applied(before, found)
    assert inject(after, CACHES if caches is None else caches, settings) == Injection()
    return after


def skipped(
    before: dict[str, Any], caches: list[KVCache] | None = None, settings: InjectSettings = ENGINE_IMAGE
) -> str:
    """Return why the webhook does nothing. It says so in the pod, which stays as it is otherwise."""
    found = inject(before, CACHES if caches is None else caches, settings)
    assert found.text
    after = applied(before, found)
    assert after["metadata"]["annotations"]["kvkern.io/skipped"] == found.skipped
    assert "kvkern.io/injected" not in after["metadata"]["annotations"]
    assert after["spec"] == before["spec"]
    assert not inject(after, CACHES if caches is None else caches, settings).patch
    return found.skipped


def env(after: dict[str, Any], number: int = 0) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in after["spec"]["containers"][number].get("env", [])}


def published_pod() -> dict[str, Any]:
    """Return the pod of the published Deployment, with the label that asks for the webhook."""
    variables = {
        "VLLM_USE_VINEYARD_CACHE": "1", "VINEYARD_CACHE_CPU_MEM_LIMIT_GB": "10", "AIBRIX_LLM_KV_CACHE": "1",
        "AIBRIX_LLM_KV_CACHE_KV_CACHE_NS": "aibrix", "AIBRIX_LLM_KV_CACHE_CHUNK_SIZE": "16",
        "AIBRIX_LLM_KV_CACHE_SOCKET": "/var/run/vineyard.sock",
        "AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT": "deepseek-coder-7b-kvcache-rpc:9600",
        "VINEYARD_CACHE_ENABLE_ASYNC_UPDATE": "1", "VINEYARD_CACHE_METRICS_ENABLED": "1",
    }  # fmt: skip
    engine = container(
        "vllm-openai", PUBLISHED, imagePullPolicy="Always",
        command=["python3", "-m", "vllm.entrypoints.openai.api_server", "--port", "8000", "--enable-prefix-caching"],
        env=[{"name": name, "value": value} for name, value in variables.items()],
        volumeMounts=[{"mountPath": "/var/run", "name": "kvcache-socket"}],
    )  # fmt: skip
    found = pod(engine)
    found["metadata"]["labels"]["model.aibrix.ai/name"] = "deepseek-coder-7b-instruct"
    found["spec"]["volumes"] = [{"name": "kvcache-socket", "hostPath": {"path": f"{FOLDER}/deepseek-coder-7b-kvcache"}}]
    return found


def test_a_bare_engine_gets_folder_variables_and_annotation() -> None:
    after = injected(pod())
    (volume,) = after["spec"]["volumes"]
    assert volume == {"name": "kvkern-socket", "hostPath": {"path": f"{FOLDER}/cache", "type": "DirectoryOrCreate"}}
    (engine,) = after["spec"]["containers"]
    assert engine["volumeMounts"] == [{"name": "kvkern-socket", "mountPath": "/run/kvkern"}]
    assert env(after) == {
        "KVKERN_SOCKET": "/run/kvkern/vineyard.sock", "KVKERN_DAEMON_UID": "0", "VLLM_USE_VINEYARD_CACHE": "1",
        "AIBRIX_LLM_KV_CACHE": "1",
    }  # fmt: skip
    assert switched_on(env(after)) == (True, "")
    assert (engine["image"], engine["args"]) == ("kvkern-engine:1", ["serve", "model"])
    assert after["metadata"]["annotations"] == {"kvkern.io/injected": "cache", "kvkern.io/container": "engine"}


def test_the_published_pod_gets_its_image_and_nothing_else() -> None:
    before = published_pod()
    after = injected(before, [read_kvcache(kvcache("published"))])
    assert after["metadata"]["annotations"]["kvkern.io/injected"] == "deepseek-coder-7b-kvcache"
    assert after["spec"]["containers"][0]["image"] == "kvkern-engine:1"
    after["spec"]["containers"][0]["image"] = before["spec"]["containers"][0]["image"]
    assert after["spec"] == before["spec"]


def test_it_appends_to_what_is_there() -> None:
    before = pod(
        container(env=[{"name": "A", "value": "1"}], volumeMounts=[{"name": "kvkern-socket", "mountPath": "/data"}])
    )
    before["spec"]["volumes"] = [{"name": "kvkern-socket", "emptyDir": {}}, {"name": "kvkern-socket-2", "emptyDir": {}}]
    after = injected(before)
    assert [each["name"] for each in after["spec"]["volumes"]] == [
        "kvkern-socket",
        "kvkern-socket-2",
        "kvkern-socket-3",
    ]
    assert after["spec"]["volumes"][:2] == before["spec"]["volumes"]
    assert after["spec"]["containers"][0]["volumeMounts"][1] == {"name": "kvkern-socket-3", "mountPath": "/run/kvkern"}
    assert next(iter(env(after))) == "A"


def test_a_volume_of_the_folder_is_used_again() -> None:
    before = pod(container(volumeMounts=[{"name": "folder", "mountPath": "/part", "subPath": "part"}]))
    before["spec"]["volumes"] = [{"name": "folder", "hostPath": {"path": f"{FOLDER}/cache/"}}]
    after = injected(before)
    assert after["spec"]["volumes"] == before["spec"]["volumes"]
    assert after["spec"]["containers"][0]["volumeMounts"][1] == {"name": "folder", "mountPath": "/run/kvkern"}


@pytest.mark.parametrize("path", [f"{FOLDER}/cache", "/run/vineyard-kubernetes/default/cache"])
def test_a_mount_of_the_folder_is_left_alone(path: str) -> None:
    before = pod(container(volumeMounts=[{"name": "folder", "mountPath": "/sockets/"}]))
    before["spec"]["volumes"] = [{"name": "folder", "hostPath": {"path": path}}]
    after = injected(before)
    assert after["spec"]["containers"][0]["volumeMounts"] == before["spec"]["containers"][0]["volumeMounts"]
    assert env(after)["KVKERN_SOCKET"] == "/sockets/vineyard.sock"


def test_variables_of_the_user_are_never_changed() -> None:
    theirs = [
        {"name": "KVKERN_SOCKET", "value": "/var/run/kvkern/vineyard.sock"},
        {"name": "KVKERN_DAEMON_UID", "value": "7"},
        {"name": "VLLM_USE_VINEYARD_CACHE", "value": "yes"},
        {"name": "AIBRIX_LLM_KV_CACHE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
    ]
    assert injected(pod(container(env=theirs)))["spec"]["containers"][0]["env"] == theirs


def test_a_published_socket_that_leads_nowhere_is_overruled() -> None:
    theirs = [{"name": "AIBRIX_LLM_KV_CACHE_SOCKET", "value": "/var/run/vineyard.sock"}]
    after = env(injected(pod(container(env=theirs))))
    assert after["AIBRIX_LLM_KV_CACHE_SOCKET"] == "/var/run/vineyard.sock"
    assert after["KVKERN_SOCKET"] == "/run/kvkern/vineyard.sock"


# -- image -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "annotation", "expected"),
    [
        (PUBLISHED, "", "kvkern-engine:1"),
        (f"registry.example:5000/{PUBLISHED}", "", "kvkern-engine:1"),
        ("aibrix/vllm-openai@sha256:0", "", "kvkern-engine:1"),
        ("aibrix/vllm-openai", "", "kvkern-engine:1"),
        (PUBLISHED, "mine:2", "mine:2"),
        ("theirs:1", " mine:2 ", "mine:2"),
        ("theirs:1", "", "theirs:1"),
        ("notaibrix/vllm-openai:1", "", "notaibrix/vllm-openai:1"),
        ("vllm/vllm-openai:v0.32.0", "", "vllm/vllm-openai:v0.32.0"),
    ],
)
def test_images(image: str, annotation: str, expected: str) -> None:
    before = pod(container(image=image), **({"image": annotation} if annotation else {}))
    assert injected(before)["spec"]["containers"][0]["image"] == expected


# -- container -------------------------------------------------------------------------------------------------------------

SIDECAR = container("proxy", "envoy:1", args=["--config", "/etc/envoy.yaml"])


@pytest.mark.parametrize(
    ("containers", "annotation", "expected"),
    [
        ([container("any", "any:1")], "", 0),
        ([SIDECAR, container("any", "any:1")], "any", 1),
        ([container("any", "vllm/vllm-openai:1"), SIDECAR], "proxy", 1),
        ([SIDECAR, container("a", "any:1", command=["python3", "-m", "vllm.entrypoints.openai.api_server"])], "", 1),
        ([SIDECAR, container("a", "any:1", command=["sh", "-c", "exec vllm serve model"])], "", 1),
        ([SIDECAR, container("a", "any:1", command=["/opt/bin/vllm"], args=["serve", "model"])], "", 1),
        ([SIDECAR, container("a", "reg:5000/vllm/vllm-openai:1")], "", 1),
        ([SIDECAR, container("a", "kvkern-engine:1")], "", 1),
        ([SIDECAR, container("a", "vllm-one:1"), container("b", "vllm-two:1")], "", 1),
    ],
)
def test_the_engine_among_containers(containers: list[dict[str, Any]], annotation: str, expected: int) -> None:
    after = injected(pod(*containers, **({"container": annotation} if annotation else {})))
    changed = [number for number, each in enumerate(after["spec"]["containers"]) if each.get("env")]
    assert changed == [expected]


def test_a_sidecar_that_another_webhook_adds_changes_nothing() -> None:
    after = injected(pod(container("any", "any:1")))
    after["spec"]["containers"].insert(0, copy.deepcopy(SIDECAR))
    assert inject(after, CACHES, ENGINE_IMAGE) == Injection()


# -- KVCache ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, "cache"),
        ({"kvcache": "other"}, "other"),
        ({"kvcache": "both", "group": "kvkern.io"}, "both"),
        ({"group": "kvkern.io"}, "cache"),
    ],
)
def test_the_kvcache(annotations: dict[str, str], expected: str) -> None:
    published = copy.deepcopy(kvcache("published"))
    published["metadata"]["name"] = "both"
    both = cache(name="both", workload={"name": "elsewhere"})
    caches = [cache(), cache(name="other", workload={"name": "elsewhere"}), both, read_kvcache(published)]
    after = injected(pod(**annotations), caches)
    assert after["metadata"]["annotations"]["kvkern.io/injected"] == expected
    assert after["spec"]["volumes"][0]["hostPath"]["path"] == f"{FOLDER}/{expected}"


def test_a_label_of_ones_own() -> None:
    found = cache(workload={"name": "coder", "labelKey": "app"})
    before = pod()
    assert skipped(before, [found]) == "no-kvcache"
    before["metadata"]["labels"]["app"] = "coder"
    injected(before, [found])


# -- nothing ---------------------------------------------------------------------------------------------------------------

MOUNTED: dict[str, Any] = {"volumeMounts": [{"name": "v", "mountPath": "/sockets"}]}
SKIPS: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [  # reason, pod, its volume
    ("no-kvcache", pod(kvcache="none"), None),
    ("no-kvcache", pod(group="nobody.io"), None),
    ("no-engine-container", pod(container="none"), None),
    ("no-engine-container", pod(SIDECAR, container("any", "any:1")), None),
    ("connector-configured", pod(container(args=["--kv-transfer-config", "{}"])), None),
    ("connector-configured", pod(container(command=["sh", "-c", "vllm serve m --kv-transfer-config={}"])), None),
    ("connector-configured", pod(container(args=["--kv_transfer_config.kv_connector=X"])), None),
    ("connector-configured", pod(container(args=["--kv-offloading-size", "10"])), None),
    ("switched-off", pod(container(env=[{"name": "VLLM_USE_VINEYARD_CACHE", "value": "0"}])), None),
    ("switched-off", pod(container(env=[{"name": "AIBRIX_LLM_KV_CACHE"}])), None),
    ("socket-configured", pod(container(env=[{"name": "KVKERN_SOCKET", "value": "/mine.sock"}])), None),
    (
        "socket-configured",
        pod(
            container(env=[{"name": "KVKERN_SOCKET", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}])
        ),
        None,
    ),
    (
        "host-path-mounted-elsewhere",
        pod(container(env=[{"name": "KVKERN_SOCKET", "value": "/run/kvkern/vineyard.sock"}], **MOUNTED)),
        {"name": "v", "hostPath": {"path": f"{FOLDER}/cache"}},
    ),
    ("other-kvcache-mounted", pod(container(**MOUNTED)), {"name": "v", "hostPath": {"path": f"{FOLDER}/other"}}),
    ("other-kvcache-mounted", pod(container(**MOUNTED)), {"name": "v", "hostPath": {"path": "/run/vineyard-kubernetes"}}),
    (
        "mount-path-taken",
        pod(container(volumeMounts=[{"name": "v", "mountPath": "/var/run/kvkern/"}])),
        {"name": "v", "emptyDir": {}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "before", "volume"), SKIPS)
def test_reasons_to_do_nothing(reason: str, before: dict[str, Any], volume: dict[str, Any] | None) -> None:
    if volume is not None:
        before["spec"]["volumes"] = [volume]
    assert skipped(before) == reason


def test_more_reasons() -> None:
    assert skipped(pod(), []) == "no-kvcache"
    assert skipped(pod(), [cache(), cache(name="second")]) == "several-kvcaches"
    assert skipped(
        pod(kvcache="cache"), [cache(), read_kvcache(kvcache("published") | {"metadata": {"name": "cache"}})]
    )
    assert skipped(pod(), [cache(memory="1Mi")]) == "invalid-kvcache"
    assert skipped(pod(container(image=PUBLISHED)), settings=InjectSettings()) == "image-without-kvkern"


@pytest.mark.parametrize("label", ["false", "", "True", None])
def test_a_pod_that_does_not_ask(label: str | None) -> None:
    before = pod()
    before["metadata"]["labels"] = {} if label is None else {"kvkern.io/inject": label}
    assert inject(before, CACHES, ENGINE_IMAGE) == Injection()
    assert inject({}, CACHES, ENGINE_IMAGE) == Injection()


def test_the_annotation_follows_what_is_true_now() -> None:
    before = pod(skipped="no-kvcache", injected="old")
    after = applied(before, inject(before, CACHES, ENGINE_IMAGE))
    assert after["metadata"]["annotations"] == {"kvkern.io/injected": "cache", "kvkern.io/container": "engine"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"metadata": []},
        {"spec": {"containers": "x"}},
        {"spec": {"containers": [{"env": [{"name": 1}]}]}},
        {"spec": {"volumes": [{"hostPath": "x"}]}},
        {"metadata": {"labels": {"kvkern.io/inject": True}}},
    ],
)
def test_what_is_no_pod_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        inject(wrong, CACHES, ENGINE_IMAGE)


# -- any pod ---------------------------------------------------------------------------------------------------------------

_VARIABLES = st.lists(
    st.builds(
        lambda name, value: {"name": name, "value": value},
        st.sampled_from(["KVKERN_SOCKET", "KVKERN_DAEMON_UID", "VLLM_USE_VINEYARD_CACHE", "AIBRIX_LLM_KV_CACHE",
                         "AIBRIX_LLM_KV_CACHE_SOCKET", "OTHER"]),
        st.sampled_from(["", "0", "1", "/run/kvkern/vineyard.sock", "/var/run/vineyard.sock", "/sockets/vineyard.sock"]),
    ),
    max_size=4,
)  # fmt: skip
_VOLUMES = {
    "a": {"hostPath": {"path": f"{FOLDER}/cache"}},
    "b": {"hostPath": {"path": f"{FOLDER}/other"}},
    "kvkern-socket": {"emptyDir": {}},
}
_CONTAINERS = st.builds(
    lambda image, args, variables, mounts: {
        "image": image, "args": args, "env": variables,
        "volumeMounts": [{"name": name, "mountPath": path} for path, name in mounts.items()],
    },
    st.sampled_from(["any:1", PUBLISHED, "vllm/vllm-openai:1"]),
    st.sampled_from([[], ["serve", "m"], ["--kv-transfer-config", "{}"]]),
    _VARIABLES,
    st.dictionaries(st.sampled_from(["/sockets", "/var/run", "/run/kvkern", "/data"]), st.sampled_from(list(_VOLUMES))),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(_CONTAINERS, min_size=1, max_size=3), st.dictionaries(st.sampled_from(["kvcache", "container", "image"]),
       st.sampled_from(["cache", "c0", "c1", "mine:1"])), st.booleans())  # fmt: skip
def test_any_pod(containers: list[dict[str, Any]], annotations: dict[str, str], with_image: bool) -> None:
    """It adds and replaces an image, changes nothing else, and a second call does nothing."""
    before = pod(*({"name": f"c{number}"} | each for number, each in enumerate(containers)), **annotations)
    before["spec"]["volumes"] = [{"name": name} | copy.deepcopy(volume) for name, volume in _VOLUMES.items()]
    given_settings = ENGINE_IMAGE if with_image else InjectSettings()
    found = inject(before, CACHES, given_settings)
    after = jsonpatch.apply_patch(before, found.patch)
    second = inject(after, CACHES, given_settings)
    assert (second.patch, second.skipped) == ([], found.skipped)
    (done,) = {"kvkern.io/injected", "kvkern.io/skipped"} & after["metadata"]["annotations"].keys()
    if done == "kvkern.io/skipped":
        assert after["spec"] == before["spec"]
        return
    assert after["spec"]["volumes"][: len(_VOLUMES)] == before["spec"]["volumes"]
    changed = 0
    for old, new in zip(before["spec"]["containers"], after["spec"]["containers"], strict=True):
        for name in ("env", "volumeMounts"):
            assert new[name][: len(old[name])] == old[name]
        assert new["args"] == old["args"]
        paths = [each["mountPath"] for each in new["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        changed += new != old
        if new != old:
            variables = {each["name"]: each["value"] for each in new["env"]}
            assert switched_on(variables)[0]
            place = next(each for each in new["volumeMounts"] if _is_folder(after, each["name"]))["mountPath"]
            assert f"{place}/vineyard.sock" in (
                variables.get("KVKERN_SOCKET"), variables.get("AIBRIX_LLM_KV_CACHE_SOCKET"),
            )  # fmt: skip
    assert changed <= 1


def _is_folder(after: dict[str, Any], name: str) -> bool:
    volume = next(each for each in after["spec"]["volumes"] if each["name"] == name)
    return bool(volume.get("hostPath", {}).get("path") == f"{FOLDER}/cache")
