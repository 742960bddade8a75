"""Writes what the code knows into the files that are installed: python deploy/kubernetes/write_definitions.py

The definitions of both groups, for kustomize and for the chart, and the chart's copy of the operator's rights.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from kvkern.operator.crds import crd
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.yaml_files import to_yaml

KEEP = {"helm.sh/resource-policy": "keep"}  # to delete a definition deletes all KVCaches of its group
HERE = Path(__file__).resolve().parent


def files() -> dict[Path, str]:
    """Return the text of each file."""
    role = next(
        each for each in yaml.safe_load_all((HERE / "base/rbac.yaml").read_text()) if each["kind"] == "ClusterRole"
    )
    found = {HERE / "base/crds.yaml": to_yaml([crd(OWN_GROUP), crd(PUBLISHED_GROUP)])}
    for group in (OWN_GROUP, PUBLISHED_GROUP):
        for folder, rules in (("definitions", True), ("definitions/without_rules", False)):
            definition = crd(group, rules)
            definition["metadata"]["annotations"] |= KEEP
            found[HERE / f"chart/{folder}/{group}.yaml"] = to_yaml([definition]).removeprefix("---\n")
    found[HERE / "chart/definitions/rules.yaml"] = yaml.safe_dump({"rules": role["rules"]}, sort_keys=False)
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
