"""A page of results that stands alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from .._json import dumps
from .._text import for_terminal
from .results import Results
from .tables import Table, about, answer_tables, by, fidelity_table, ranks, retention_table, summary, summary_text

__all__ = ["html"]

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


def _shown(value: Any) -> Any:
    return for_terminal(value, keep="\n") if isinstance(value, str) else value


def _cells(table: Table) -> dict[str, Any]:
    return {"head": table.head, "rows": table.rows}


def html(results: Sequence[Results], drawn: Sequence[Mapping[str, bytes]]) -> str:
    """A page that stands alone: tables, pictures (PNG files of every suite, by their names) and conditions."""
    import jinja2

    parts: list[dict[str, Any]] = []
    if len(results) > 1:
        table = {"name": "", **_cells(summary(results))}
        parts.append({"name": "Summary", "about": summary_text(results), "tables": [table], "pictures": []})
    for res, files in zip(results, drawn, strict=True):
        tables = [{"name": "", **_cells(fidelity_table(res) if res.is_fidelity else retention_table(res))}]
        tables += [{"name": name, **_cells(table)} for name, table in answer_tables(res)]
        if not res.is_fidelity:
            tables.append({"name": "By kind", **_cells(by(res, "task"))})
        pictures = [{"name": name, "data": base64.b64encode(data).decode()} for name, data in files.items()]
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
    header = dumps([dict(res.header) for res in results], indent=1)
    env = jinja2.Environment(autoescape=True, finalize=_shown)
    title = f"windowkv-edge eval: {results[0].header['model']}"
    return env.from_string(_PAGE).render(title=title, parts=parts, header=header)
