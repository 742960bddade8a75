"""Requests of many users in small: conversations whose turns come back, among documents that are read once.

    each request   one in four is a document that nobody asks about again; else the next turn of the conversation whose
                   user has thought longest: the prompt is all that conversation had before, and some more
    thinking       log-normal: two of three times are within a factor of two of the usual one. After any turn one
                   conversation in ten has ended for good, and another opens
    the whole      as many distinct chunks as several arenas hold

Drawn from a seed, so that every engine gets the same requests. Knows numbers; knows nothing of text, engines or policies.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .messages import MixedWorkload


@dataclass(frozen=True)
class Request:
    """One prompt: the first `num_tokens` of what a conversation, or a document, comes to in the end."""

    source: str
    turn: int  # from 0; those of a conversation from 1 on have come before, but for their end
    num_tokens: int

    @property
    def prompt_id(self) -> str:
        return f"{self.source}/{self.turn}"


def requests(mix: MixedWorkload) -> list[Request]:
    """All requests in order, as many as it takes to the asked number of distinct chunks."""
    drawn: list[Request] = []
    chunks: dict[str, int] = {}  # of each source so far
    for request in _endless(mix):
        drawn.append(request)
        chunks[request.source] = request.num_tokens // mix.chunk_tokens
        if sum(chunks.values()) >= mix.times * mix.arena_chunks:
            break
    return drawn


def lengths(drawn: Sequence[Request]) -> dict[str, int]:
    """Tokens of each source in the end, in the order they first come."""
    return {request.source: request.num_tokens for request in drawn}


def _endless(mix: MixedWorkload) -> Iterator[Request]:
    draw = random.Random(mix.seed)
    num_sources = 0
    # (when its user has thought, to break ties, its last turn or None: a new one opens), a heap
    due: list[tuple[float, int, Request | None]] = [(draw.random(), i, None) for i in range(mix.conversations)]
    heapq.heapify(due)
    for number in itertools.count(mix.conversations):
        if draw.random() < mix.document_share:
            num_sources += 1
            yield Request(f"document-{num_sources}", 0, draw.randint(*mix.document_tokens))
            continue
        now, _, last = heapq.heappop(due)
        if last is None:
            num_sources += 1
            turn = Request(f"chat-{num_sources}", 0, draw.randint(*mix.opening_tokens))
        else:
            turn = Request(last.source, last.turn + 1, last.num_tokens + draw.randint(*mix.turn_tokens))
        yield turn
        left = None if draw.random() < mix.end_share else turn
        heapq.heappush(due, (now + draw.lognormvariate(0.0, mix.thinking_spread), number, left))
