"""`tenon chat` and `tenon generate`: talk to a base or an adapter, one turn at a time or a file at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tenon.cli.session import Session, session_of

AdapterName = Annotated[
    str | None,
    typer.Argument(metavar="ADAPTER", help="NAME or NAME@VERSION, a run, or a PEFT folder; none is the bare base."),
]
BaseSpec = Annotated[
    str | None, typer.Option("--base", help="Base to talk to; by default the adapter's own, or the embedded one.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens up to this.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0 is all.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Start of all randomness.")]


def chat(
    ctx: typer.Context,
    adapter: AdapterName = None,
    base: BaseSpec = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message; by default the adapter's own.")
    ] = None,
    say: Annotated[
        list[str] | None, typer.Option("--say", help="A line to say instead of asking for one; may be given again.")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
) -> None:
    """Talk in the terminal; `/adapter NAME` switches adapters without loading the base again, `/help` says the rest."""
    from tenon.cli.chat_loop import Chat, Names
    from tenon.cli.live import make_view
    from tenon.plan.requests import Sampling
    from tenon.service.conversation import Conversation
    from tenon.service.subjects import adapters_for, find_adapter, open_subject

    session = session_of(ctx)
    settings = session.settings
    opened = open_subject(adapter, base, settings)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with Conversation(opened.engine, settings) as conversation:
        with make_view(session.err, quiet=bool(say)) as view:
            conversation.open([opened.subject] if opened.subject.folder else [], view.take)
        loop = Chat(
            conversation,
            Names(
                find=lambda name: find_adapter(name, opened.engine.base, settings),
                known=lambda: adapters_for(opened.engine.base, settings),
            ),
            session.out,
            session.err,
            subject=opened.subject,
            sampling=sampling,
            system=system,
        )
        for line in _lines(session, say):
            if not loop.take(line):
                break


def generate(
    ctx: typer.Context,
    *,
    adapter: AdapterName = None,
    input_file: Annotated[
        Path, typer.Option("--input", help="Prompts: .txt, one a line; or .jsonl, {prompt} or {messages} a line.")
    ],
    output_file: Annotated[Path, typer.Option("--output", help="Answers as JSONL, in the order of the prompts.")],
    base: BaseSpec = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="System message for prompts without one; by default the adapter's own."),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
) -> None:
    """Answer a file of prompts, in batches. The output appears when all of it is there."""
    from tenon.cli.live import make_view
    from tenon.plan.requests import GenerateRequest, Sampling
    from tenon.service.generation import generate_answers, read_prompts, write_answers
    from tenon.service.subjects import open_subject

    session = session_of(ctx)
    opened = open_subject(adapter, base, session.settings)
    prompts = read_prompts(input_file, system=system or "")
    subject = opened.subject if system is None else opened.subject.model_copy(update={"system": None})
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    request = GenerateRequest(engine=opened.engine, subject=subject, prompts=prompts, sampling=sampling)
    with make_view(session.err) as view:
        answers = generate_answers(request, session.settings, view.take)
    write_answers(output_file, prompts, answers)
    session.err.print(f"{len(answers):,} answers in {output_file}")


def _lines(session: Session, say: list[str] | None) -> Iterator[str]:
    """The given lines, or those that are typed until Ctrl-D."""
    from rich.text import Text

    if say:
        for line in say:
            session.out.print(Text.assemble(("you: ", "bold cyan"), line), soft_wrap=True)
            yield line
        return
    session.err.print(Text("type a message; /help lists commands, Ctrl-D ends", "dim"))
    while True:
        try:
            yield session.err.input(Text("you: ", "bold cyan"))
        except EOFError:
            session.err.print()
            return
