"""Format the text of ``psserver serve --help``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from psserver.memory import show

METAVARS = {"dict[str,JSON]": "JSON", "int": "N", "float": "SECONDS", "str": "TEXT", "Path": "PATH"}


class HelpFormatter(argparse.HelpFormatter):
    """Formats ``--help``: sizes have units, and computed defaults read "from the memory limit"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        text = re.sub(r"\(default factory: .*\)", "(default: from the memory limit)", text)
        text = text.replace(" (default: null)", "").replace(" (default: {})", "")
        if action.dest.endswith("_bytes"):
            text = re.sub(r"\(default: (\d+)\)", _with_unit, text)
        return text

    def _metavar_formatter(
        self, action: argparse.Action, default_metavar: str
    ) -> Callable[[int], tuple[str, ...]]:
        kind = re.sub(r"[{}]|,null", "", str(action.metavar or default_metavar or ""))
        return lambda count: (METAVARS.get(kind, kind),) * count


def _with_unit(match: re.Match[str]) -> str:
    return f"(default: {match[1]}, {show(int(match[1]))})"
