"""What a worker process is asked, other than to train (there the run folder says it all): one frozen value a kind.

The light side resolves names (runs, adapters, bases) before it asks: a request holds folders and hashes, never names
that still have to be looked up. Each class docstring lists the events that answer it. This module does not know how
requests travel (processes) nor how they are answered (pipeline).

Every event is one JSON object with its `kind`; besides those listed, `phase` {name, detail}, `progress` {what, done,
total}, `warning` {code, text} and `finished` {} may come with any work; `error` {code, what, got, hint} ends it.
"""

from __future__ import annotations

from typing import Any, Literal

from tenon.bases.facts import ModelFacts
from tenon.plan.values import BasePlan, DataPlan, Frozen, MachineFacts, Plan, Precision
from tenon.values import Value

# One chat message in the OpenAI form: role, content, and where present tool_calls, tool_call_id, name,
# reasoning_content.
Message = dict[str, Any]


class Subject(Value):
    """Who answers: the bare base (no folder) or one adapter.

    label: `base`, `name@version`, or the name of a run's slot: how results and `/adapter` call it.
    folder: PEFT layout (adapter_config.json, adapter_model.safetensors). template_hash: what it was trained with; a
    renderer that differs refuses it ("" when unknown: adapters made elsewhere). template: file of its own chat
    template, where it has one. system: the system message that it was trained with; conversations that bring none get
    it.
    stop_tokens: tokens, as text, that end its answers beside those of the template.
    """

    label: str
    folder: str | None = None
    adapter_hash: str | None = None
    template_hash: str = ""
    template: str | None = None
    system: str | None = None
    stop_tokens: tuple[str, ...] = ()


class Sampling(Value):
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Engine(Value):
    """The base and how it computes: what every request but `InspectRequest` needs to load a decoder.

    frozen: what its linear layers are kept in. template: file of a chat template instead of the tokenizer's.
    """

    base: BasePlan
    machine: MachineFacts
    precision: Precision = "fp32"
    frozen: Frozen = Frozen()
    template: str | None = None

    @property
    def facts(self) -> ModelFacts:
        """The base's architecture."""
        return self.base.facts


class InspectRequest(Value):
    """Look at the data of a plan as training would see it, without a model.

    Events, per slot: `report` {slot, report: DataReport as JSON}; `row` {slot, source, pieces: [[text, supervised], …],
    tokens, supervised}, at most `rows` of them, spread over the training rows.
    """

    plan: Plan
    rows: int = 5


class CheckRequest(Value):
    """Run every kernel check but those in `done` (their keys): a kernel that ends its worker is not run again.

    Events: `machine` {machine: MachineRecord as JSON}; per check `progress` {what, done, total, key, device, bound,
    instead}, then `check` {key, name, device, state: works | wrong | fails | absent, error, bound, text, instead,
    seconds}. Without `finished` at the end the rest has to be asked of another worker.
    """

    done: tuple[str, ...] = ()


class EvaluateRequest(Value):
    """Judge subjects on the same rows, in order; the base is loaded once.

    data, side: the rows to judge are this side of the data; they are rendered as the plan says. metrics empty: chosen
    by the kind of rows. rows: at most so many, 0 for all. Events, per subject: `result` {result: Result as JSON}.
    """

    engine: Engine
    subjects: tuple[Subject, ...]
    data: DataPlan
    side: Literal["train", "validation"] = "train"
    metrics: tuple[str, ...] = ()
    rows: int = 0
    max_new_tokens: int = 256
    seed: int = 0


class Prompt(Value):
    """One conversation that waits for an answer; source: `file:line`."""

    source: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class GenerateRequest(Value):
    """Answer many prompts in batches. Events: `completion` {index, text, tokens, finish}, in any order."""

    engine: Engine
    subject: Subject
    prompts: tuple[Prompt, ...]
    sampling: Sampling


