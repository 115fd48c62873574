"""Rules of a table in command-line syntax: RULE, or RULE:PARAMETER=NUMBER,PARAMETER=NUMBER."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psclient.errors import InvalidArgument


def parse_rule(field: str, text: str) -> tuple[str, dict[str, float]]:
    """Parse a rule; return (name, parameters).

    field  name of the option, for errors

    Raises InvalidArgument if the syntax is wrong.

    >>> parse_rule("--optimizer", "adam:lr=0.01,beta1=0.8")
    ('adam', {'lr': 0.01, 'beta1': 0.8})
    """
    name, colon, parameters = text.partition(":")
    found: dict[str, float] = {}
    for each in parameters.split(",") if colon else []:
        parameter, equals, value = each.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not parameter or parameter in found:
            raise InvalidArgument(
                f"{field} must be RULE or RULE:PARAMETER=NUMBER,..., got {text!r}"
            )
        found[parameter] = number
    return name, found


def parse_rules(field: str, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Parse several rules; return {name: parameters}.

    field  name of the option, for errors

    Raises InvalidArgument if the syntax is wrong or a rule is repeated.
    """
    rules = dict(parse_rule(field, text) for text in texts)
    if len(rules) < len(texts):
        raise InvalidArgument(f"{field} must not repeat a rule, got {', '.join(texts)}")
    return rules


def rule_text(name: str, parameters: Mapping[str, float]) -> str:
    """Format a rule as ``parse_rule`` reads it: "adam:beta1=0.8,lr=0.01"."""
    numbers = ",".join(f"{each}={value:g}" for each, value in sorted(parameters.items()))
    return f"{name}:{numbers}" if numbers else name
