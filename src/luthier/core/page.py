"""One HTML file that needs nothing else: no network, no script. Tables, pictures inside the file, remarks."""

import base64
from collections.abc import Sequence
from html import escape

Table = tuple[list[str], list[list[str]]]
"""Head, rows."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: .15rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(even) { background: #f4f4f4; } th { border-bottom: 1px solid; }
img { max-width: 100%; } .wide { overflow-x: auto; } .remarks { background: #fff8e0; padding: .5rem 1rem; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return the document with `title` as its heading, and `parts`, which are HTML, below it."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def html_section(title: str, picture: bytes | None, table: Table | None) -> list[str]:
    """Return a heading with a PNG picture and a table below it, or nothing if there is neither."""
    if picture is None and table is None:
        return []
    parts = [f"<h2>{escape(title)}</h2>"]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.append(f'<p><img alt="{escape(title)}" src="data:image/png;base64,{data}"></p>')
    return parts + ([] if table is None else [html_table(table)])


def html_table(table: Table) -> str:
    """Return a table that scrolls sideways where it is wider than the page."""
    head, rows = table

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def html_remarks(remarks: Sequence[str]) -> list[str]:
    """Return a box of sentences, or nothing if there are none."""
    return [f'<div class="remarks">{"".join(f"<p>{escape(remark)}</p>" for remark in remarks)}</div>'] if remarks else []
