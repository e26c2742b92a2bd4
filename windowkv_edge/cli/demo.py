"""``windowkv-edge demo``: one question about a long text, with the full cache and with a policy."""

from __future__ import annotations

import contextlib
import io
import shlex
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import typer
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llama_cpp.llama_cpp import llama_vocab_is_eog
from rich.console import Console
from rich.table import Table

from windowkv_edge import Llama, _json
from windowkv_edge._memory import rss
from windowkv_edge._text import for_markup, for_terminal
from windowkv_edge.gguf_info import GGUFInfo, support
from windowkv_edge.llama import DEFAULT_MIN_PROMPT
from windowkv_edge.session import PolicyCache

from .bars import prompt_bar
from .common import (
    SMOLLM2,
    CLIError,
    load,
    mib,
    open_model,
    parse_budget,
    parse_limit,
    parse_policy,
    read_text,
    reports_errors,
)

__all__ = ["demo"]

DATA = Path(__file__).resolve().parent.parent / "data"

# an answer may be two tokens long; so many decodes are timed at least
_MIN_TIMED = 16
_MIN_CPU_SHARE = 0.75


@dataclass(frozen=True)
class Question:
    """What is asked. ``lead`` begins the answer, and a right answer holds ``expected``; both are "" if unknown."""

    text: str
    lead: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Run:
    """One side of the comparison. Cells and bytes are those after the prompt, before anything was generated.

    ``cpu_share`` is the processor time that the threads got while decoding, divided by what they could have used. If it
    is well below 1, other programs kept the processor busy and the times are too long.
    """

    policy: str
    answer: str
    correct: bool | None
    n_prompt: int
    cells_min: int
    cells_mean: float
    cells_max: int
    bytes_live: int
    bytes_full: int
    bytes_peak: int
    prefill_s: float
    compaction_ms: float
    decode_ms: float
    n_timed: int
    cpu_share: float
    rss_change: int | None


class _WatchedLlama(Llama):
    """Notes how the resident memory changes while the cache is compacted."""

    rss_change: int | None = None

    def _prompt_ended(self, cache: PolicyCache, *args: Any, **kwargs: Any) -> None:
        before, n_before = rss(), cache.kv.stats().n_compactions
        super()._prompt_ended(cache, *args, **kwargs)
        if cache.kv.stats().n_compactions > n_before:
            self.rss_change = rss() - before


