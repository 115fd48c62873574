"""Measure what TLS with client certificates, and authorization, add to the standard exchange.

All contenders do the same steps of the standard work (docs/benchmarks.md), in turns, each with a
server of its own. In each round they come in a different random order: what ran before changes what
is in the caches of the processor. All servers run on this machine, so no network hides the cost.

    plaintext   no TLS
    mTLS        TLS 1.3; client and server have certificates
    mTLS + authorization   the same, and a policy that grants the client pull and push of the table
    echo        a bare gRPC server without our code. Request and reply have as many bytes as those
                of an exchange
    ... again   one more server of the same kind. Its difference to the first is noise: where their
                memory happens to be makes servers differ. Comparisons use the mean of the two

Two bounds are measured in the same run. "Cipher" is the processor time that OpenSSL takes to
encrypt and decrypt the bytes of an exchange at both ends, in this process. "gRPC" is what mTLS adds
to the echo. It cannot be lower without a change in gRPC.

"check" is the time of the check of rights itself, which a server does for each exchange.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benchmarks.report import Report, arguments, milliseconds
from benchmarks.servers import cpu, echo, shards
from benchmarks.step import Trainer, fill
from benchmarks.wire import NO_LIMIT, Stream
from benchmarks.work import Step, Work, keys_of, standard_work
from psclient import Client, Tls
from psproto import codec
from psproto import ps_pb2 as pb
from psserver.security.guard import Guard, Proof
from psserver.security.policyfile import PolicyFile

TARGET = 0.10  # largest share that mTLS and authorization together may add
RECORD = 16 << 10  # bytes of a TLS record
ROUNDS = 24  # turns of each contender
WARM = 8  # steps at the start of each turn that are not measured
POLICY = """
[principals.trainer]
certificates = ["dns:trainer.test"]
grants = [{ verbs = ["create", "pull", "push"], tables = ["standard"] }]
"""
PLAIN, MTLS, AUTHORIZED, AGAIN = "plaintext", "mTLS", "mTLS + authorization", " again"
ECHO, ECHO_MTLS = "echo", "echo with mTLS"


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


def size(step: Step, dim: int) -> tuple[int, int]:
    """Return the bytes of the arrays of an exchange: (of the request, of the reply)."""
    n = len(step[1])
    return n * (8 + 4 + dim * 4) + n * 8, n * dim * 4


@dataclass
class Contender:
    """One of those that are compared.

    step  does one step; called with its number
    pid   process id of its server

    rounds  median seconds of a step, by round
    times   seconds of each step
    used    processor seconds of client and server together
    """

    step: Callable[[int], Any]
    pid: int
    rounds: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    used: float = 0.0
    done: int = 0  # number of its steps

    def turn(self, count: int) -> None:
        """Do ``count`` steps that are measured, after WARM others."""
        used = cpu(self.pid) + time.process_time()
        times = []
        for _ in range(WARM + count):
            start = time.perf_counter()
            self.step(self.done)
            times.append(time.perf_counter() - start)
            self.done += 1
        self.used += cpu(self.pid) + time.process_time() - used
        self.rounds.append(float(np.median(times[WARM:])))
        self.times += times[WARM:]


class Servers:
    """The servers of all contenders, and the tables in them.

    rows   rows of each table
    stack  stops the servers
    """

    def __init__(self, rows: int, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-")))
        self.certificates, self.policy = Certificates(directory), directory / "policy.toml"
        self.policy.write_text(POLICY)
        self.work, self.keys = Work(rows=rows, batch=0), keys_of(np.arange(rows))
        tls = self.certificates.flags
        kinds = {PLAIN: [], MTLS: tls, AUTHORIZED: [*tls, "--policy-file", str(self.policy)]}
        self._tables: dict[str, tuple[Any, int]] = {}
        for name in (*kinds, PLAIN + AGAIN, MTLS + AGAIN):
            flags = kinds[name.removesuffix(AGAIN)]
            addresses, pids = stack.enter_context(shards(1, flags=flags))
            access: Any = self.certificates.tls if flags else False
            client = stack.enter_context(Client(addresses, lane="never", tls=access))
            table = client.create_table("standard", self.work.dim, optimizer="adagrad", lr=0.05)
            fill(table, self.keys)
            self._tables[name] = table, pids[0]
        self._echoes: dict[str, tuple[Stream, int]] = {}
        for name in (ECHO, ECHO_MTLS, ECHO + AGAIN, ECHO_MTLS + AGAIN):
            files = (tls[1], tls[3]) if name.startswith(ECHO_MTLS) else ()
            address, pid = stack.enter_context(echo(*files))
            stream = Stream(
                stack.enter_context(self._channel(address, bool(files))), "/Echo/Stream"
            )
            stack.callback(stream.close)
            self._echoes[name] = stream, pid

    def _channel(self, address: str, secure: bool) -> grpc.Channel:
        if not secure:
            return grpc.insecure_channel(address, options=NO_LIMIT)
        ca, own, _ = (path.read_bytes() for path in self.certificates.tls.paths)
        credentials = grpc.ssl_channel_credentials(ca, own, own)
        return grpc.secure_channel(address, credentials, options=NO_LIMIT)

    def contenders(self, steps: list[Step]) -> dict[str, Contender]:
        """Return the contenders for these steps."""
        found = {
            name: Contender(Trainer(table, self.keys, steps, "float32").exchange, pid)
            for name, (table, pid) in self._tables.items()
        }
        sizes = [size(step, self.work.dim) for step in steps]
        messages = [reply.to_bytes(4, "little") + b"\0" * (sent - 4) for sent, reply in sizes]
        for name, (stream, pid) in self._echoes.items():
            found[name] = Contender(partial(_send, stream, messages), pid)
        return found

    def check(self, seconds: float = 0.3) -> float:
        """Return the seconds that the check of rights of an exchange takes."""
        guard = Guard(PolicyFile(self.policy))
        actor = guard.of_lane(Proof(b"", "dns:trainer.test", "dns:trainer.test"), "here")
        none, floats = np.zeros(0, np.uint64), np.zeros(0, np.float32)
        exchange = codec.Exchange(
            [codec.PushMessage(pb.PushHeader(table="standard"), none, None, floats)],
            [codec.PullMessage(pb.PullHeader(table="standard"), none)],
        )
        checked = actor.checking(lambda _, __: (None, exchange))
        count, end, start = 0, time.perf_counter() + seconds, time.thread_time()
        while time.perf_counter() < end:
            for _ in range(100):
                checked(b"", 0)
            count += 100
        return (time.thread_time() - start) / count


def _send(stream: Stream, messages: list[bytes], i: int) -> None:
    stream(messages[i % len(messages)])


def measure(report: Report, servers: Servers, batch: int, count: int) -> None:
    """Measure exchanges of one batch size.

    count  steps of each contender
    """
    steps = standard_work(Work(rows=servers.work.rows, batch=batch), 64)
    contenders = servers.contenders(steps)
    name = cipher(servers.certificates)
    before, rng = sealing(name), np.random.default_rng(batch)
    for _ in range(ROUNDS):
        for each in rng.permutation(list(contenders)):
            contenders[each].turn(count // ROUNDS)
    cost = min(before, sealing(name))
    sealed = cost * float(np.median([sum(size(step, servers.work.dim)) for step in steps]))
    report.section(f"exchange, B = {batch:,}", [_row(contenders, each) for each in contenders])
    plain = float(np.median(rounds(contenders, PLAIN)))
    added = ratio(contenders, AUTHORIZED) - 1
    more = rounds(contenders, ECHO_MTLS) - rounds(contenders, ECHO)
    grpc_adds = float(np.median(more / rounds(contenders, PLAIN)))
    report.note(
        f"B = {batch:,}: {AUTHORIZED} adds {added:.1%}, target {TARGET:.0%}:"
        f" {'reached' if added <= TARGET else 'missed'}. Bounds: cipher {sealed / plain:.1%}"
        f" ({name}, {sealed * 1e3:.3f} ms, {1e-9 / cost:.1f} GB/s), gRPC {grpc_adds:.1%}"
        f" ({grpc_adds * plain * 1e3:.3f} ms)"
    )
    report.note(
        f"B = {batch:,}: mTLS adds {ratio(contenders, MTLS) - 1:.1%}; authorization / mTLS"
        f" {ratio(contenders, AUTHORIZED, MTLS):.3f}, mTLS again / both mTLS"
        f" {ratio(contenders, MTLS + AGAIN, MTLS):.3f}; the check itself takes"
        f" {servers.check() * 1e6:.2f} us"
    )


def _row(contenders: dict[str, Contender], name: str) -> dict[str, Any]:
    """Return the row of a contender in the report; the ratio is that to plaintext, or to echo."""
    one = contenders[name]
    base = ECHO if name.startswith(ECHO) else PLAIN
    return {
        "contender": name,
        **milliseconds(one.times),
        "processor ms": one.used / one.done * 1e3,
        "ratio": float(np.median(one.rounds / rounds(contenders, base))),
    }


def rounds(contenders: dict[str, Contender], name: str) -> Any:
    """Return the seconds of a step in each round: the mean of all servers of this kind."""
    return np.mean(
        [contenders[each].rounds for each in (name, name + AGAIN) if each in contenders], 0
    )


def ratio(contenders: dict[str, Contender], name: str, base: str = PLAIN) -> float:
    """Return the time of a contender divided by that of ``base``: the median over the rounds."""
    return float(np.median(rounds(contenders, name) / rounds(contenders, base)))


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__).parse_args()
    report = Report("security", options.json)
    rows, count = (20_000, 240) if options.quick else (500_000, 960)
    with ExitStack() as stack:
        servers = Servers(rows, stack)
        for batch in (10_000, 1_000):
            measure(report, servers, batch, count)
    report.close()


if __name__ == "__main__":
    main()
