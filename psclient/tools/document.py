"""The frame that all HTML reports of psctl share: style sheet, tiles, cards, tables.

A report is one file. A content security policy forbids the browser to load anything. All text from
data must be escaped; the functions of this file escape their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template


def document(
    title: str, heading: str, subtitle: str, body: str, *, style: str = "", scripts: str = ""
) -> str:
    """Return a report as an HTML page.

    title     of the window
    heading   first line of the page
    subtitle  second line of the page
    body      HTML below them
    style     further style sheet
    scripts   HTML of script elements; "": the policy forbids all scripts
    """
    return _PAGE.substitute(
        policy="script-src 'unsafe-inline'; " if scripts else "",
        title=escape(title),
        heading=escape(heading),
        subtitle=escape(subtitle),
        body=body,
        style=style,
        scripts=scripts,
    )


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Return the HTML of tiles, one per (name, value)."""
    each = "".join(
        f"<div class=tile><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts
    )
    return f"<dl>{each}</dl>"


def card(head: str, about: str, inner: str, *, wide: bool = False) -> str:
    """Return the HTML of a card.

    head   heading
    about  one sentence that explains the contents; "": none
    inner  HTML of the contents
    wide   whether the card is as wide as the page
    """
    kind = "'card wide'" if wide else "card"
    text = f"<p>{escape(about)}</p>" if about else ""
    return f"<section class={kind}><h2>{escape(head)}</h2>{text}{inner}</section>"


def folded(summary: str, inner: str) -> str:
    """Return HTML that shows ``inner`` only after a click on ``summary``."""
    shown = f"<div class=scroll tabindex=0>{inner}</div>"
    return f"<details><summary>{escape(summary)}</summary>{shown}</details>"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return an HTML table.

    columns  column heads
    lines    text of the cells, one per column
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; ${policy}\
style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --edge: #e1e4e9; --text: #1d2229; --soft: #5d6673;
  --grid: #e8eaee; --one: #2f6fde; --two: #e07b1a; --three: #159a80; --bad: #c93535;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --edge: #2b313a; --text: #e5e8ec; --soft: #98a2b0;
    --grid: #2a3039; --one: #6ea0ff; --two: #f2a254; --three: #4fc9ad; --bad: #ff7b72;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p, .card p, footer { color: var(--soft); }
header p { margin: 4px 0 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
     margin: 0 0 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums;
     overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
         gap: 16px; }
.card { padding: 16px 18px; min-width: 0; }
h2 { font-size: 17px; margin: 0; }
.card p { margin: 2px 0 6px; font-size: 14px; min-height: 2.9em; }
.plot { height: 300px; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; margin-top: 8px; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--edge);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
footer { margin-top: 24px; font-size: 13px; }
@media print { details > .scroll { display: block; } .card { break-inside: avoid; } }
$style</style>
</head>
<body>
<main>
<header><h1>$heading</h1><p>$subtitle</p></header>
$body
</main>
$scripts</body>
</html>
""")
