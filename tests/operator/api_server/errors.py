"""Errors of the API server, with the Status bodies that a real one sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .resources import Resource


@dataclass(frozen=True)
class Cause:
    """One field that was refused. `reason` is a FieldValue... word, as in `details.causes`."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"

    def body(self) -> dict[str, Any]:
        return {"reason": self.reason, "message": self.message, "field": self.field}


class ApiError(Exception):
    """An answer other than success. `retry_after_s` becomes a header."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: dict[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.retry_after_s = retry_after_s
        if retry_after_s is not None:
            self.details = {**self.details, "retryAfterSeconds": retry_after_s}

    def body(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            status["details"] = self.details
        return status


class ConnectionLost(Exception):
    """Raised by a callback or a fault: the server closes the connection without an answer."""


def _details(resource: Resource, name: str) -> dict[str, Any]:
    return {"name": name, "group": resource.group, "kind": resource.plural}


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource.label} "{name}" not found', _details(resource, name))


def unknown_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def already_exists(resource: Resource, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{resource.label} "{name}" already exists', _details(resource, name))


def conflict(resource: Resource, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {resource.label} "{name}": {why}'
    return ApiError(409, "Conflict", message, _details(resource, name))


def apply_conflict(fields: Sequence[tuple[str, str]]) -> ApiError:
    """`fields` are (manager, field)."""
    causes = [Cause(field, f'conflict with "{manager}"', "FieldManagerConflict").body() for manager, field in fields]
    which = ", ".join(f'conflict with "{manager}": {field}' for manager, field in fields)
    message = f"Apply failed with {len(fields)} conflict(s): {which}"
    return ApiError(409, "Conflict", message, {"causes": causes})


def invalid(resource: Resource, name: str, causes: Sequence[Cause]) -> ApiError:
    texts = [f"{cause.field}: {cause.message}" for cause in causes]
    which = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    details = {"name": name, "group": resource.group, "kind": resource.kind, "causes": [c.body() for c in causes]}
    return ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {which}', details)


def unprocessable(message: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request due to an error in our request: {message}")


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def forbidden(resource: Resource, name: str, why: str) -> ApiError:
    return ApiError(403, "Forbidden", f'{resource.label} "{name}" is forbidden: {why}', _details(resource, name))


def not_allowed() -> ApiError:
    return ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")


def unsupported_media_type(sent: str) -> ApiError:
    return ApiError(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {sent}")


def expired(message: str) -> ApiError:
    return ApiError(410, "Expired", message)


def internal(message: str) -> ApiError:
    return ApiError(500, "InternalError", f"Internal error occurred: {message}")


def too_many_requests(message: str, retry_after_s: int = 1, causes: Sequence[Cause] = ()) -> ApiError:
    details = {"causes": [c.body() for c in causes]} if causes else None
    return ApiError(429, "TooManyRequests", message, details, retry_after_s)
