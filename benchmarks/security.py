"""Measure what TLS with client certificates, and authorization, add to the standard exchange.

All contenders do the same steps of the standard work (docs/benchmarks.md), in turns, each with a
server of its own. All servers run on this machine, so no network hides the cost.

    plaintext   no TLS
    mTLS        TLS 1.3; client and server have certificates
    mTLS + authorization   the same, and a policy that grants the client pull and push of the table

"Bound" is the processor time that OpenSSL takes to encrypt and decrypt the bytes of an exchange at
both ends, in this process and during the same run. No library that encrypts them can be cheaper.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.report import Contender, Report, arguments, interleave, milliseconds
from benchmarks.servers import shards
from benchmarks.step import Trainer, fill
from benchmarks.work import Step, Work, keys_of, standard_work
from psclient import Client, Tls

TARGET = 0.10  # largest share that mTLS and authorization together may add
RECORD = 16 << 10  # bytes of a TLS record
ROUNDS = 12  # turns of each contender
POLICY = """
[principals.trainer]
certificates = ["dns:trainer.test"]
grants = [{ verbs = ["create", "pull", "push"], tables = ["standard"] }]
"""
AUTHORIZED = "mTLS + authorization"


class Certificates:
    """Certificates of a new CA for a server on this machine and a client, in files."""

    def __init__(self, directory: Path) -> None:
        ca = trustme.CA()
        self._paths = [directory / name for name in ("ca.crt", "server.pem", "client.pem")]
        ca.cert_pem.write_to_path(str(self._paths[0]))
        for path, name in zip(self._paths[1:], ("127.0.0.1", "trainer.test"), strict=True):
            ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))

    @property
    def flags(self) -> list[str]:
        """Flags of the server. One file has its key and its certificate."""
        ca, server, _ = map(str, self._paths)
        return ["--tls-ca", ca, "--tls-certificate", server, "--tls-key", server]

    @property
    def tls(self) -> Tls:
        """Files of the client."""
        ca, _, client = map(str, self._paths)
        return Tls(ca=ca, certificate=client, key=client)


def cipher(certificates: Certificates) -> str:
    """Return the name of the cipher that gRPC's client prefers, and so gets from gRPC's server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.flags[-1])
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["h2"])
    credentials = grpc.ssl_channel_credentials(certificates.tls.paths[0].read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with grpc.secure_channel(address, credentials) as channel:
            grpc.channel_ready_future(channel)
            plain, _ = listener.accept()
            with plain, context.wrap_socket(plain, server_side=True) as secured:
                found = secured.cipher()
    return found[0] if found else "unknown"


def sealing(name: str, seconds: float = 0.3) -> float:
    """Return the processor seconds to encrypt and to decrypt one byte of a TLS record.

    name  name of the cipher, which must be an AES-GCM
    """
    aead, nonce, record = AESGCM(bytes(16 if "128" in name else 32)), bytes(12), bytes(RECORD)
    count, end, start = 0, time.perf_counter() + seconds, time.thread_time()
    while time.perf_counter() < end:
        aead.decrypt(nonce, aead.encrypt(nonce, record, None), None)
        count += 1
    return (time.thread_time() - start) / (count * RECORD)


def size(step: Step, dim: int) -> int:
    """Return the bytes of the arrays of an exchange: request and reply."""
    n = len(step[1])
    return n * (8 + 4 + dim * 4) + n * 8 + n * dim * 4


def measure(report: Report, batch: int, rows: int, count: int) -> None:
    """Measure exchanges of one batch size.

    rows   rows of the table
    count  steps of each contender
    """
    work = Work(rows=rows, batch=batch)
    keys, steps = keys_of(np.arange(rows)), standard_work(work, 64)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))
        certificates, policy = Certificates(directory), directory / "policy.toml"
        policy.write_text(POLICY)
        flags: dict[str, list[str]] = {
            "plaintext": [],
            "mTLS": certificates.flags,
            AUTHORIZED: [*certificates.flags, "--policy-file", str(policy)],
        }
        contenders: dict[str, Contender] = {}
        for name, each in flags.items():
            addresses, _ = stack.enter_context(shards(1, flags=each))
            tls: Any = certificates.tls if each else False
            client = stack.enter_context(Client(addresses, lane="never", tls=tls))
            table = client.create_table("standard", work.dim, optimizer="adagrad", lr=0.05)
            fill(table, keys)
            contenders[name] = Trainer(table, keys, steps, "float32").exchange
        name = cipher(certificates)
        before = sealing(name)
        times = interleave(contenders, steps=count, rounds=ROUNDS)
        cost = min(before, sealing(name))
    bound = cost * float(np.median([size(each, work.dim) for each in steps]))
    conclude(report, batch, times, name, cost, bound)


def conclude(
    report: Report,
    batch: int,
    times: dict[str, list[float]],
    name: str,
    cost: float,
    bound: float,
) -> None:
    """Print the results of one batch size.

    times  seconds of each step, by contender
    name   name of the cipher
    cost   processor seconds to encrypt and decrypt one byte
    bound  the same for all bytes of an exchange
    """
    plain = turns(times["plaintext"])
    rows: list[dict[str, Any]] = []
    added = 0.0
    for each, seconds in times.items():
        ratio = float(np.median(turns(seconds) / plain))
        rows.append({"contender": each, **milliseconds(seconds), "x plaintext": ratio})
        added = ratio - 1
    report.section(f"exchange, B = {batch:,}", rows)
    share = bound / float(np.median(times["plaintext"]))
    verdict = "reached" if added <= TARGET else "missed"
    report.note(
        f"B = {batch:,}: {AUTHORIZED} adds {added:.1%}, target {TARGET:.0%}: {verdict}; encrypting"
        f" and decrypting its bytes with {name} takes {bound * 1e3:.3f} ms, {share:.1%}"
        f" ({1e-9 / cost:.1f} GB/s)"
    )


def turns(seconds: Sequence[float]) -> Any:
    """Return the median of each turn of a contender, so that those of one round are compared."""
    return np.array([np.median(each) for each in np.array_split(np.array(seconds), ROUNDS)])


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__).parse_args()
    report = Report("security", options.json)
    rows, count = (20_000, 240) if options.quick else (1_000_000, 1_200)
    for batch in (10_000, 1_000):
        measure(report, batch, rows, count)
    report.close()


if __name__ == "__main__":
    main()
