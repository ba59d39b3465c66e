"""One self-contained page of everything: tables, figures and what was compared. It loads nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from bpfree.errors import cannot_write
from bpfree.experiments.compare import Plan
from bpfree.experiments.plots import Plot
from bpfree.experiments.study_tables import Table

STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #1f1f1f; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; } figure { margin: 1em 0; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.7em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
tr.published { color: #666; font-style: italic; } .warning { color: #a33; } .note { color: #555; font-size: 0.9em; }
pre { font-size: 0.75em; max-height: 20em; overflow: auto; background: #f6f6f6; padding: 0.5em; }
"""


def report(
    title: str, plans: Mapping[str, Plan], tables: Sequence[Table], plots: Sequence[Plot], *, version: str
) -> str:
    """The page.

    Args:
        title: what it is about.
        plans: comparisons by name.
        tables: those without rows are left out.
        plots: each is drawn into the page as PNG, with its numbers folded away below.
        version: of bpfree.

    Raises:
        UsageError: matplotlib is not installed.
    """
    contents = [f'<a href="#{t.name}">{t.name} {escape(t.title)}</a>' for t in tables if t.rows]
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">Made by bpfree {escape(version)} from run records, and from nothing else.</p>',
        f"<p>{' · '.join([*contents, '<a href=#figures>Figures</a>'])}</p>",
        *_warnings(tables),
        *(_plan(name, plan) for name, plan in plans.items()),
        *(_table(table) for table in tables if table.rows),
        '<h2 id="figures">Figures</h2>',
        *map(_figure, plots),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_report(path: Path, page: str) -> None:
    """Write the page.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error


def _warnings(tables: Iterable[Table]) -> list[str]:
    """What a reader must know before the first number."""
    rows = [row for table in tables for row in table.rows]
    simulated = any("SIMULATED" in (row.get("flags") or []) for row in rows)
    host_bound = any(row.get("regime") == "host-bound" for row in rows)
    hardware = sorted({row["hardware"] for row in rows if row.get("hardware")})
    said = {
        "Energy is simulated: the joules here were made up, nothing was measured.": simulated,
        "Rows labelled host-bound waited for the host more than a fifth of the time: they rank implementations, not "
        "algorithms.": host_bound,
        f"Several kinds of hardware ({', '.join(sorted(hardware))}); arms are paired within one only.": len(hardware)
        > 1,
    }
    return [f'<p class="warning">{escape(text)}</p>' for text, so in said.items() if so]


def _plan(name: str, plan: Plan) -> str:
    values = plan.as_dict()
    analysis = plan.analysis
    facts: list[tuple[str, Any]] = [
        ("data set", plan.dataset),
        ("hardware", ", ".join(plan.hardware)),
        ("arms", ", ".join(dict.fromkeys(arm.label for arm in plan.arms))),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("protocols", ", ".join(plan.protocols)),
        ("matched passes", ", ".join(f"{network}: {n}" for network, n in plan.matched_passes.items())),
        ("baseline", analysis.baseline),
        ("margins", f"±{analysis.margin_accuracy:g} pp, ±{100 * analysis.margin_relative:g} %"),
        ("targets", ", ".join(f"{target:g} %" for target in analysis.targets)),
        ("start temperature, °C", plan.start_temperature_c),
    ]
    for network, unequal in values["unequal_settings"].items():
        for setting, by_arm in unequal.items():
            words = ", ".join(f"{label} {value}" for label, value in by_arm.items())
            facts.append((f"unequal on {network}: {setting}", words))
    facts += [(f"{arm.label} on {arm.config.network}", arm.skipped or arm.origin) for arm in plan.arms]
    lines = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts if v not in ("", None))
    return f"<h2>Comparison {escape(name)}</h2>\n<table>{lines}</table>"


def _table(table: Table) -> str:
    cells = table.cells()
    head = "".join(f"<th>{escape(title)}</th>" for title in cells[0])
    lines = []
    for shown, row in zip(cells, table.rows, strict=True):
        kind = ' class="published"' if row.get("source", "this work") != "this work" else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in shown.values())}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    body = "\n".join(lines)
    return (
        f'<h2 id="{table.name}">{table.name} {escape(table.title)}</h2>\n<div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n{notes}"
    )


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.image("png")).decode("ascii")
    return (
        f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,{image}">'
        f"<details><summary>The numbers in it</summary><pre>{escape(plot.data())}</pre></details></figure>"
    )
