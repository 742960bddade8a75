"""`kvkern config`: what is in force, and where each value came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import AsJson, exit_on_bad_input, path_option

BLANK = "***"


def configuration(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE", help="Options to try, as if an engine or `kvkern serve` had been given them."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print every option, its value and where it came from.")] = False,
    config: Annotated[
        Path | None, typer.Option(parser=path_option, help="TOML file to read.", show_default="KVKERN_CONFIG")
    ] = None,
    reader: Annotated[str, typer.Option(help="For whom: engine, daemon or both.")] = "both",
    json: AsJson = False,
) -> None:
    """Check the configuration of this environment. With --show print what is in force; salts and passwords are blanked.

    Exit status 2 for a wrong option, variable or file, or for values that contradict each other.
    """
    from ..config.options import Reader
    from ..errors import ConfigError
    from .output import print_json, print_table

    with exit_on_bad_input():
        if reader not in (*Reader, "both"):
            raise ConfigError(f"reader is {reader!r}; expected engine, daemon or both")
        wanted = tuple(Reader) if reader == "both" else (Reader(reader),)
        found = {each: _in_force(each, options or [], config) for each in wanted}
    if json:
        print_json([{"reader": str(each), **row} for each, rows in found.items() for row in rows])
    elif show:
        for each, rows in found.items():
            typer.echo(f"{each}:")
            print_table(rows)
    else:
        typer.echo("kvkern: the configuration has no mistake that shows here; --show prints it")


def _in_force(reader: Any, given: list[str], file: Path | None) -> list[dict[str, str]]:
    """Return a row for every option of an engine or a daemon. Raises ConfigError."""
    from ..config.engine import Config, used_by_engine
    from ..config.environment import environment
    from ..config.options import BY_NAME, Reader, names_of
    from ..config.published import OL, Family, merged, read, switched_on
    from ..config.sources import Origin, Rank, Setting, converted, gather, in_force
    from ..errors import ConfigError
    from ..node.daemon.node_config import NodeConfig
    from ..option_values import path_text

    settings = gather(reader, {}, "the command line", file)
    if reader is Reader.ENGINE and switched_on(environment())[0]:
        settings = merged(settings, read(environment(), Family.VINEYARD).settings)
    elif reader is Reader.ENGINE and any(name.startswith(OL) and text for name, text in environment().items()):
        typer.echo(
            f"kvkern: the variables {OL}* count only in a vLLM whose --kv-transfer-config is the samples'", err=True
        )
        settings = merged(settings, read(environment(), Family.OFFLOADING).settings)
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in BY_NAME:
            raise ConfigError(f"{text!r} is no option; expected NAME=VALUE with a name of docs/configuration.md")
        if name in names_of(reader):
            option = BY_NAME[name]
            settings[name] = Setting(option.parse(value, "the command line"), Origin(Rank.OPTION, "the command line"))
    converted(settings)
    if reader is Reader.ENGINE and ("capacity" in settings or "socket" in settings):
        Config.from_settings(settings, "the command line")
        settings = used_by_engine(settings, "the command line")
    if reader is Reader.DAEMON and "capacity" in settings:
        NodeConfig.from_settings(settings)
    return [
        {"option": name, "value": path_text(_shown(name, setting.value)), "from": path_text(str(setting.origin))}
        for name, setting in in_force(settings, reader).items()
    ]


def _shown(name: str, value: Any) -> str:
    from ..config.options import BY_NAME
    from ..remote.stores.url import hide_password

    if value is None or value in ("", (), []):
        return "-"
    if name == "remote":
        return hide_password(str(value))
    if BY_NAME[name].secret:
        return BLANK
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
