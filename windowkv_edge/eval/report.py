"""Tables and pictures of results: what a policy keeps of what the full cache answers, and at which bytes."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .case import EvalError
from .run import FULL

__all__ = ["Line", "Results", "draw", "html", "load", "markdown", "ranks", "summary"]

Budget = Any
"""None for the full cache, a float or an int."""

N_BOOTSTRAP = 2000


@dataclass(frozen=True, order=True)
class Line:
    """One line of a table or plot: a policy with a cell type."""

    policy: str
    cells: str

    def __str__(self) -> str:
        return self.policy if self.cells == "f16" else f"{self.policy}, {self.cells}"


@dataclass(frozen=True)
class Results:
    """One suite of one results file.

    Attributes:
        header: of the file.
        suite: its name.
        rows: of the prompts.
        source: the file.
    """

    header: Mapping[str, Any]
    suite: str
    rows: Sequence[Mapping[str, Any]]
    source: str

    @property
    def title(self) -> str:
        """Name of the file, with the part of the suite where it has several."""
        return self.source.removesuffix(".jsonl") + ("-" + self.suite.split("/")[1] if "/" in self.suite else "")

    @property
    def is_fidelity(self) -> bool:
        return self.suite == "fidelity"

    @property
    def budgets(self) -> list[Budget]:
        """Those of the policies, largest first: counts of cells, then shares."""
        return sorted(
            {r["budget"] for row in self.rows for r in row["results"] if r["policy"] != FULL},
            key=lambda b: (isinstance(b, int), b), reverse=True,
        )  # fmt: skip

    @property
    def lines(self) -> list[Line]:
        """The policies in the order of the file, the full cache first."""
        return list(dict.fromkeys(Line(r["policy"], r["cells"]) for row in self._counted() for r in row["results"]))

    def _counted(self) -> list[Mapping[str, Any]]:
        """Prompts that the full f16 cache answers, wholly or in part; all of them for distances."""
        if self.is_fidelity:
            return list(self.rows)
        return [row for row in self.rows if row["results"][0]["score"] > 0]

    @property
    def n_counted(self) -> int:
        return len(self._counted())

    def pairs(
        self, line: Line, budget: Budget, value: str = "score", where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[tuple[float, float]]:
        """(a policy's value, the full f16 cache's) of every counted prompt."""
        res = []
        for row in self._counted():
            if where is None or where(row):
                for r in row["results"]:
                    same = (r["policy"], r["cells"], r["budget"]) == (line.policy, line.cells, budget)
                    if same and r[value] is not None:
                        res.append((float(r[value]), float(row["results"][0].get(value) or 0.0)))
        return res

    def retention(
        self, line: Line, budget: Budget, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> float | None:
        """A policy's score as a share of the full f16 cache's over the counted prompts."""
        pairs = self.pairs(line, budget, where=where)
        full = sum(want for _, want in pairs)
        return sum(got for got, _ in pairs) / full if full else None

    def mean(
        self, line: Line, budget: Budget, value: str, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> float | None:
        pairs = self.pairs(line, budget, value, where)
        return float(np.mean([got for got, _ in pairs])) if pairs else None

    def interval(self, line: Line, budget: Budget, value: str | None = None) -> tuple[float, float] | None:
        """95 % confidence interval of the retention, or of the mean of a value, by bootstrap over prompts.

        None with fewer than four prompts, or with nothing that varies.

        Windows of a text count as one each, as their tokens depend on each other. Prompts that hide one fact at several
        places count as independent, so that intervals say nothing about other facts.
        """
        pairs = np.array(self.pairs(line, budget, value or "score"))
        if len(pairs) < 4 or (pairs == pairs[0]).all():
            return None
        pick = np.random.default_rng(0).integers(0, len(pairs), (N_BOOTSTRAP, len(pairs)))
        got, want = pairs[pick, 0].mean(axis=1), pairs[pick, 1].mean(axis=1)
        means = got if value else got / np.maximum(want, 1e-12)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)


def load(paths: Iterable[Path]) -> list[Results]:
    """The suites of results files.

    Raises:
        EvalError: a file cannot be read or holds no result.
    """
    from .records import read_records

    res = []
    for path in paths:
        header, rows = read_records(path)
        if not rows:
            raise EvalError(f"{path} holds no results yet; run its evaluation again, it goes on from there")
        by_suite: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            by_suite[row["suite"] + ("/" + row["task"] if row["suite"] == "turns" else "")].append(row)
        res += [Results(header, suite, own, path.name) for suite, own in by_suite.items()]
    return res


def budget_name(budget: Budget) -> str:
    return "all" if budget is None else f"{budget:,}" if isinstance(budget, int) else f"{100 * budget:g} %"


#
# markdown
#


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _retention_table(res: Results) -> str:
    rows = []
    for line in res.lines:
        if line.policy == FULL:
            value = res.retention(line, None)
            rows.append([str(line), *(["" if value is None else f"{value:.1%}"] * len(res.budgets))])
            continue
        cells = []
        for budget in res.budgets:
            value, interval = res.retention(line, budget), res.interval(line, budget)
            text = "" if value is None else f"{value:.1%}"
            cells.append(text if interval is None else f"{text} ({interval[0]:.0%} to {interval[1]:.0%})")
        rows.append([str(line), *cells])
    return _table(["policy", *map(budget_name, res.budgets)], rows)


def _fidelity_table(res: Results) -> str:
    rows = []
    for line in res.lines:
        if line.policy == FULL:
            continue
        for value, name in (("kl", "KL"), ("top1", "top-1"), ("nll_increase", "NLL +")):
            cells = []
            for budget in res.budgets:
                mean, interval = res.mean(line, budget, value), res.interval(line, budget, value)
                if mean is None or interval is None:
                    cells.append("" if mean is None else f"{mean:.3f}")
                else:
                    cells.append(f"{mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f})")
            rows.append([str(line) if value == "kl" else "", name, *cells])
    return _table(["policy", "", *map(budget_name, res.budgets)], rows)


def _kl_by_text(res: Results) -> str:
    texts = list(dict.fromkeys(row["task"] for row in res.rows))
    rows = []
    for line in (line for line in res.lines if line.policy != FULL):
        cells = []
        for text in texts:
            values = [res.mean(line, b, "kl", lambda row, text=text: row["task"] == text) for b in res.budgets]  # type: ignore[misc]
            cells.append(" ".join("-" if value is None else f"{value:.3f}" for value in values))
        rows.append([str(line), *cells])
    return _table(["policy", *texts], rows)


def _by(res: Results, key: str) -> str:
    """Retention by a field of the prompts, at every budget."""
    values = sorted({row[key] for row in res._counted() if row[key] is not None}, key=lambda v: (isinstance(v, str), v))
    rows = []
    for line in res.lines:
        for budget in [None] if line.policy == FULL else res.budgets:
            cells = []
            for value in values:
                share = res.retention(line, budget, where=lambda row, value=value: row[key] == value)  # type: ignore[misc]
                cells.append("" if share is None else f"{share:.0%}")
            rows.append([str(line), budget_name(budget), *cells])
    counts = [sum(row[key] == value for row in res._counted()) for value in values]
    return _table(["policy", "budget", *(f"{v} (n={n})" for v, n in zip(values, counts, strict=True))], rows)


def about(res: Results) -> str:
    """One line: model, what was counted."""
    header = res.header
    text = (
        f"{header['model']} ({header['model_sha256'][:12]}), windowkv-edge {header['package']}, seed {header['seed']}"
    )
    if res.is_fidelity:
        tokens = res.rows[0]["n_follow"]
        said = f"{len(res.rows)} windows, {tokens} forced tokens each"
        return f"{text}: {said}; budgets are shares of the full f16 cache's bytes"
    full = sum(row["results"][0]["score"] for row in res.rows)
    return (
        f"{text}: the full f16 cache scores {full:.1f} of {len(res.rows)} prompts; {res.n_counted} count, "
        f"{len(res.rows) - res.n_counted} that it fails do not; shares are of its score"
    )


def markdown(results: Sequence[Results]) -> str:
    """All tables."""
    parts = [f"## Summary\n\n{_summary_text(results)}\n\n{summary(results)}"] if len(results) > 1 else []
    for res in results:
        parts.append(f"## {res.suite}: {res.source}\n\n{about(res)}")
        if res.is_fidelity:
            parts.append(_fidelity_table(res))
            if len({row["task"] for row in res.rows}) > 1:
                parts.append(f"### KL by text, at {', '.join(map(budget_name, res.budgets))}\n\n{_kl_by_text(res)}")
            continue
        parts.append(_retention_table(res))
        for key, name in (("task", "kind"), ("length", "length"), ("depth", "depth")):
            if len({row[key] for row in res.rows if row[key] is not None}) > 1 and (
                key != "depth" or res.suite == "needle"
            ):
                parts.append(f"### By {name}\n\n{_by(res, key)}")
    table = ranks(results)
    if table:
        parts.append("## Ranks\n\nPlaces among the policies (1 = best), mean over the suites\n\n" + table)
    return "\n\n".join(parts) + "\n"


def _same_budgets(results: Sequence[Results]) -> list[Budget]:
    """Budgets that all suites have."""
    return [b for b in results[0].budgets if all(b in res.budgets for res in results)]


def _summary_text(results: Sequence[Results]) -> str:
    budgets = ", ".join(map(budget_name, _same_budgets(results)))
    counts = ", ".join(f"{res.n_counted} of {len(res.rows)} in {res.title}" for res in results if not res.is_fidelity)
    return (
        f"At {budgets}: percent of the full f16 cache's score, and KL to it. "
        f"Prompts that it answers and that count: {counts}"
    )


def summary(results: Sequence[Results]) -> str:
    """One row per policy: what it keeps of every suite at the budgets that all have."""
    budgets = _same_budgets(results)
    lines = [line for line in results[0].lines if line.policy != FULL and all(line in res.lines for res in results)]
    rows = []
    for line in lines:
        cells = []
        for res in results:
            values = [_value(res, line, budget) for budget in budgets]
            form = "{:.3f}".format if res.is_fidelity else lambda value: f"{100 * value:.0f}"
            cells.append(" ".join("-" if value is None else form(value) for value in values))
        rows.append([str(line), *cells])
    return _table(["policy", *(f"{res.title}, KL" if res.is_fidelity else res.title for res in results)], rows)


def _places(values: Mapping[Line, float]) -> dict[Line, float]:
    """Places from the best value on; equal values share the mean of their places."""
    res = {}
    for line, value in values.items():
        better = sum(other > value for other in values.values())
        same = sum(other == value for other in values.values())
        res[line] = better + (same + 1) / 2
    return res


def mean_ranks(results: Sequence[Results]) -> dict[Budget, dict[Line, float]]:
    """For every budget the mean place of every policy that all suites have: suites of one kind count as one."""
    kinds: dict[str, list[Results]] = defaultdict(list)
    for res in results:
        kinds[res.suite].append(res)
    budgets = _same_budgets(results)
    found: dict[Budget, dict[Line, float]] = {}
    for budget in budgets:
        places: dict[Line, list[float]] = defaultdict(list)
        for group in kinds.values():
            per_line: dict[Line, list[float]] = defaultdict(list)
            for res in group:
                for line in res.lines:
                    if line.policy == FULL:
                        continue
                    value = _value(res, line, budget)
                    if value is not None:
                        per_line[line].append(-value if res.is_fidelity else value)
            means = {line: float(np.mean(v)) for line, v in per_line.items() if len(v) == len(group)}
            for line, own in _places(means).items():
                places[line].append(own)
        found[budget] = {line: float(np.mean(p)) for line, p in places.items() if len(p) == len(kinds)}
    return found


def ranks(results: Sequence[Results]) -> str:
    """Table of mean places, "" with fewer than two suites."""
    if len({res.suite for res in results}) < 2:
        return ""
    found = mean_ranks(results)
    lines = list(dict.fromkeys(line for places in found.values() for line in places))
    if not lines:
        return ""
    rows = [
        [str(line), *(f"{found[b][line]:.1f}" if line in found[b] else "" for b in found)]
        for line in sorted(lines, key=lambda line: sum(found[b].get(line, 0) for b in found))
    ]
    return _table(["policy", *map(budget_name, found)], rows)


#
# pictures
#


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise EvalError('pictures need matplotlib; pip install "windowkv-edge[eval]"') from None
    return Figure(figsize=(width, height), layout="constrained")


def _value(res: Results, line: Line, budget: Budget) -> float | None:
    return res.mean(line, budget, "kl") if res.is_fidelity else res.retention(line, budget)


def _curves(res: Results) -> Any:
    """Score, and time per token, against bytes."""
    panels = (
        [("kl", "KL to the full cache")]
        if res.is_fidelity
        else [("score", "share of the full cache's score"), ("ms", "ms per token")]
    )
    figure = _figure(7 * len(panels), 5)
    for i, (what, name) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for line in res.lines:
            budgets = [None] if line.policy == FULL else res.budgets
            points = []
            for budget in budgets:
                x = res.mean(line, budget, "kv_bytes")
                y = res.mean(line, budget, "decode_ms") if what == "ms" else _value(res, line, budget)
                if x is not None and y is not None:
                    points.append((x / 2**20, y))
            if not points:
                continue
            if line.policy == FULL:
                if line.cells == "f16" and what != "kl":
                    axes.axhline(points[0][1], color="black", linestyle=":", label=str(line))
                elif what != "kl":
                    axes.plot(*zip(*points, strict=True), marker="x", color="black", linestyle="", label=str(line))
            else:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=str(line))
        axes.set_xscale("log")
        axes.set_xlabel("KV cells, MiB (mean over prompts)")
        axes.set_ylabel(name)
        if what == "kl":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{res.suite}: {res.header['model']}")
    return figure


def _depths(res: Results) -> Any:
    """Share by depth, one panel per budget."""
    depths = sorted({row["depth"] for row in res._counted() if row["depth"] is not None})
    figure = _figure(4.5 * len(res.budgets), 4)
    for i, budget in enumerate(res.budgets):
        axes = figure.add_subplot(1, len(res.budgets), i + 1)
        for line in res.lines:
            if line.policy == FULL:
                continue
            shares = [res.retention(line, budget, where=lambda row, d=d: row["depth"] == d) for d in depths]  # type: ignore[misc]
            axes.plot(depths, [np.nan if s is None else s for s in shares], marker="o", label=str(line))
        axes.set_title(budget_name(budget))
        axes.set_xlabel("depth")
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the full cache's score")
    figure.axes[-1].legend(fontsize="small")
    return figure


def _heatmaps(res: Results) -> Any:
    """Depth x length, a row per budget, a column per policy."""
    lengths = sorted({row["length"] for row in res.rows})
    depths = sorted({row["depth"] for row in res.rows if row["depth"] is not None})
    lines, budgets = [line for line in res.lines if line.policy != FULL], res.budgets
    figure = _figure(2.4 * len(lines) + 1, 2.2 * len(budgets) + 0.6)
    image = None
    for r, budget in enumerate(budgets):
        for c, line in enumerate(lines):
            axes = figure.add_subplot(len(budgets), len(lines), r * len(lines) + c + 1)
            grid = np.full((len(depths), len(lengths)), np.nan)
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    share = res.retention(
                        line, budget, where=lambda row, d=depth, n=length: (row["depth"], row["length"]) == (d, n)  # type: ignore[misc]
                    )  # fmt: skip
                    grid[y, x] = np.nan if share is None else share
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
            if r == 0:
                axes.set_title(str(line), fontsize=9)
            if c == 0:
                axes.set_ylabel(budget_name(budget))
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def draw(res: Results) -> dict[str, Any]:
    """Figures of one suite by their names."""
    if not res.budgets:  # the full cache answered nothing
        return {}
    figures = {"bytes": _curves(res)}
    if res.suite == "needle":
        figures["depth"] = _depths(res)
        figures["heatmap"] = _heatmaps(res)
    return figures


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow: auto; } h2 { margin-top: 2.5rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}
<h2>{{ part.name }}</h2>
<p>{{ part.about }}</p>
{% for table in part.tables %}
<h3>{{ table.name }}</h3>
<table>
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for picture in part.pictures %}<p><img alt="{{ picture.name }}" src="data:image/png;base64,{{ picture.data }}"></p>
{% endfor %}
{% endfor %}
<h2>Conditions</h2>
<pre>{{ header }}</pre>
</body>
</html>
"""


