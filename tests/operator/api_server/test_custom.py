"""Custom resources: pruning, defaults, validation and rules in CEL."""

from __future__ import annotations

from typing import Any

import pytest

from tests.operator.api_server.cel_rules import escape, evaluate
from tests.operator.api_server.client import DEFINITIONS, WIDGETS, Client, causes, definition, widget


def test_unknown_fields_are_pruned_and_defaults_set(widgets: Client) -> None:
    made = widgets.ok("POST", WIDGETS, widget(other=1, free={"x": 1}, port="http", items=[{"name": "a", "q": 1}]))
    assert made["spec"] == {"size": 3, "free": {"x": 1}, "port": "http", "items": [{"name": "a"}]}
    assert "unknown field" in widgets.headers["Warning"]
    code, status = widgets("PUT", f"{WIDGETS}/w", {**made, "spec": {"other": 1}}, fieldValidation="Strict")
    assert (code, status["message"]) == (400, 'strict decoding error: unknown field "spec.other"')
    table = widgets.ok("GET", WIDGETS)
    assert table["kind"] == "WidgetList"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"size": 0}, [("spec.size", "FieldValueInvalid")]),
        ({"size": "x"}, [("spec.size", "FieldValueTypeInvalid")]),
        ({"mode": "c"}, [("spec.mode", "FieldValueNotSupported")]),
        ({"items": [{"n": 1}]}, [("spec.items[0].name", "FieldValueRequired")]),
        ({"items": [{"name": "a"}, {"name": "a"}]}, [("spec.items[1]", "FieldValueDuplicate")]),
        ({"size": 10}, [("spec", "FieldValueInvalid")]),
        ({"port": []}, [("spec.port", "FieldValueTypeInvalid")]),
    ],
)
def test_wrong_custom_resources_are_refused(
    widgets: Client, spec: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert causes(widgets("POST", WIDGETS, widget(**spec))) == expected


def test_transition_rules_compare_with_the_old_object(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, widget(fixed="a"))
    assert causes(widgets("PATCH", f"{WIDGETS}/w", {"spec": {"fixed": "b"}}, "application/merge-patch+json")) == [
        ("spec.fixed", "FieldValueInvalid")
    ]
    widgets.merge(f"{WIDGETS}/w", {"spec": {"fixed": None}})
    assert widgets.merge(f"{WIDGETS}/w", {"spec": {"fixed": "c", "size": 10, "mode": "b"}})["spec"]["fixed"] == "c"


def test_custom_updates_need_a_revision(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, widget())
    assert causes(widgets("PUT", f"{WIDGETS}/w", widget())) == [("metadata.resourceVersion", "FieldValueInvalid")]


def test_cel_knows_kubernetes_functions() -> None:
    assert escape("a-b.c/d__e") == "a__dash__b__dot__c__slash__d__underscores__e"
    assert (
        evaluate("quantity(self).isLessThan(quantity('2Gi')) && isQuantity('1') && !isQuantity('x')", {"self": "1Gi"})
        is True
    )
    assert evaluate("self.split(',').exists(x, x.find('[0-9]+') == '12')", {"self": "a,b12"}) is True
    with pytest.raises(ValueError, match="nowhere"):
        evaluate("nowhere(self)", {"self": 1})


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"a": {}}, "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].type"),
        (
            {"a": {"type": "integer", "default": "x"}},
            "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].default",
        ),
        (
            {"a": {"type": "string", "x-kubernetes-validations": [{"rule": "self =="}]}},
            "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].x-kubernetes-validations[0].rule",
        ),
    ],
)
def test_a_wrong_definition_is_refused(call: Client, spec: dict[str, Any], field: str) -> None:
    assert [name for name, _ in causes(call("POST", DEFINITIONS, definition(spec)))] == [field]


def test_generation_counts_changes_of_the_spec_alone(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, {**widget(), "status": {"a": 1}})
    assert "status" not in widgets.ok("GET", f"{WIDGETS}/w")
    assert widgets.merge(f"{WIDGETS}/w", {"metadata": {"labels": {"a": "b"}}})["metadata"]["generation"] == 1
    assert widgets.merge(f"{WIDGETS}/w", {"spec": {"size": 4}, "status": {"a": 1}})["metadata"]["generation"] == 2
    changed = widgets.merge(f"{WIDGETS}/w/status", {"spec": {"size": 5}, "status": {"a": 2}})
    assert (changed["spec"]["size"], changed["status"], changed["metadata"]["generation"]) == (4, {"a": 2}, 2)
