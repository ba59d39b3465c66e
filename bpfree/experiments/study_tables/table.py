"""A table, and its text in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bpfree.errors import unknown_name
from bpfree.experiments.study_tables.columns import AGAINST, COLUMNS, TITLES, Row
from bpfree.experiments.tables import latex_table, markdown_table, text_table

SEVERAL: Final = "baseline"
"""What heads say where rows have different ones."""


@dataclass(frozen=True)
class Table:
    """One of the tables.

    Attributes:
        name: "T1" to "T9".
        rows: plain values.
        notes: what must be known to read it.
    """

    name: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.name].format(baseline=self.baseline)

    @property
    def baseline(self) -> str:
        """What heads call the baseline of all rows: "BP" for back-propagation of any kind, or the arm's label."""
        if {row.get("baseline_algorithm") for row in self.rows} == {"bp"}:
            return "BP"
        labels = {str(row.get("baseline", SEVERAL)) for row in self.rows}
        return labels.pop() if len(labels) == 1 else SEVERAL

    def cells(self) -> list[dict[str, str]]:
        """Rows as a person reads them; columns in which nothing is known are left out."""
        baseline = self.baseline
        columns = [column for column in COLUMNS[self.name] if column is not AGAINST or baseline == SEVERAL]
        titles = [column.title.format(baseline=baseline) for column in columns]
        shown = [{title: column.show(row) for title, column in zip(titles, columns, strict=True)} for row in self.rows]
        empty = {title for title in (shown[0] if shown else {}) if not any(cells[title] for cells in shown)}
        return [{title: cell for title, cell in cells.items() if title not in empty} for cells in shown]

    def as_dict(self) -> dict[str, Any]:
        return {"table": self.name, "title": self.title, "rows": self.rows, "notes": self.notes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Table:
        """The counterpart of `as_dict`.

        Raises:
            UsageError: there is no such table.
        """
        if values["table"] not in TITLES:
            raise unknown_name("table", values["table"], TITLES)
        return cls(values["table"], list(values["rows"]), list(values["notes"]))

    def to_csv(self) -> str:
        """Plain values; lists and names of flags are joined by semicolons, what is not known is empty."""
        file = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
        return file.getvalue()

    def render(self, form: str) -> str:
        """The table as "table", "markdown", "csv", "latex" or "json" text."""
        if form == "json":
            return json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
        if form == "csv":
            return self.to_csv().rstrip("\n")
        if not self.rows:
            return f"{self.name}: {self.title}\n\nno such rows"
        if form == "latex":
            notes = "".join(f"% {note}\n" for note in self.notes)
            return f"% {self.name}: {self.title}\n{notes}{latex_table(self.cells())}"
        body = (markdown_table if form == "markdown" else text_table)(self.cells())
        return "\n\n".join([f"{self.name}: {self.title}", body, *self.notes])
