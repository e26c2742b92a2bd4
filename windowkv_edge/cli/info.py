"""``windowkv-edge info``: what the KV cache of a model costs, from the file's header alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from windowkv_edge import POLICIES, KVPolicy, UnsupportedModelError
from windowkv_edge._json import dumps
from windowkv_edge._text import for_markup, for_terminal
from windowkv_edge.forecast import N_BATCH, Forecast, forecast
from windowkv_edge.gguf_info import CostRow, GGUFInfo, cost_table, support

from .common import CLIError, mib, open_model, parse_lengths, parse_limit, parse_policy, reports_errors

__all__ = ["info"]


@reports_errors
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or 'smollm2' (fetched once).")],
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated; 1k is 1024.")] = "1k,4k,8k,32k",
    budgets: Annotated[str, typer.Option(help="Percent of the cells that stay, comma-separated.")] = "25,12,6,3",
    limit: Annotated[
        str | None,
        typer.Option(help="What a session within this limit will hold: a number of cells per head (4096), or 512MiB."),
    ] = None,
    policy: Annotated[str, typer.Option(help="With --limit: the KV policy.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What the KV cache of a model costs, and whether a policy can run on it. Reads the header only."""
    n_tokens, fractions = parse_lengths(lengths), parse_budgets(budgets)
    kv_limit, kv_policy = None if limit is None else parse_limit(limit), parse_policy(policy)
    header = open_model(model)
    supported, reason = support(header)
    policies = [name for name in POLICIES if name != "full"]
    try:
        own = {name: POLICIES[name].cells for name in policies}
        rows, why_no_cost = cost_table(header, n_tokens, fractions, policies, own), ""
    except UnsupportedModelError as error:
        rows, why_no_cost = [], str(error)
    within = _within(header, kv_limit, n_tokens, kv_policy) if supported and kv_limit is not None else []

    if as_json:
        res: dict[str, Any] = asdict(header) | {"path": str(header.path), "bytes_per_position": None}
        if rows:
            res["bytes_per_position"] = header.bytes_per_position
        res |= {"supported": supported, "reason": reason, "costs": [asdict(row) for row in rows]}
        res["policies"] = {
            name: {"n_observed": n_observed(name), "query_bytes": query_bytes(header, name)} for name in policies
        }
        res["limits"] = [asdict(own) for own in within]
        print(dumps(res, indent=1))
        return

    console = Console()
    console.print(_model_table(header, supported, reason, bool(rows)))
    if rows:
        console.print("", _cost_table(header, rows, n_tokens, fractions))
    else:
        console.print(for_terminal(why_no_cost), markup=False)
    if within:
        console.print("", _limit_table(within, limit or "", kv_policy))
    if supported:
        console.print("", _policy_table(header, policies))


def _within(header: GGUFInfo, limit: int | str, lengths: list[int], policy: KVPolicy) -> list[Forecast]:
    try:
        return [forecast(header, limit, n, policy) for n in lengths]
    except ValueError as error:
        raise CLIError(str(error).replace("kv_limit", "--limit", 1)) from None


def parse_budgets(text: str) -> list[float]:
    """Fractions of the cells: ``"25,12%"`` is [0.25, 0.12]."""
    res = []
    for part in text.split(","):
        try:
            percent = float(part.strip().removesuffix("%"))
        except ValueError:
            percent = 0.0
        if not 1 <= percent <= 100:
            raise CLIError(f"--budgets has {part!r}, expected a percentage from 1 to 100, such as 12")
        res.append(percent / 100)
    return res


def n_observed(policy: str) -> int:
    """Tokens at the end of a prompt that a policy observes, with its defaults."""
    return POLICIES[policy]().n_observed


def query_bytes(header: GGUFInfo, policy: str) -> int:
    """Bytes of the observed queries (f16) that a session holds beside its cells: the last ones and a prompt's."""
    return 2 * sum(header.n_head[il] for il in header.compressed_layers) * header.head_dim_k * n_observed(policy) * 2