@reports_errors
def demo(
    model: Annotated[str, typer.Option(help="A GGUF file, or 'smollm2' (fetched once).")] = SMOLLM2,
    file: Annotated[Path | None, typer.Option(help="A long text; default: a handbook that comes along.")] = None,
    question: Annotated[str | None, typer.Option(help="The question about the text.")] = None,
    policy: Annotated[str, typer.Option(help="The KV policy to compare with the full cache.")] = "auto",
    budget: Annotated[str, typer.Option(help="Cells that stay: 0.12, 12%, or a number of cells per head.")] = "0.12",
    limit: Annotated[
        str | None,
        typer.Option(help="Read it within this limit, too: a number of cells per head (1024), or bytes (512MiB)."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer at most.")] = 48,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask one question about a long text, with the full cache and with a KV policy, and compare."""
    kv_policy, kv_budget = parse_policy(policy), parse_budget(budget)
    kv_limit = None if limit is None else parse_limit(limit)
    text = read_text(file or DATA / "document.txt")
    asked = _question(file, question, chat)
    info = open_model(model)
    supported, reason = support(info)
    if not supported:
        raise CLIError(f"{info.path}: {reason}; give another model")
    tokens = _prompt(info, text, asked, chat)
    n_ctx = _check_length(len(tokens), max_tokens, info, file)

    progress = Console(stderr=True)
    runs = []
    for kv in (None, kv_policy):  # one after the other, so that their memory does not overlap
        given = (None, None) if kv is None else (kv_budget, kv_limit)
        llm = load(_WatchedLlama, info, n_ctx, threads, kv, *given)
        try:
            runs.append(_run(llm, tokens, max_tokens, asked, not chat, progress))
            n_threads = llm.n_threads
        finally:
            llm.close()
    full, kept = runs

    released = 1 - kept.bytes_live / kept.bytes_full
    speedup = full.decode_ms / kept.decode_ms
    if as_json:
        res: dict[str, Any] = {"model": str(info.path), "file": str(file) if file else None, **asdict(asked)}
        res["question"] = res.pop("text")
        res |= {"n_prompt": len(tokens), "n_ctx": n_ctx, "threads": n_threads, "budget": kv_budget}
        res["limit"] = kv_limit
        res |= {"full": asdict(full), "policy": asdict(kept), "bytes_released": released, "decode_speedup": speedup}
        print(_json.dumps(res, indent=1))
        return

    console = Console(highlight=False, soft_wrap=True)
    name = f"{file.name} and the question" if file else "the Keeper's Book of Skarvholm and the question"
    title = f"{info.path.name} on {n_threads} thread{'s' * (n_threads > 1)}; {name}: {len(tokens):,} tokens"
    console.print(for_terminal(title), markup=False)
    console.print(f"[bold]Question:[/] {for_markup(asked.text)}")
    if asked.lead:
        console.print(f"[bold]Answer:[/]   {for_markup(asked.lead)} …")
    console.print(_table(full, kept, n_ctx, budget, limit), soft_wrap=False)
    console.print(f"[bold]{_summary(released, speedup)}[/]")
    if (share := min(full.cpu_share, kept.cpu_share)) < _MIN_CPU_SHARE:
        console.print(
            f"The processor was busy: decoding got {100 * share:.0f} % of its threads' time, so the times are off"
        )
    console.print(for_terminal(f"Talk to it: windowkv-edge chat {shlex.quote(model)}"), markup=False)


def _question(file: Path | None, question: str | None, chat: bool) -> Question:
    if file is not None:
        if not question or not question.strip():
            raise CLIError("--file without a question; add --question 'What ...?'")
        return Question(question.strip())
    if question is not None and not question.strip():
        raise CLIError("--question is empty, expected a question; leave it out for the default one")
    facts = _json.loads((DATA / "facts.json").read_bytes(), "facts.json")
    for fact in facts:
        if question is None or question.strip().casefold() == fact["question"].casefold():
            return Question(fact["question"], "" if chat else fact["lead"], fact["answer"])
    assert question is not None
    return Question(question.strip())


def _prompt(info: GGUFInfo, text: str, asked: Question, chat: bool) -> list[int]:
    """Tokens of the text and the question: as a chat message, or as a text that the model completes."""
    if chat and not info.has_chat_template:
        raise CLIError(f"{info.path} has no chat template; leave out --chat")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # llama.cpp warns that a vocabulary has no positions
            vocab = Llama(str(info.path), vocab_only=True, verbose=False)
    except (ValueError, jinja2.TemplateError) as error:
        raise CLIError(f"cannot load {info.path}: {error}; the file may be damaged") from error
    try:
        if not chat:
            prompt = f"{text.rstrip()}\n\nQuestion: {asked.text}\nAnswer:{' ' if asked.lead else ''}{asked.lead}"
            return list(vocab.tokenize(prompt.encode()))
        bos, eos = (
            vocab.detokenize([token], special=True).decode("utf-8", "ignore") if token >= 0 else ""
            for token in (vocab.token_bos(), vocab.token_eos())
        )
        template = vocab.metadata["tokenizer.chat_template"]
        formatter = Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)
        try:
            filled = formatter(messages=[{"role": "user", "content": f"{text.rstrip()}\n\n{asked.text}"}])
        except Exception as error:  # templates raise what they like
            raise CLIError(f"the chat template of {info.path} cannot be rendered: {error}; leave out --chat") from error
        return list(vocab.tokenize(filled.prompt.encode(), add_bos=False, special=True))
    finally:
        vocab.close()


def _check_length(n_prompt: int, max_tokens: int, info: GGUFInfo, file: Path | None) -> int:
    """``n_ctx`` for the prompt and the answer."""
    name = file or "the text"
    if n_prompt < DEFAULT_MIN_PROMPT:
        raise CLIError(
            f"{name} and the question have {n_prompt} tokens, expected at least {DEFAULT_MIN_PROMPT} "
            "(shorter prompts are not compacted); give a longer text"
        )
    if 0 < info.n_ctx_train < n_prompt + max_tokens:
        raise CLIError(
            f"{name}, the question and the answer have up to {n_prompt + max_tokens:,} tokens, "
            f"expected at most the {info.n_ctx_train:,} positions that {info.name} was trained on; give a shorter text"
        )
    return -(-(n_prompt + max_tokens) // 256) * 256


def _run(
    llm: _WatchedLlama, tokens: list[int], max_tokens: int, asked: Question, stops_at_newline: bool, console: Console
) -> Run:
    """Answer greedily and measure."""
    vocab = llm._model.vocab
    stream = llm.generate(tokens, temp=0.0)
    start = time.perf_counter()
    name = "full cache" if llm.kv_policy is None else llm.kv_policy.name
    with prompt_bar(llm, console, name):
        generated = [next(stream)]
    prefill_s = time.perf_counter() - start
    stats = llm.kv_stats()

    times: list[float] = []
    cpu_s = 0.0
    n_answer: int | None = None
    while True:
        said = llm.detokenize(generated)
        if n_answer is None and (
            llama_vocab_is_eog(vocab, generated[-1]) or (stops_at_newline and b"\n" in said.lstrip(b"\n"))
        ):
            n_answer = len(generated)
        if len(generated) == max_tokens or (n_answer is not None and len(times) >= _MIN_TIMED):
            break
        start, cpu_start = time.perf_counter(), time.process_time()
        generated.append(next(stream))
        times.append(time.perf_counter() - start)
        cpu_s += time.process_time() - cpu_start
    stream.close()

    answer = llm.detokenize(generated[:n_answer]).decode("utf-8", "replace").strip()
    if stops_at_newline:
        answer = answer.split("\n")[0].strip()
    return Run(
        policy=stats.policy,
        answer=answer,
        correct=asked.expected.casefold() in answer.casefold() if asked.expected else None,
        n_prompt=len(tokens),
        cells_min=int(stats.cells.min()),
        cells_mean=float(stats.cells.mean()),
        cells_max=int(stats.cells.max()),
        bytes_live=stats.bytes_live,
        bytes_full=stats.bytes_full,
        bytes_peak=stats.bytes_peak,
        prefill_s=prefill_s,
        compaction_ms=stats.t_score_ms + stats.t_compact_ms,
        decode_ms=1e3 * statistics.median(times),
        n_timed=len(times),
        cpu_share=cpu_s / (sum(times) * llm.n_threads),
        rss_change=llm.rss_change,
    )


def _table(full: Run, kept: Run, n_ctx: int, budget: str, limit: str | None) -> Table:
    mark = {True: " [green]✓[/]", False: " [red]✗[/]", None: ""}
    within = "" if limit is None else f", limit {limit}"
    table = Table("", "full cache", for_markup(f"{kept.policy}, budget {budget}{within}"))
    answers = [(for_markup(run.answer, keep="\n"), mark[run.correct]) for run in (full, kept)]
    table.add_row("answer", *(f"[bold]{answer}[/]{right}" for answer, right in answers))
    spread = f" ({kept.cells_min:,} to {kept.cells_max:,})" if kept.cells_min < kept.cells_max else ""
    table.add_row("cells per head", f"{full.cells_mean:,.0f}", f"{kept.cells_mean:,.0f}{spread}")
    table.add_row("KV cache", f"{mib(full.bytes_full)} MiB", f"{mib(kept.bytes_live)} MiB")
    table.add_row(
        "at its peak", f"{mib(full.bytes_peak)} MiB (n_ctx {n_ctx:,})", f"{mib(kept.bytes_peak)} MiB (prefill)"
    )
    if kept.rss_change is not None:
        table.add_row("process memory", "", f"{kept.rss_change / 2**20:+,.1f} MiB at compaction")
    prefill = f"{kept.prefill_s:.1f} s ({kept.compaction_ms:.0f} ms compaction)"
    table.add_row("prefill", f"{full.prefill_s:.1f} s", prefill)
    table.add_row("decode, median", f"{full.decode_ms:.1f} ms per token", f"{kept.decode_ms:.1f} ms per token")
    return table


def _summary(released: float, speedup: float) -> str:
    decode = f"decode {speedup:.1f}x faster"
    if speedup < 1.05:
        decode = "decode as fast" if speedup > 0.95 else f"decode {1 / speedup:.1f}x slower"
    return f"{100 * released:.0f} % of the KV cache released, {decode}"
