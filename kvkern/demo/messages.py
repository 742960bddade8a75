"""What goes between the demo and its engine processes: one JSON line a message. Knows shapes; knows nothing of vLLM.

parent -> child   one Job on stdin
child -> parent   Progress | Answer ... Done, on a pipe of its own: stdout belongs to the engine
"""

from __future__ import annotations

import msgspec

BLOCK_TOKENS = 128


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How one vLLM engine is started."""

    model: str  # folder
    dtype: str = "bfloat16"
    kvkern_capacity: str | None = None  # of a cache of its own
    kvkern_policy: str | None = None  # of eviction, in a cache of its own; None: the default
    kvkern_socket: str | None = None  # of a daemon; with neither it is vLLM alone
    kv_pool_nbytes: int  # vLLM's own KV blocks
    block_tokens: int = BLOCK_TOKENS
    max_model_tokens: int = 12_288
    max_batched_tokens: int = 2048


class MixedWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of mixed.py. Ranges are of tokens, both ends included."""

    chunk_tokens: int = 32  # vLLM's blocks are as long in these engines
    arena_chunks: int = 192  # that kvkern has room for
    times: int = 4  # as many distinct chunks in all requests together
    conversations: int = 14  # open at a time
    thinking_spread: float = 0.7  # sigma of the log-normal time between turns
    opening_tokens: tuple[int, int] = (256, 512)
    turn_tokens: tuple[int, int] = (32, 96)
    end_share: float = 0.1  # of turns that are a conversation's last
    document_share: float = 0.25  # of requests
    document_tokens: tuple[int, int] = (512, 1024)
    natives: int = 3  # conversations that vLLM holds once more by itself, to compare
    seed: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured. Every engine cuts its documents from the same text in the same order."""

    short_tokens: int = 2000
    long_tokens: int = 8000
    long_runs: int = 3
    pairs: int = 9  # of kvkern hit and native hit, per document
    overcommit_prompts: int = 16  # of short_tokens each: together far above the pool
    reply_tokens: int = 8
    turns: int = 4  # of the conversation
    turn_tokens: int = 500  # that the user adds in each turn
    turn_reply_tokens: int = 40
    float32_prompts: int = 2
    node_pairs: int = 5  # as pairs, but through a daemon
    mix: MixedWorkload = MixedWorkload()


class Job(msgspec.Struct, frozen=True):
    """One engine process: start the engine, run the phase, stop."""

    phase: str  # a key of phases.PHASES
    engine: EngineSpec
    plan: Plan
    until: str | None = None  # a path: the engine stays up after its phase until it exists
    salt: str | None = None  # of every request that has none of its own: a tenant that no earlier run was


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line for the person who waits."""

    text: str


class Answer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One request and what came back. Equal `prompt_id` means equal prompt tokens."""

    case: str
    prompt_id: str
    prompt_tokens: int
    cached_tokens: int  # not computed: from vLLM's own cache and from kvkern
    loaded_tokens: int  # of these, from kvkern
    remote_tokens: int = 0  # that the daemon read from its remote store meanwhile, where it was asked
    ttft_s: float  # client's wall clock, from handing the request over to the first token
    tokens: tuple[int, ...]  # greedy
    logprobs: tuple[tuple[tuple[int, float], ...], ...]  # per token: the best five as (token, log-probability)


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The phase is complete; the engine stays up until the job's `until` exists."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The phase is complete; without it the process has failed."""

    start_s: float  # the engine's start, imports included


Event = Progress | Answer | Ready | Done


def encode(message: Job | Event) -> bytes:
    """Return one line, newline included. Floats survive the trip bit for bit."""
    return msgspec.json.encode(message) + b"\n"


def decode_event(line: bytes) -> Event:
    """Return the event of one line; raises msgspec.DecodeError for anything else."""
    event: Event = msgspec.json.decode(line, type=Event)
    return event


def decode_job(line: bytes) -> Job:
    """Return the job of one line; raises msgspec.DecodeError for anything else."""
    return msgspec.json.decode(line, type=Job)
