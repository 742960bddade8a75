"""Worker side of LoRA: knows the content of every adapter that vLLM has loaded, and since which step it has it.

    vLLM loads an adapter      digest of its files before and after; if they differ, the content is unknown
    store under digest D       done only if the adapter has had content D since the first step of the request
    load under digest D        the same, if the adapter is loaded. If not, it is *staged*: read now, and handed to vLLM when the
                               request's first step asks for it. So the files may change between the two
    otherwise                  the store is not done, the load fails, and the request is computed

vLLM gives a connector no sight of its adapters, so two methods of its manager are wrapped. They do what they did before.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError

from . import shim
from .adapter_digest import AdapterDigests, AdapterUse

NEVER = -1
UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError, SafetensorError, shim.AdapterNotFound
)  # fmt: skip


@dataclass
class Content:
    """What the engine holds under an adapter's number."""

    digest: str | None  # None: unknown
    changed_after: int = NEVER  # the last step that may have run with other content under this number


@dataclass
class Staged:
    """An adapter that was read for a load, before vLLM asked for it."""

    adapter: Any  # vLLM's LoRAModel
    path: str
    digest: str
    staged_at: int  # step
    request_ids: set[str] = field(default_factory=set)  # that have not ended


class AdapterLoads:
    """Content of the adapters of one worker. Runs in the worker's thread."""

    def __init__(self) -> None:
        self.step = 0  # the last step that has run
        self._digests = AdapterDigests()
        self._contents: dict[int, Content] = {}
        self._staged: dict[int, Staged] = {}
        self._news: dict[int, str | None] = {}
        self._manager: Any = None  # vLLM's WorkerLoRAManager
        self._in_step = False
        self._read: Any = None  # vLLM's own function that reads an adapter

    def holds(self, use: AdapterUse) -> bool:
        """Return True if the adapter has had the content of `use` in every step since `use.since_step`."""
        content = self._contents.get(use.adapter_id)
        return content is not None and content.digest == use.digest and content.changed_after < use.since_step

    def admits(self, use: AdapterUse) -> bool:
        """Return True if the step that computes with the loaded KV will find the adapter with this content."""
        if self._manager is None:
            return False
        if use.adapter_id in self._manager.list_adapters() and not use.request.load_inplace:
            return self.holds(use)
        staged = self._staged.get(use.adapter_id)
        if staged is None or staged.path != use.request.lora_path:
            staged = self._stage(use)
        if staged is None or staged.digest != use.digest or not self._will_hold(use, staged):
            return False
        staged.request_ids.add(use.request_id)
        return True

    def drop(self, ended: set[str]) -> None:
        """Forget what was staged for requests that have ended."""
        for adapter_id, staged in list(self._staged.items()):
            staged.request_ids -= ended
            if not staged.request_ids:
                del self._staged[adapter_id]

    def take_news(self) -> dict[int, str | None]:
        """Return adapter number -> digest of the adapters loaded since the last call, for the scheduler."""
        news, self._news = self._news, {}
        return news

    # -- called by the wrapped methods -----------------------------------------------------------------------------

    def load(self, manager: Any, request: shim.LoRARequest, read: Any) -> Any:
        """Return the adapter that vLLM asks for, and note its content."""
        self.bind(manager, read)
        staged = self._staged.pop(request.lora_int_id, None)
        if staged is not None and self._in_step and staged.path == request.lora_path:
            self._note(request.lora_int_id, staged.digest, min(self.step, staged.staged_at - 1))
            return staged.adapter
        adapter, digest = self._read_adapter(request)
        self._note(request.lora_int_id, digest, self.step)
        return adapter

    def bind(self, manager: Any, read: Any) -> None:
        """Take vLLM's manager, and its own function that reads an adapter."""
        self._manager, self._read = manager, read

    def begin_use(self, manager: Any, read: Any) -> None:
        """A step asks for its adapters."""
        self.bind(manager, read)
        self._in_step = True

    def end_use(self) -> None:
        """The step has its adapters."""
        self._in_step = False

    # -- inside ----------------------------------------------------------------------------------------------------

    def _note(self, adapter_id: int, digest: str | None, changed_after: int) -> None:
        before = self._contents.get(adapter_id)
        if before is None:
            self._contents[adapter_id] = Content(digest)
        elif before.digest != digest or digest is None:
            self._contents[adapter_id] = Content(digest, max(changed_after, before.changed_after))
        self._news[adapter_id] = digest

    def _will_hold(self, use: AdapterUse, staged: Staged) -> bool:
        """Return True if `holds` will be True once vLLM has taken the staged adapter."""
        before = self._contents.get(use.adapter_id)
        if before is None:
            return True
        changed = before.changed_after if before.digest == staged.digest else staged.staged_at - 1
        return changed < use.since_step

    def _stage(self, use: AdapterUse) -> Staged | None:
        try:
            adapter, digest = self._read_adapter(use.request)
        except UNREADABLE:
            return None  # vLLM will say why, when it loads the adapter itself
        if digest is None:
            return None
        staged = self._staged[use.adapter_id] = Staged(adapter, use.request.lora_path, digest, self.step)
        return staged

    def _read_adapter(self, request: shim.LoRARequest) -> tuple[Any, str | None]:
        """Return (vLLM's LoRAModel, digest of the files that it was read from)."""
        before = self._digests.digest(request)
        adapter = self._read(self._manager, request)
        _own_memory(adapter)
        digest = self._digests.digest(request)
        if before is None or before != digest:
            shim.logger.warning(
                "kvkern: the content of LoRA adapter %(adapter)r cannot be known: %(path)r is no local folder, or its "
                "files changed while vLLM read them. Requests with this adapter are computed without the cache. Give "
                "the path of a local folder, and load the adapter when its files are complete.",
                {"event": "adapter_unknown", "adapter": request.lora_name, "path": request.lora_path},
            )
            return adapter, None
        return adapter, digest


