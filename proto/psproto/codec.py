"""Encode and decode the messages of ps.proto that carry arrays.

A protobuf library copies a ``bytes`` field when it parses it, and again at each access. Here the
arrays of a received message are views of its bytes, and arrays to send are copied only once. The
encoding is standard protobuf; an encoded message has this form:

    message  = *( header | padding | array | message )
    header   = tag length <small message, parsed by protobuf>
    padding  = tag length *7 zero              aligns the array that follows to its item size
    array    = tag length <little-endian items>
    length   = varint; for a nested message always five bytes, because its length is known only
               after it is written

Like any protobuf library, the decoder accepts fields in any order and unknown fields. It also
accepts arrays that are not aligned, which it copies.
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
    decode_stream_header,
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
    "decode_stream_header",
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

STEPS = 1 << 47  # the training step of a push must be in -STEPS..STEPS - 1
