"""Reads a Dockerfile, and runs the RUN lines of a stage here, without docker: the same commands, another PREFIX.

Knows the instructions that deploy/ uses. Knows no layers, no images and no networks.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Stage:
    """One FROM and what follows it."""

    image: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)  # (word, rest), in their order

    def all(self, word: str) -> list[str]:
        """What follows each instruction of this word."""
        return [rest for found, rest in self.instructions if found == word]

    def exec_form(self, word: str) -> list[str]:
        """The JSON list behind the last instruction of this word: ENTRYPOINT, CMD, SHELL."""
        found: list[str] = json.loads(self.all(word)[-1])
        return found

    def variables(self, **given: str) -> dict[str, str]:
        """Return ARG and ENV as the stage's commands see them. `given` takes the place of ARG's defaults."""
        found: dict[str, str] = {}
        for word, rest in self.instructions:
            if word not in ("ARG", "ENV"):
                continue
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                if word == "ARG":
                    value = given.get(name, value)
                found[name] = re.sub(r"\$\{?(\w+)\}?", lambda m: found.get(m[1], f"${m[1]}"), value)
        return found


def read_stages(path: Path) -> list[Stage]:
    """Return the stages of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image, name))
        elif stages:
            stages[-1].instructions.append((word, rest.strip()))
    return stages


def copy_context(target: Path) -> None:
    """Copy what .dockerignore leaves of this tree, as far as git knows it or would take it."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *kept],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_file() or source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def run_stage(stage: Stage, source: Path, environment: dict[str, str], shell: tuple[str, ...] = ("sh", "-c")) -> None:
    """Run the RUN lines of the stage, in `source` for the folder into which it copies, else in their WORKDIR."""
    folder, copied_to = Path("/"), None
    for word, rest in stage.instructions:
        if word == "WORKDIR":
            folder = Path(rest)
        elif (word, rest) == ("COPY", ". ."):
            copied_to = folder
        elif word == "RUN":
            here = source if folder == copied_to else folder
            subprocess.run([*shell, rest], cwd=here, env=environment, check=True, timeout=900)
