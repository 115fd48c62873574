"""Put the status page into one HTML file that refers to nothing outside.

Its Content-Security-Policy lets a browser run and apply nothing but the scripts and styles in it,
by their hashes, and connect to nothing but the server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

_FILES = Path(__file__).parent
_STYLES = ("uPlot.min.css", "page.css")
_SCRIPTS = ("uPlot.iife.min.js", "figures.js", "plots.js", "page.js")


def _read(names: tuple[str, ...]) -> str:
    return "\n".join((_FILES / name).read_text().strip() for name in names)


def _hash(text: str) -> str:
    """Return the source expression of a policy for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _read(_STYLES), _read(_SCRIPTS)
PAGE = (
    (_FILES / "page.html")
    .read_text()
    .replace("\nlicence -->", f"\n{_read(('uPlot.LICENSE.txt',))} -->")
    .replace("/* style */", _STYLE)
    .replace("/* script */", _SCRIPT)
    .encode()
)
POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)};"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
