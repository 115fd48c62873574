"""More pushes than a server takes: each is applied once or refused as a whole."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from servers import free_ports, serve

from psclient import Client
from psclient.errors import ResourceExhausted

THREADS, PUSHES, KEYS, DIM = 6, 12, 1500, 32  # a push has 200 KB; so 5 fit into the limit
MIB = 1 << 20


@pytest.mark.slow
def test_each_push_is_applied_once_or_refused_with_a_delay() -> None:
    port = free_ports(1)
    process = serve(
        "--port", str(port), "--metrics-port", "0",
        "--max-message-bytes", str(MIB), "--max-inflight-bytes", str(MIB),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    keys, served = np.arange(KEYS), list[int]()
    refused: list[tuple[str, float | None]] = []
    ones = np.ones((KEYS, DIM), np.float32)
    where = [f"127.0.0.1:{port}"]

    def push(client: Client) -> None:
        for _ in range(PUSHES):
            try:
                client.push({"t": (keys, ones)})
                served.append(1)
            except ResourceExhausted as error:
                refused.append((error.reason, error.retry_after))

    try:
        with Client(where, lane="never", timeout=300.0) as patient:
            table = patient.create_table("t", DIM, optimizer="sgd", lr=1.0, initializer="zeros")
            clients = [Client(where, lane="never", retry_refused=False) for _ in range(3)]
            threads = [
                threading.Thread(target=push, args=(client,))
                for client in (patient, *clients)
                for _ in range(THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for client in clients:
                client.close()
            rows = table.pull(keys)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert len(served) + len(refused) == len(threads) * PUSHES
    assert len(served) >= THREADS * PUSHES  # the patient client's are all served
    assert {reason for reason, _ in refused} <= {"OVERLOADED"}
    assert all(delay is not None and delay > 0 for _, delay in refused)
    assert np.array_equal(rows, np.full((KEYS, DIM), -len(served), np.float32))
