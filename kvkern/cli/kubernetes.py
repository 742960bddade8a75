"""`kvkern operator`: Kubernetes objects of a KVCache, their definitions, and the operator itself."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import exit_on_bad_input

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
    from ..operator.yaml_files import read_manifests, to_yaml

    with exit_on_bad_input():
        caches = [each for each in read_manifests(filename) if each["kind"] == KIND]
        if not caches:
            raise ConfigError(f"{filename} holds no {KIND}")
        objects = []
        for manifest in caches:
            cache = read_kvcache(manifest, image, replace_images)
            for note in cache.notes:
                typer.echo(f"kvkern: {cache.name}: {note}", err=True)
            if cache.errors:
                raise ConfigError("\n".join(f"{cache.name}: {error}" for error in cache.errors))
            objects += render_objects(cache, Cluster(monitors=monitors))
        typer.echo(to_yaml(objects), nl=False)


@operator.command()
def crds() -> None:
    """Print the definitions of both groups, as YAML that `kubectl apply` takes."""
    from ..operator.crds import crd
    from ..operator.names import OWN_GROUP, PUBLISHED_GROUP
    from ..operator.yaml_files import to_yaml

    with exit_on_bad_input():
        typer.echo(to_yaml([crd(OWN_GROUP), crd(PUBLISHED_GROUP)]), nl=False)
