"""Decode the Secrets in which helm stores its releases. It sends them as protobuf messages.

The API server of the tests has no definitions of Kubernetes' messages. A Secret is simple enough to
be read field by field.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from rendering import Object

MARK = b"k8s\0"  # begins each protobuf message of Kubernetes
LABELS = 11  # number of the field of ObjectMeta


def decode_secret(message: bytes, namespace: str) -> Object:
    """Return the Secret in a message, as the object that its YAML would be.

    Of the options with which a Secret is deleted, returns nothing but the kind.

    namespace  namespace in the URL, because the message has none
    """
    unknown = dict(_fields(message.removeprefix(MARK)))  # 1: type of the object, 2: the object
    kind = dict(_fields(unknown[1]))[2].decode()
    if kind == "DeleteOptions":
        return {"kind": kind}
    assert kind == "Secret", f"only Secrets are decoded, got {kind}"
    body = list(_fields(unknown[2]))  # 1: metadata, 2: entries of data, 3: type
    metadata = list(_fields(dict(body)[1]))  # 1: name
    data = dict(_entry(value) for number, value in body if number == 2)
    names = {"name": dict(metadata)[1].decode(), "namespace": namespace}
    pairs = (_entry(value) for number, value in metadata if number == LABELS)
    labels = {name: value.decode() for name, value in pairs}
    return {
        "kind": "Secret",
        "apiVersion": "v1",
        "metadata": {**names, "labels": labels},
        "type": dict(body)[3].decode(),
        "data": {name: base64.b64encode(value).decode() for name, value in data.items()},
    }


def _entry(message: bytes) -> tuple[str, bytes]:
    """Return (name, value) of an entry of a map."""
    pair = dict(_fields(message))
    return pair[1].decode(), pair[2]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, contents) of the fields of a message that are strings, bytes or messages."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        tag = number()
        size = number()  # of a field that is a number: its value
        if tag & 7 == 2:
            yield tag >> 3, message[at : at + size]
            at += size