def _cells(table: str) -> dict[str, Any]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {"head": rows[0], "rows": rows[2:]}


def html(results: Sequence[Results]) -> str:
    """A page that stands alone: tables, pictures and conditions."""
    import json

    import jinja2

    parts: list[dict[str, Any]] = []
    if len(results) > 1:
        table = {"name": "", **_cells(summary(results))}
        parts.append({"name": "Summary", "about": _summary_text(results), "tables": [table], "pictures": []})
    for res in results:
        tables = [{"name": "", **_cells(_fidelity_table(res) if res.is_fidelity else _retention_table(res))}]
        if not res.is_fidelity:
            tables.append({"name": "By kind", **_cells(_by(res, "task"))})
        pictures = []
        for name, figure in draw(res).items():
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110)
            pictures.append({"name": name, "data": base64.b64encode(data.getvalue()).decode()})
        parts.append(
            {"name": f"{res.suite}: {res.source}", "about": about(res), "tables": tables, "pictures": pictures}
        )
    places = ranks(results)
    if places:
        parts.append(
            {
                "name": "Ranks",
                "about": "mean places, 1 = best",
                "tables": [{"name": "", **_cells(places)}],
                "pictures": [],
            }
        )
    header = json.dumps([dict(res.header) for res in results], indent=1)
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return page.render(title=f"windowkv-edge eval: {results[0].header['model']}", parts=parts, header=header)
