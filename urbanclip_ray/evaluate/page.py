"""What the pages of reports share: templates with autoescape, our own files, and tables as CSV."""

from __future__ import annotations

import csv
import importlib.resources
import io
from typing import Any

import jinja2

Json = dict[str, Any]

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def as_csv(rows: list[Json], columns: tuple[str, ...] = ()) -> bytes:
    """Rows as UTF-8 CSV; what is unknown is empty, lists are joined by spaces.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    names = columns or tuple(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = [" ".join(row[name]) if isinstance(row.get(name), list) else row.get(name) for name in names]
        writer.writerow([_no_formula(value) if isinstance(value, str) else value for value in values])
    return stream.getvalue().encode()


def _no_formula(text: str) -> str:
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def read_template(name: str) -> str:
    """A file of the page that is ours: nothing from data is in it."""
    return importlib.resources.files("urbanclip_ray.evaluate").joinpath(name).read_text("utf-8")


def render_page(name: str, **values: Any) -> str:
    """A page of ours; `values` are escaped, and what their template calls safe is none of the data's."""
    loader = jinja2.FunctionLoader(read_template)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(style=read_template("report.css"), **values)
