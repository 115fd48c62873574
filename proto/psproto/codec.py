"""Arrays <-> the messages of ps.proto that carry them.

A protobuf library copies a ``bytes`` field when it parses and again at each access. Here arrays are
views of the received message, and are copied once into the one that is sent:

    message  = *( header | padding | array | message )
    header   = tag length <small message, parsed by protobuf>
    padding  = tag length *7 zero              aligns the array that follows to its item size
    array    = tag length <little-endian items>
    length   = varint; five bytes wide for messages, whose lengths are known only afterwards

Any field order, unknown fields and unaligned arrays (copied) are understood, as from any protobuf
library; tests hold both against each other.
"""

from __future__ import annotations

from psproto.decoding import (
    MOST_HEADER,
    decode_delete,
    decode_delta,
    decode_exchange,
    decode_exchanged,
    decode_pull,
    decode_pulled,
    decode_push,
    decode_rows,
    decode_stream_request,
    decode_stream_response,
)
from psproto.dtypes import (
    WIRE,
    Malformed,
    TooManyFields,
    from_wire,
    to_wire,
    to_wire_clamped,
    wire_dtype,
)
from psproto.encoding import (
    encode_delete,
    encode_delta,
    encode_exchange,
    encode_exchanged,
    encode_pull,
    encode_pulled,
    encode_push,
    encode_stream_request,
    encode_stream_response,
)
from psproto.fields import MOST_FIELDS, MOST_PARTS
from psproto.messages import (
    Delta,
    Exchange,
    Exchanged,
    Keys,
    Pulled,
    PullMessage,
    PushMessage,
    RowsMessage,
)

__all__ = [
    "MOST_FIELDS",
    "MOST_HEADER",
    "MOST_PARTS",
    "STEPS",
    "WIRE",
    "Delta",
    "Exchange",
    "Exchanged",
    "Keys",
    "Malformed",
    "PullMessage",
    "Pulled",
    "PushMessage",
    "RowsMessage",
    "TooManyFields",
    "decode_delete",
    "decode_delta",
    "decode_exchange",
    "decode_exchanged",
    "decode_pull",
    "decode_pulled",
    "decode_push",
    "decode_rows",
    "decode_stream_request",
    "decode_stream_response",
    "encode_delete",
    "encode_delta",
    "encode_exchange",
    "encode_exchanged",
    "encode_pull",
    "encode_pulled",
    "encode_push",
    "encode_stream_request",
    "encode_stream_response",
    "from_wire",
    "to_wire",
    "to_wire_clamped",
    "wire_dtype",
]

STEPS = 1 << 47  # the step of a push is in -STEPS..STEPS - 1
