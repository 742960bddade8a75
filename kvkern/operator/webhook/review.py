"""Answers an AdmissionReview. Every pod is allowed; what is no review is refused with 400. Pure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..kvcache import KVCache
from .inject import Injection, InjectSettings, inject

API = "admission.k8s.io/v1"
MAX_WARNING = 250  # characters


class _Kind(msgspec.Struct):
    kind: str = ""


class _Request(msgspec.Struct):
    uid: str
    kind: _Kind = msgspec.field(default_factory=_Kind)
    namespace: str = ""
    operation: str = ""
    object: dict[str, Any] | None = None


class _Review(msgspec.Struct, rename="camel"):
    api_version: str
    kind: str
    request: _Request


def answer(
    body: bytes,
    caches: Callable[[str], Sequence[KVCache]],  # of a namespace
    settings: InjectSettings,
) -> tuple[int, bytes]:
    """Return the status and the body of the answer."""
    try:
        review = msgspec.json.decode(body, type=_Review)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        return 400, f"this is no AdmissionReview: {error}".encode()
    if (review.api_version, review.kind) != (API, "AdmissionReview"):
        return 400, f"expected an AdmissionReview of {API}".encode()
    request, injection, warning = review.request, Injection(), ""
    if request.object is not None and request.operation == "CREATE" and request.kind.kind == "Pod":
        try:
            injection = inject(request.object, caches(request.namespace), settings)
            warning = f"kvkern: {injection.skipped}: {injection.text}" if injection.skipped else ""
        except msgspec.ValidationError as error:
            warning = f"kvkern: the pod is not changed: {error}"
    response: dict[str, Any] = {"uid": request.uid, "allowed": True}
    if injection.patch:
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(msgspec.json.encode(injection.patch)).decode()}
    if warning:
        response["warnings"] = [warning[:MAX_WARNING]]
    return 200, msgspec.json.encode({"apiVersion": API, "kind": "AdmissionReview", "response": response})
