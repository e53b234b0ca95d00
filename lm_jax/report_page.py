"""The page of a report: one HTML file, light and dark, that needs nothing beside it but its pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping


def page(title: str, facts: Mapping[str, str], sections: Iterable[str]) -> str:
    """The whole page. Title and facts are text, sections are HTML already."""
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return PAGE.format(title=html.escape(title), facts=listed, body="\n".join(sections))


def section(title: str, caption: str, body: str) -> str:
    """A heading, a line that says what is seen, and a body that is HTML already."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>{body}</section>"


def picture(name: str, title: str) -> str:
    """The picture <name>.png beside the page, with a link to the <name>.csv it was drawn from."""
    image = f'<img src="{name}.png" srcset="{name}.png 1.5x" alt="{html.escape(title)}">'
    return image + f'<p class="source"><a href="{name}.csv">{name}.csv</a></p>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already, the head is not."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def named(name: str, meaning: str = "") -> str:
    """A cell: text, and small below it what it means."""
    return f"{html.escape(name)}<small>{html.escape(meaning)}</small>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --soft: #63686e; --line: #e2e4e7; --page: #fff; --link: #0b62a8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e6e8; --soft: #9aa0a6; --line: #33373c; --page: #16181b; --link: #7db8ec; }}
}}
body {{ max-width: 62rem; margin: 3rem auto; padding: 0 1.25rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 3rem 0 0; }}
p, small, dt {{ color: var(--soft); }}
p {{ margin: .2rem 0 1rem; }}
a {{ color: var(--link); }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
td small {{ display: block; font-size: .8rem; }}
td:not(:first-child) small {{ white-space: nowrap; }}
img {{ display: block; max-width: 100%; box-sizing: border-box; padding: .75rem; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }}
.source {{ font-size: .85rem; margin: .4rem 0 0; }}
</style>
<h1>{title}</h1>
<dl>{facts}</dl>
{body}
</html>
"""
