"""The messages between the demo and its engine processes: one JSON line per message. Knows shapes; knows nothing of vLLM.

parent -> child   one Job on stdin
child -> parent   Progress | Answer ... Done, on a pipe of its own, because stdout belongs to vLLM
"""

from __future__ import annotations

import msgspec

BLOCK_TOKENS = 128
WARM_UP_TOKENS = (16, 256)  # prompts of an engine before it is measured


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How one vLLM engine is started."""

    model: str  # folder
    dtype: str = "bfloat16"
    kvkern_capacity: str | None = None  # capacity of an embedded cache
    kvkern_policy: str | None = None  # eviction policy of an embedded cache; None: the default
    kvkern_socket: str | None = None  # socket of a daemon; without capacity and socket the engine is vLLM alone
    kv_pool_nbytes: int  # size of vLLM's own KV pool
    block_tokens: int = BLOCK_TOKENS
    max_model_tokens: int = 12_288
    max_batched_tokens: int = 2048


class MixedWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """Describes the requests of mixed_workload.py. Ranges are in tokens, both ends included."""

    chunk_tokens: int = 32  # also the length of vLLM's blocks in these engines
    arena_chunks: int = 192  # how many chunks kvkern's arena holds
    times: int = 4  # all requests together have this many times `arena_chunks` distinct chunks
    conversations: int = 14  # open at a time
    thinking_spread: float = 0.7  # sigma of the log-normal time between turns
    opening_tokens: tuple[int, int] = (256, 512)
    turn_tokens: tuple[int, int] = (32, 96)
    end_share: float = 0.1  # share of turns that are a conversation's last
    document_share: float = 0.25  # share of requests that are documents
    document_tokens: tuple[int, int] = (512, 1024)
    natives: int = 3  # conversations that vLLM repeats without kvkern, for comparison
    seed: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured. Every engine cuts its documents from the same text in the same order."""

    short_tokens: int = 2000
    long_tokens: int = 8000
    long_runs: int = 3
    pool_tokens: int = 127 * 128  # vLLM's own KV pool: a long document fits, the overcommit prompts do not
    block_tokens: int = BLOCK_TOKENS  # length of vLLM's blocks and kvkern's chunks
    pairs: int = 9  # of kvkern hit and native hit, per document
    overcommit_prompts: int = 16  # each of short_tokens; together far larger than vLLM's pool
    reply_tokens: int = 8
    turns: int = 4  # turns of the conversation
    turn_tokens: int = 500  # tokens that the user adds in each turn
    turn_reply_tokens: int = 40
    float32_prompts: int = 2
    float32_tokens: int = 400
    question_reply_tokens: int = 32
    node_pairs: int = 5  # like `pairs`, but through a daemon
    mix: MixedWorkload | None = MixedWorkload()  # None: the policies are not compared
    mix_on_small_model: bool = (
        False  # the policies are compared on model.SMALL, because the demo's model is too slow here
    )

    @property
    def longest_tokens(self) -> int:
        """Return the length of the longest prompt or conversation, replies included."""
        talk = self.turns * (self.turn_tokens + self.turn_reply_tokens) + self.reply_tokens
        return max(self.long_tokens + self.reply_tokens, talk, self.float32_tokens + self.reply_tokens)


class Job(msgspec.Struct, frozen=True):
    """One engine process: start the engine, run the phase, stop."""

    phase: str  # a key of phases.PHASES
    engine: EngineSpec
    plan: Plan
    until: str | None = None  # a path: after its phase the engine stays up until this file exists
    salt: str | None = (
        None  # cache salt of every request without one; new in each run, so that no run finds older chunks
    )


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A line of progress for the terminal."""

    text: str


class Answer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One request and its reply. Equal `prompt_id` means equal prompt tokens."""

    case: str
    prompt_id: str
    prompt_tokens: int
    cached_tokens: int  # not computed: from vLLM's own cache and from kvkern
    loaded_tokens: int  # of these, from kvkern
    remote_tokens: int = (
        0  # tokens that the daemon read from its remote store meanwhile; 0 where the phase does not ask it
    )
    ttft_s: float  # client's wall clock, from handing the request over to the first token
    tokens: tuple[int, ...]  # greedy
    logprobs: tuple[tuple[tuple[int, float], ...], ...]  # per token: the best five as (token, log-probability)


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The phase is complete; the engine stays up until the job's `until` exists."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The phase is complete. A process that ends without this message has failed."""

    start_s: float  # duration of the engine's start, imports included


Event = Progress | Answer | Ready | Done


def encode(message: Job | Event) -> bytes:
    """Return one line, newline included. Floats survive the trip bit for bit."""
    return msgspec.json.encode(message) + b"\n"


def decode_event(line: bytes) -> Event:
    """Decode one line into an event. Raises msgspec.DecodeError if the line is no event."""
    event: Event = msgspec.json.decode(line, type=Event)
    return event


def decode_job(line: bytes) -> Job:
    """Decode one line into a job. Raises msgspec.DecodeError if the line is no job."""
    return msgspec.json.decode(line, type=Job)
