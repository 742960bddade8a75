"""`kvkern operator`: Kubernetes objects of a KVCache, their definitions, and the operator itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..observability.logs import LogFormat
from .arguments import exit_on_bad_input

if TYPE_CHECKING:
    from ..operator.webhook.service import WebhookSettings

operator = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Run the cache on Kubernetes: the operator, and what it makes."
)


@operator.command()
def render(
    filename: Annotated[
        str, typer.Option("--filename", "-f", help="File with KVCaches of any form; '-' is standard input.")
    ],
    image: Annotated[str, typer.Option(help="Image of the daemon for those that name none.")] = "",
    replace_images: Annotated[
        str,
        typer.Option(help="Image of the daemon for those that name the image of the program they were written for."),
    ] = "",
    kubernetes: Annotated[
        str,
        typer.Option(
            help="Version of the cluster, such as 1.20: without what it does not know. Left out: 1.27 or later."
        ),
    ] = "",
    monitors: Annotated[
        bool, typer.Option("--monitors", help="With ServiceMonitor and PodMonitor, instead of annotations.")
    ] = False,
) -> None:
    """Print every object that a KVCache becomes, as YAML that `kubectl apply` takes. It needs no cluster.

    What has no effect is said on stderr. Exit status 2 if a KVCache is wrong.
    """
    from ..errors import ConfigError
    from ..operator.forms import read_kvcache
    from ..operator.names import KIND
    from ..operator.objects import Cluster
    from ..operator.objects import render as render_objects
    from ..operator.objects.old_versions import for_version
    from ..operator.yaml_files import read_manifests, to_yaml

    with exit_on_bad_input():
        caches = [each for each in read_manifests(filename) if each["kind"] == KIND]
        if not caches:
            raise ConfigError(f"{filename} holds no {KIND}")
        objects, seen = [], set[tuple[str, str]]()
        for manifest in caches:
            cache = read_kvcache(manifest, image, replace_images)
            if (cache.namespace, cache.name) in seen:
                raise ConfigError(
                    f"{filename} has two KVCaches {cache.namespace}/{cache.name}: their objects have the same names"
                )
            seen.add((cache.namespace, cache.name))
            for note in cache.notes:
                typer.echo(f"kvkern: {cache.name}: {note}", err=True)
            if cache.errors:
                raise ConfigError("\n".join(f"{cache.name}: {error}" for error in cache.errors))
            objects += render_objects(cache, Cluster(monitors=monitors))
        typer.echo(to_yaml(for_version(objects, kubernetes)), nl=False)


@operator.command()
def crds(
    without_rules: Annotated[
        bool, typer.Option("--without-rules", help="Without rules in CEL: for API servers before Kubernetes 1.25.")
    ] = False,
) -> None:
    """Print the definitions of both groups, as YAML that `kubectl apply` takes."""
    from ..operator.crds import crd
    from ..operator.names import OWN_GROUP, PUBLISHED_GROUP
    from ..operator.yaml_files import to_yaml

    with exit_on_bad_input():
        typer.echo(to_yaml([crd(group, not without_rules) for group in (OWN_GROUP, PUBLISHED_GROUP)]), nl=False)


@operator.command()
def run(
    image: Annotated[
        str, typer.Option(envvar="KVKERN_OPERATOR_IMAGE", help="Image of the daemon for KVCaches that name none.")
    ] = "",
    replace_images: Annotated[
        str,
        typer.Option(
            envvar="KVKERN_OPERATOR_REPLACE_IMAGES",
            help="Image of the daemon for KVCaches that name the image of the program they were written for.",
        ),
    ] = "",
    namespace: Annotated[
        list[str] | None, typer.Option(help="A namespace to look after; may be repeated. Left out: all.")
    ] = None,
    lease_namespace: Annotated[
        str,
        typer.Option(
            envvar="POD_NAMESPACE",
            help="Namespace of the lease that lets one of several operators work. Empty: no lease.",
        ),
    ] = "",
    webhook: Annotated[
        str,
        typer.Option(
            envvar="KVKERN_OPERATOR_WEBHOOK",
            help="[ADDRESS]:PORT of the webhook that changes pods which ask for it, such as :9443. Empty: there is none.",
        ),
    ] = "",
    webhook_service: Annotated[
        str, typer.Option(envvar="KVKERN_OPERATOR_WEBHOOK_SERVICE", help="Service that leads to the webhook.")
    ] = "kvkern-operator-webhook",
    webhook_namespace: Annotated[
        str,
        typer.Option(
            envvar="KVKERN_OPERATOR_WEBHOOK_NAMESPACE",
            help="Namespace of that Service, and of the Secret with its certificates. Left out: that of the lease.",
        ),
    ] = "",
    engine_image: Annotated[
        str,
        typer.Option(
            envvar="KVKERN_OPERATOR_ENGINE_IMAGE",
            help="Image of an engine with kvkern in it, which the webhook puts in the place of aibrix/vllm-openai.",
        ),
    ] = "",
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Look after KVCaches even if their definition is another program's.")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="text or json.")] = "text",
) -> None:
    """Run the operator until SIGTERM. It connects as its pod's service account, or as KUBECONFIG says."""
    with exit_on_bad_input():
        _needs("kopf", "kr8s")
        from ..observability import logs
        from ..operator import main
        from ..operator.reconcile import Settings

        names = tuple(namespace or ())
        hook = None
        if webhook:
            place = (webhook_service, webhook_namespace or lease_namespace)
            hook = _webhook_settings(webhook, place, names, engine_image)
        logs.set_up(log_format, verbose=True)
        main.run_until_signal(Settings(image, replace_images, take_over=take_over), names, lease_namespace, hook)


def _webhook_settings(
    endpoint: str, place: tuple[str, str], namespaces: tuple[str, ...], engine_image: str
) -> WebhookSettings:
    _needs("cryptography")
    from ..errors import ConfigError
    from ..node.web.endpoint import Endpoint
    from ..operator.webhook.inject import InjectSettings
    from ..operator.webhook.registration import Place
    from ..operator.webhook.service import WebhookSettings

    parsed = Endpoint.parse(endpoint, "--webhook")
    if not all(place):
        raise ConfigError("webhook needs the namespace of its Service: give --webhook-namespace")
    return WebhookSettings(parsed, Place(*place, namespaces), InjectSettings(engine_image))


def _needs(*packages: str) -> None:
    from importlib.util import find_spec

    from ..errors import UnsupportedError

    if missing := [name for name in packages if find_spec(name) is None]:
        raise UnsupportedError(f"the operator needs {', '.join(missing)}; install kvkern[operator]")