def _model_table(header: GGUFInfo, supported: bool, reason: str, is_cost_known: bool) -> Table:
    heads = sorted(set(header.n_head_kv))
    table = Table(show_header=False, box=None)
    table.add_row("file", for_markup(header.path.name))
    about = f"{header.name} ({header.architecture}, {header.file_type}, {mib(header.file_size)} MiB)"
    table.add_row("model", for_markup(about))
    table.add_row("layers", f"{header.n_layer}")
    table.add_row("KV heads per layer", " to ".join(str(n) for n in {heads[0]: 0, heads[-1]: 0}) if heads else "none")
    table.add_row("head size K, V", f"{header.head_dim_k}, {header.head_dim_v}")
    table.add_row("trained context", f"{header.n_ctx_train:,} positions")
    if header.sliding_window:
        n_windowed = sum(header.window_layers)
        table.add_row(
            "sliding window", f"{header.sliding_window:,} positions in {n_windowed} of {header.n_layer} layers"
        )
    if any(header.recurrent_layers):
        table.add_row("recurrent layers", f"{sum(header.recurrent_layers)} of {header.n_layer}")
    if is_cost_known:
        table.add_row("KV cache (f16)", f"{header.bytes_per_position:,} bytes per position")
    table.add_row("chat template", "yes" if header.has_chat_template else "no")
    table.add_row("policies", for_markup(f"supported: {reason}" if supported else f"not supported: {reason}"))
    return table


def _cost_table(header: GGUFInfo, rows: list[CostRow], lengths: list[int], budgets: list[float]) -> Table:
    """Policies that cost the same share their columns."""
    named: dict[tuple[int, ...], list[str]] = {}
    shown = dict.fromkeys(row.policy for row in rows if row.policy != "stock")
    for policy in (name for name in shown if POLICIES[name].cells is None):
        named.setdefault(tuple(row.n_bytes for row in rows if row.policy == policy), []).append(policy)
    costs = {(row.policy, row.budget, row.n_tokens): row for row in rows}

    table = Table(title="MiB of K and V, and cells per head", title_justify="left", title_style="")
    table.add_column("tokens", justify="right")
    table.add_column("stock", justify="right")
    for _ in named:
        for budget in budgets:
            table.add_column(f"{100 * budget:g} %", justify="right")
    for n in lengths:
        picked = [(name[0], budget) for name in named.values() for budget in budgets]
        cells = [costs[policy, budget, n] for policy, budget in [("stock", 1.0), *picked]]
        beyond = " *" if 0 < header.n_ctx_train < n else ""
        table.add_row(f"{n:,}{beyond}", *(f"{mib(row.n_bytes)}\n[dim]{row.cells_per_head:,}[/]" for row in cells))
    notes = ["percent: " + "; ".join(", ".join(names) for names in named.values())] if named else []
    own = {name: POLICIES[name].cells for name in shown if POLICIES[name].cells}
    notes += [f"{name}: more cells for these bytes, in {cells}" for name, cells in own.items()]
    if header.n_ctx_train and max(lengths) > header.n_ctx_train:
        notes.append(f"* more than the {header.n_ctx_train:,} positions that the model was trained on")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _limit_table(rows: list[Forecast], limit: str, policy: KVPolicy) -> Table:
    table = Table(title=f"Within the limit {limit}, {policy.name}", title_justify="left", title_style="")
    for name in ("tokens", "full cache, MiB", "peak", "when the answer begins", "while it grows, at most"):
        table.add_column(name, justify="right")
    for row in rows:
        pairs = (
            (row.cells_peak, row.bytes_peak), (row.cells_after, row.bytes_after), (row.cells_most, row.bytes_most)
        )  # fmt: skip
        held = [f"{mib(n_bytes)} MiB\n[dim]{cells:,}[/]" for cells, n_bytes in pairs]
        table.add_row(f"{row.n_tokens:,}", mib(row.bytes_full), *held)
    table.caption = f"With batches of {N_BATCH} tokens. Below the MiB: cells per head."
    table.caption_justify = "left"
    return table


def _policy_table(header: GGUFInfo, policies: list[str]) -> Table:
    table = Table(title="Policies", title_justify="left", title_style="")
    for name in ("policy", "observes, tokens", "queries, MiB", "paper"):
        table.add_column(name, justify="right" if "," in name else "left")
    for name in policies:
        table.add_row(name, str(n_observed(name)), mib(query_bytes(header, name)), POLICIES[name].paper)
    table.caption = "A session also holds the queries that its policy observes: of its last tokens, and a prompt's."
    table.caption_justify = "left"
    return table
