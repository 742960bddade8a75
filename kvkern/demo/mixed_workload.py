"""A small workload of many users: conversations whose turns come back, among documents that are read once.

    each request   one in four is a document that no later request uses. The others are the next turn of the conversation
                   whose thinking time ends first: its prompt is the conversation's whole history and some tokens more
    thinking time  log-normal: two of three times lie within a factor of two of the median. After any turn one
                   conversation in ten ends for good, and another one opens
    all requests   have as many distinct chunks as several arenas hold

The requests are drawn from a seed, so every engine gets the same ones. Knows numbers; knows nothing of text, engines or
policies.
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
    """One prompt: the first `num_tokens` tokens of the full text of its conversation or document."""

    source: str  # the conversation or document
    turn: int  # from 0. From turn 1 on an earlier request had all of the prompt except its end
    num_tokens: int

    @property
    def prompt_id(self) -> str:
        return f"{self.source}/{self.turn}"


def requests(mix: MixedWorkload) -> list[Request]:
    """Draw requests in order until they have `mix.times * mix.arena_chunks` distinct chunks."""
    drawn: list[Request] = []
    chunks: dict[str, int] = {}  # by source, so far
    for request in _draw_endlessly(mix):
        drawn.append(request)
        chunks[request.source] = request.num_tokens // mix.chunk_tokens
        if sum(chunks.values()) >= mix.times * mix.arena_chunks:
            break
    return drawn


def final_lengths(drawn: Sequence[Request]) -> dict[str, int]:
    """Return the final number of tokens of each source, in the order in which the sources first appear."""
    return {request.source: request.num_tokens for request in drawn}


def _draw_endlessly(mix: MixedWorkload) -> Iterator[Request]:
    draw = random.Random(mix.seed)
    num_sources = 0
    # A heap of (time at which the user has finished thinking, tie-breaker, last turn or None for a new conversation).
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