class ForeignEngine(Value):
    """An engine that is not ours, in a Python environment of its own.

    python: its interpreter. version: of the engine's package. options: further words of its command line.
    """

    kind: Literal["vllm"] = "vllm"
    python: str
    version: str
    options: tuple[str, ...] = ()


class EngineRequest(Value):
    """Make sequences for the front of a server until standard input ends; jobs come there, a line each.

    Signals do not end it: its front does. Events: `ready` {}, then `pass` (see serve.job_lines).
    """

    engine: Engine
    slots: int = 8
    adapter_bytes: int = 2 << 30
    adapter_wait_seconds: float = 5.0
    rows: int = 16
    context_tokens: int = 4096
    cache_bytes: int = 2 << 30


class Seat(Value):
    """Where one engine of several computes. visible_devices: its GPU, as CUDA_VISIBLE_DEVICES says it; None on a CPU,
    where the machine's threads are its share.
    """

    machine: MachineFacts
    visible_devices: str | None = None


class Replicas(Value):
    """Engines in processes of their own: at least `least`, at most as many as there are seats.

    up_delay_seconds: a wait for a place that brings another engine when it lasts for up_seconds; one goes when there
    was no wait for down_seconds and it can go unmissed. silence_seconds: an engine that is not heard of for so long is
    replaced.
    """

    seats: tuple[Seat, ...]
    least: int = 1
    up_delay_seconds: float = 1.0
    up_seconds: float = 5.0
    down_seconds: float = 60.0
    silence_seconds: float = 120.0


class ServeRequest(Value):
    """Answer requests over HTTP until SIGTERM; then what runs is finished and the worker ends with 0.

    name: what clients call the base. port: 0 takes a free one. slots: adapters in the bank at a time; adapter_bytes:
    host memory for more of them; adapter_wait_seconds: how long one waits before a slot is closed for it. rows: most
    sequences at a time. context_tokens: the longest, prompt and answer together. cache_bytes: of all keys and values;
    when they are full, the youngest sequence waits. queue: sequences that may wait besides. drain_seconds: what runs
    may take so long to finish. foreign: who makes the sequences instead of this package. cors: origins of web pages
    that may ask, `*` for any. log: a file for a line of JSON for each request, `-` for events; log_prompts: with its
    prompts. trace: spans to `Settings.otlp_endpoint`. replicas: engines in processes of their own, each with such
    slots, rows and cache; None has one in the server's own process. SIGUSR1 then replaces them, one after the other.
    manage_port: of the management API, 0 takes a free one; None: there is none.
    Events: `ready` {url, manage, name, rows, context_tokens, slots, replicas}; with log `-`, `request` {id, status, …}
    for each; `warning` for engines that are lost; `scale` {engines, text}.
    """

    engine: Engine
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    adapter_bytes: int = 2 << 30
    adapter_wait_seconds: float = 5.0
    rows: int = 16
    context_tokens: int = 4096
    cache_bytes: int = 2 << 30
    queue: int = 1024
    most_body_bytes: int = 4 << 20
    drain_seconds: float = 30.0
    foreign: ForeignEngine | None = None
    cors: tuple[str, ...] = ()
    log: str | None = None
    log_prompts: bool = False
    trace: bool = False
    replicas: Replicas | None = None
    manage_host: str = "127.0.0.1"
    manage_port: int | None = None


class ChatStart(Value):
    """First request of a conversation: load the base and these adapters (more can come with any turn).

    Event: `ready` {adapters: [labels]}.
    """

    kind: Literal["start"] = "start"
    engine: Engine
    subjects: tuple[Subject, ...] = ()


class ChatTurn(Value):
    """Answer one conversation. A subject that is not loaded yet is loaded; the base stays as it is.

    Events: `token` {text} as they come (text may be empty while a character is incomplete), then `answer` {text,
    tokens, finish: stop | length | interrupted, seconds}. While it runs, the emit callback raises StopRequestedError
    when the user interrupts: the conversation goes on with the next turn.
    """

    kind: Literal["turn"] = "turn"
    subject: Subject
    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()


ChatRequest = ChatStart | ChatTurn
