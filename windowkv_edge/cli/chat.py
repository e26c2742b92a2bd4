"""``windowkv-edge chat``: an interactive chat with a compacted cache."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console
from rich.table import Table

from windowkv_edge import POLICIES, Llama, UnsupportedModelError, WindowKVError
from windowkv_edge._files import check_output, open_own
from windowkv_edge._text import for_markup, for_terminal
from windowkv_edge.gguf_info import GGUFInfo
from windowkv_edge.repeating import ASKED_QUERIES, AskedQuery

from .bars import prompt_bar
from .common import (
    CLIError,
    load,
    mib,
    open_model,
    parse_budget,
    parse_checkpoints,
    parse_limit,
    parse_policy,
    read_text,
    reports_errors,
)
from .reading import cells_text, how_read, shifts, why_too_long

__all__ = ["Chat", "chat"]

Message = dict[str, str]


@reports_errors
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or 'smollm2' (fetched once).")],
    policy: Annotated[str, typer.Option(help="The KV policy.")] = "auto",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Cells that stay: 0.12, 12%, or a number of cells per head. Default: 0.12, with --limit what fits."
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(help="What the cells may take at every moment: a number per head (4096), or bytes (512MiB)."),
    ] = None,
    query: Annotated[
        str, typer.Option(help="What cells are kept for: the last question, any question, both, or auto.")
    ] = "auto",
    ctx: Annotated[int, typer.Option(min=256, help="Positions that the conversation may have.")] = 8192,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply at most.")] = 512,
    checkpoints: Annotated[
        str, typer.Option(help="Host memory for /edit, /undo and /regenerate: auto, bytes (256MiB), or 0.")
    ] = "auto",
    session: Annotated[
        Path | None,
        typer.Option(help="Go on from this file, if it is there, and save the conversation to it at the end."),
    ] = None,
) -> None:
    """Chat with a model. /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves."""
    kv_policy, kv_budget = parse_policy(policy), None if budget is None else parse_budget(budget)
    kv_limit, kv_checkpoints = None if limit is None else parse_limit(limit), parse_checkpoints(checkpoints)
    kv_query = _parse_query(query, "--query")
    if session is not None:
        check_output(session, "--session")
    info = open_model(model)
    console = Console()
    if 0 < info.n_ctx_train < ctx:
        lowered = f"{info.path.name} was trained on {info.n_ctx_train:,} positions; --ctx is lowered to that"
        typer.echo(for_terminal(lowered), err=True)
        ctx = info.n_ctx_train
    llm = _load(info, ctx, threads, kv_policy, kv_budget, kv_limit, kv_checkpoints=kv_checkpoints, kv_query=kv_query)
    try:
        talk = Chat(llm, console, system=system, temperature=temperature, max_tokens=max_tokens, session=session)
        within = "" if limit is None else f" within {limit}"
        about = f"{info.path.name}, {kv_policy.name} at {budget or llm.kv_budget}{within}, {ctx:,} positions"
        talk.note(f"{about}; /help lists the commands")
        if not talk.has_template:
            talk.note("the model has no chat template; the conversation is sent as 'User:' and 'Assistant:' lines")
        if session is not None and session.exists():
            talk.load("")
        try:
            talk.run(_reader(console))
        finally:  # whatever ends it
            if session is not None:
                talk.save("")
    finally:
        llm.close()


def _parse_query(text: str, option: str) -> AskedQuery:
    if text not in ASKED_QUERIES:
        raise CLIError(f"{option} is {text!r}, expected one of {', '.join(ASKED_QUERIES)}")
    return text


def _load(info: GGUFInfo, *args: Any, **options: Any) -> Llama:
    """A session that goes on behind its context, where the model's positions can be moved."""
    try:
        return load(Llama, info, *args, kv_shift="shift", **options)
    except UnsupportedModelError as error:
        if "kv_shift" not in str(error):
            raise
        return load(Llama, info, *args, **options)