def _own_memory(adapter: Any) -> None:
    """Copy tensors that may be mapped from the adapter's file, because a write to the file would change them later."""
    for layers in (adapter.loras, getattr(adapter, "modules_to_save", {})):
        for layer in layers.values():
            for name, value in vars(layer).items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_pinned():
                    setattr(layer, name, value.clone())


_unbound: list[AdapterLoads] = []  # of workers whose manager has not been seen yet


def watch_adapters() -> AdapterLoads:
    """Wrap vLLM's adapter manager, and return what it loads in this worker. Call before the engine loads an adapter."""
    manager_class = shim.WorkerLoRAManager
    if not hasattr(manager_class, "_kvkern_read"):
        read, use = manager_class._load_adapter, manager_class.set_active_adapters

        def load_adapter(manager: Any, request: shim.LoRARequest) -> Any:
            loads = _loads_of(manager)
            return read(manager, request) if loads is None else loads.load(manager, request, read)

        def set_active_adapters(manager: Any, *args: Any, **kwargs: Any) -> Any:
            if (loads := _loads_of(manager)) is None:
                return use(manager, *args, **kwargs)
            loads.begin_use(manager, read)
            try:
                return use(manager, *args, **kwargs)
            finally:
                loads.end_use()

        manager_class._kvkern_read = read
        manager_class._load_adapter = load_adapter
        manager_class.set_active_adapters = set_active_adapters
    loads = AdapterLoads()
    new = [found for found in gc.get_objects() if issubclass(type(found), manager_class)]
    new = [manager for manager in new if getattr(manager, "_kvkern_loads", None) is None]
    if len(new) == 1:  # vLLM loads the model before it makes the connector
        new[0]._kvkern_loads = loads
        loads.bind(new[0], manager_class._kvkern_read)
    else:
        _unbound.append(loads)
    return loads


def _loads_of(manager: Any) -> AdapterLoads | None:
    """Return the loads of a manager. A manager that is seen for the first time gets the newest that have none."""
    loads: AdapterLoads | None = getattr(manager, "_kvkern_loads", None)
    if loads is None and _unbound:
        loads = manager._kvkern_loads = _unbound.pop()
    return loads