class Chat:
    """The messages so far and the session that answers them.

    Args:
        llm: a session with a policy.
        console: where replies and messages go.
        system: system message, None for the template's own.
        temperature: 0 is greedy.
        max_tokens: tokens of a reply at most.
        session: file of /save and /load without one.
    """

    def __init__(
        self,
        llm: Llama,
        console: Console,
        *,
        system: str | None = None,
        temperature: float = 0.7,
        max_tokens: int = 512,
        session: Path | None = None,
    ) -> None:
        self.llm = llm
        self.session = session
        self.console = console
        self.system = system
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.has_template = "tokenizer.chat_template" in llm.metadata
        self.attached: list[str] = []
        self.messages: list[Message] = []
        self.typed: list[str] = []  # the messages of the user, without the files in front of them
        self._forget()

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer until the end of the input or /quit."""
        while True:
            try:
                line = read()
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line.strip():
                    self.say(line)
            except KeyboardInterrupt:
                self.note("/quit or Ctrl-D leaves")
            except EOFError:
                return

    #
    # a turn
    #

    def say(self, text: str) -> None:
        """Send a message with the attached files, print the reply as it comes, keep both."""
        attached, self.attached = self.attached, []
        message = {"role": "user", "content": "\n\n".join([*attached, text])}
        if self._answer([*self.messages, message], [*self.typed, text], "the message is dropped"):
            self.attached = attached

    def _answer(self, messages: list[Message], typed: list[str], otherwise: str) -> bool:
        """Make this the conversation, and add the reply to it. Without a reply it stays what it was.

        Args:
            messages: the last one is the user's.
            typed: see there.
            otherwise: what to say of the message where it gets no reply.

        Returns:
            Whether Ctrl-C came before the reply.
        """
        before, self.messages, self.typed = (self.messages, self.typed), messages, typed
        try:
            reply, interrupted = self._reply()
        except Exception as error:  # chat templates raise what they like
            self.messages, self.typed = before
            if not isinstance(error, ValueError):  # an evaluation may have failed half-way
                self.llm.reset()
            self.note(f"the message was not answered, {otherwise}: {self._explain(error)}")
            return False
        if interrupted and not reply:
            self.messages, self.typed = before
            self.note(f"stopped before the reply began; {otherwise}")
            return True
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        if interrupted:
            self.note("stopped; the reply so far stays in the conversation")
        return False

    def _reply(self) -> tuple[str, bool]:
        """The reply, printed while it comes, and whether Ctrl-C stopped it."""
        reply, finish, n_first, start = "", None, 0, 0.0
        n_shifted = self.llm.kv_stats().n_shifted
        try:
            with contextlib.closing(self._stream()) as stream:
                with prompt_bar(self.llm, self.console, "reading"):
                    piece, finish = next(stream, ("", "stop"))
                n_first, start = self._n_read(), time.perf_counter()
                while True:
                    self.console.out(for_terminal(piece if reply else piece.lstrip(" "), keep="\n\t"), end="")
                    reply += piece
                    following = next(stream, None)
                    if following is None:
                        break
                    piece, finish = following[0], following[1] or finish
        except KeyboardInterrupt:
            self.console.out("")
            self._after_shift(n_shifted)
            return reply, True
        self.console.out("")
        self._after_reply(finish, self._n_read() - n_first, time.perf_counter() - start)
        self._after_shift(n_shifted)
        return reply, False

    def _n_read(self) -> int:
        """Tokens of the conversation that were evaluated, given up ones included."""
        return self.llm.n_tokens + self.llm.kv_stats().n_shifted

    def _after_shift(self, n_before: int) -> None:
        n = self.llm.kv_stats().n_shifted - n_before
        if n > 0:
            self.note(f"the context was full: the oldest {n:,} tokens of the conversation were given up")

    def _stream(self) -> Generator[tuple[str, str | None], None, None]:
        """Pieces of the reply; with the last one the reason why it ended."""
        options: dict[str, Any] = {"stream": True, "temperature": self.temperature, "max_tokens": self.max_tokens}
        llm: Any = self.llm
        if self.has_template:
            for chunk in llm.create_chat_completion(self.messages, **options):
                choice = chunk["choices"][0]
                yield choice["delta"].get("content") or "", choice["finish_reason"]
        else:
            for chunk in llm.create_completion(plain_prompt(self.messages), stop=["\nUser:"], **options):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]

    def _after_reply(self, finish: str | None, n_timed: int, seconds: float) -> None:
        stats = self.llm.kv_stats()
        speed = f"{1e3 * seconds / n_timed:.1f} ms per token, " if n_timed > 0 else ""
        self.note(f"{speed}KV {mib(stats.bytes_live)} MiB, {mib(stats.bytes_full)} MiB if every cell stayed")
        if finish == "length":
            is_full = not shifts(self.llm) and self.llm.n_tokens >= self.llm.n_ctx() - 1
            self.note("the context is full; /reset begins anew" if is_full else f"cut after {self.max_tokens} tokens")

    def _explain(self, error: Exception) -> str:
        """Too long a prompt in our words, everything else as it comes."""
        sizes = re.search(r"\((\d+)\) exceed context window", str(error))
        if sizes is None:
            return f"{error}"
        return (
            f"the conversation would have {int(sizes[1]):,} tokens, the context holds {self.llm.n_ctx():,}; "
            "send less, /reset, or start with a larger --ctx"
        )

    #
    # commands
    #

    def command(self, line: str) -> bool:
        """Run a line that begins with "/"; False ends the chat."""
        name, _, argument = line[1:].strip().partition(" ")
        if name == "quit":
            return False
        commands = {
            "regenerate": self.regenerate, "edit": self.edit, "undo": self.undo, "stats": self.stats,
            "reset": self.reset, "policy": self.policy, "limit": self.limit, "query": self.query, "file": self.file,
            "save": self.save, "load": self.load, "help": self.help,
        }  # fmt: skip
        if name not in commands:
            self.note(f"unknown command /{name}, expected one of {', '.join(COMMANDS)}")
            return True
        try:
            commands[name](argument.strip())
        except WindowKVError as error:
            self.note(str(error))
        return True

    def regenerate(self, _: str) -> None:
        """Another answer to the last message."""
        last = self._last_question("/regenerate")
        self._answer(self.messages[: last + 1], self.typed, "the conversation stays as it was")

    def edit(self, argument: str) -> None:
        """Say something else instead of the last message, behind the same files, and get an answer to that."""
        if not argument:
            raise CLIError("/edit without a text, expected /edit TEXT")
        last = self._last_question("/edit")
        files = self.messages[last]["content"].removesuffix(self.typed[-1])
        message = {"role": "user", "content": files + argument}
        self._answer([*self.messages[:last], message], [*self.typed[:-1], argument], "the conversation stays as it was")

    def undo(self, _: str) -> None:
        """Take the last message and its answer back."""
        last = self._last_question("/undo")
        self.messages, self.typed = self.messages[:last], self.typed[:-1]
        self.note("your last message and its answer are forgotten")

    def _last_question(self, command: str) -> int:
        """Where the user's last message stands."""
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise CLIError(f"{command}: nothing was said yet")

    def stats(self, _: str) -> None:
        """Print what the cache holds."""
        stats = self.llm.kv_stats()
        table = Table(show_header=False)
        table.add_row("policy", for_markup(f"{stats.policy}, budget {self.llm.kv_budget}"))
        table.add_row("cells are kept for", KEPT_FOR[stats.query])
        if stats.n_replayed:
            table.add_row("positions repeated", f"{stats.n_replayed:,}")
        table.add_row("positions seen", f"{stats.n_past:,} of {self.llm.n_ctx():,}")
        table.add_row("of the last prompt", f"{stats.n_evaluated_last:,} evaluated, {stats.n_reused_last:,} reused")
        if stats.miss:
            table.add_row("", for_markup(stats.miss))
        table.add_row("of all prompts", f"{stats.n_evaluated:,} evaluated, {stats.n_reused:,} reused")
        cells = f"{stats.cells.min():,} min, {stats.cells.mean():,.1f} mean, {stats.cells.max():,} max"
        table.add_row("cells per head", cells)
        table.add_row("KV cache", f"{mib(stats.bytes_live)} MiB")
        table.add_row("if every cell stayed", f"{mib(stats.bytes_full)} MiB")
        table.add_row("peak so far", f"{mib(stats.bytes_peak)} MiB")
        n_mib = mib(stats.bytes_checkpoints)
        table.add_row("states to go back to", f"{stats.n_checkpoints}, {n_mib} MiB of host memory")
        table.add_row("compactions", f"{stats.n_compactions}")
        if stats.n_compactions:
            table.add_row("last compaction", f"{stats.t_score_ms:.1f} ms scoring, {stats.t_compact_ms:.1f} ms moving")
            table.add_row("", f"{mib(stats.bytes_released)} MiB released")
        self.console.print(table)

    def reset(self, _: str) -> None:
        """Forget the conversation and the attached files."""
        self._forget()
        self.note("the conversation is forgotten")

    def policy(self, argument: str) -> None:
        """Change the policy and the budget, or list the policies."""
        name, _, budget = argument.partition(" ")
        if not name:
            table = Table("", "policy", "paper")
            for each in POLICIES.values():
                is_now = self.llm.kv_policy is not None and each.name == self.llm.kv_policy.name
                table.add_row("*" if is_now else "", each.name, each.paper)
            self.console.print(table)
            return
        kv_policy = parse_policy(name)
        kv_budget = parse_budget(budget.strip()) if budget.strip() else self.llm.kv_budget
        try:
            self.llm.kv_policy, self.llm.kv_budget = kv_policy, kv_budget
        except ValueError as error:
            raise CLIError(f"{error}") from None
        self.note(f"policy {name}, budget {kv_budget}; the conversation is evaluated anew with your next message")

    def limit(self, argument: str) -> None:
        """Bound the cells, or no longer, or say how they are bounded."""
        if argument:
            try:
                self.llm.kv_limit = None if argument == "off" else parse_limit(argument)
            except ValueError as error:  # too small
                raise CLIError(str(error)) from None
        limit = self.llm.kv_limit
        self.note(
            f"{'no limit' if limit is None else cells_text(limit)}, budget {self.llm.kv_budget}; "
            "/limit N, /limit 512MiB or /limit off changes it"
        )

    def query(self, argument: str) -> None:
        """Say which question cells are kept for, or change it."""
        if argument:
            try:
                self.llm.kv_query = _parse_query(argument, "/query")
            except ValueError as error:  # of the policy, or of the limit
                raise CLIError(str(error)) from None
        kept_for = KEPT_FOR[self.llm.kv_stats().query]
        self.note(f"cells are kept for {kept_for}; /query last, any, both or auto changes it for what you say next")

    def file(self, argument: str) -> None:
        """Add a text file to the next message, and say how it will be read."""
        if not argument:
            raise CLIError("/file without a path, expected /file PATH")
        text = read_text(Path(argument.strip("'\"")).expanduser()).strip()
        n_tokens = len(self.llm.tokenize(text.encode(), add_bos=False))
        waiting = sum(len(self.llm.tokenize(own.encode(), add_bos=False)) for own in self.attached)
        if (why := why_too_long(self.llm, waiting + n_tokens)) is not None:
            raise CLIError(f"{n_tokens:,} tokens, not added: {why}")
        self.attached.append(text)
        self.note(f"{n_tokens:,} tokens, sent with your next message; {how_read(self.llm, waiting + n_tokens)}")

    def save(self, argument: str) -> None:
        """Write the conversation and its cache to a file."""
        path = self._session_file("/save", argument)
        self.llm.kv_save(path, extra={"messages": self.messages, "attached": self.attached, "typed": self.typed})
        self.note(f"saved to {path}, {mib(path.stat().st_size)} MiB; it holds the text of the conversation")

    def load(self, argument: str) -> None:
        """Go on from a file of /save."""
        path = self._session_file("/load", argument)
        before = self.llm.save_state()
        try:
            extra = self.llm.kv_load(path)
        except OSError as error:
            raise CLIError(f"cannot read {path}: {error.strerror or error}") from None
        messages: Any = extra.get("messages")
        attached: Any = extra.get("attached")
        if not _is_conversation(messages) or not _are_texts(attached):
            self.llm.load_state(before)
            raise CLIError(f"{path} holds a session, but no conversation; load it with Llama.kv_load()")
        self.messages, self.attached = messages, attached
        said = [message["content"] for message in messages if message["role"] == "user"]
        typed: Any = extra.get("typed")
        # without it files count as what was typed
        known = _are_texts(typed) and len(typed) == len(said) and all(map(str.endswith, said, typed))
        self.typed, n_turns = typed if known else said, len(said)
        self.note(f"{n_turns} messages of yours, {self.llm.n_tokens:,} tokens, budget {self.llm.kv_budget}")

    def _session_file(self, command: str, argument: str) -> Path:
        if argument:
            return Path(argument.strip("'\"")).expanduser()
        if self.session is None:
            raise CLIError(f"{command} without a file, expected {command} FILE, or start with --session FILE")
        return self.session

    def help(self, _: str) -> None:
        """List the commands."""
        table = Table.grid(padding=(0, 2))
        for name, meaning in COMMANDS.items():
            table.add_row(name, meaning)
        self.console.print(table)

    def _forget(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.attached, self.typed = [], []
        self.llm.reset()

    def note(self, text: str) -> None:
        self.console.print(for_terminal(text), style="dim", markup=False, highlight=False, soft_wrap=True)


KEPT_FOR = {"last": "the last question", "any": "any question", "both": "the last question and any other"}

COMMANDS = {
    "/regenerate": "another answer to your last message",
    "/edit": "TEXT takes the place of your last message; its files stay",
    "/undo": "takes your last message and its answer back",
    "/stats": "what the KV cache holds",
    "/reset": "forget the conversation",
    "/policy": "NAME [BUDGET] changes the KV policy, alone it lists them",
    "/limit": "[N | 512MiB | off] bounds the cells: so many per head, or bytes",
    "/query": "[last | any | both | auto] what cells are kept for: your last question, any, or both",
    "/file": "PATH adds a text file to the next message",
    "/save": "[FILE] writes the conversation and its cache",
    "/load": "[FILE] goes on from there",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops a reply",
}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
        for message in value
    )


def plain_prompt(messages: list[Message]) -> str:
    """The conversation as text, for models without a chat template."""
    names = {"system": "", "user": "User: ", "assistant": "Assistant:"}
    return "".join(f"{names[m['role']]}{m['content']}\n" for m in messages) + "Assistant:"


def _reader(console: Console) -> Callable[[], str]:
    """The next line: with editing and a history on a terminal, else from the standard input, echoed."""
    if not sys.stdin.isatty():

        def read() -> str:
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:  # nobody is there to press Ctrl-D
                raise EOFError from None
            if not line:
                raise EOFError
            console.out(for_terminal(f"> {line}", keep="\n\t"), end="")
            return line.rstrip("\n")

        return read

    session: PromptSession[str] = PromptSession(
        history=_history(), completer=WordCompleter(list(COMMANDS), sentence=True), complete_while_typing=False
    )
    return lambda: session.prompt("> ")


def _history() -> History:
    path = Path(platformdirs.user_state_dir("windowkv-edge")) / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        open_own(path).close()  # not a link, not a FIFO
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
