"""Find out who calls, and refuse what the policy does not allow.

The Guard of a server has the present policy. It makes one Actor for each call, stream and
connection of the same-host lane. A call with a bearer token acts for the principal of the token;
any other call acts for the principal of its client certificate, which gRPC has verified. Without a
policy file, everybody may do everything.

When the policy changes, the Guard looks at each stream and subscription that is open. It ends those
whose credential is no longer valid, or which have used a right that their principal no longer has.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import Message

from psproto import codec
from psserver.errors import PermissionDenied, Refused, Unauthenticated
from psserver.loops import post
from psserver.security.audit import Audit
from psserver.security.budgets import Budget
from psserver.security.policy import KEPT, Policy, Principal
from psserver.security.policyfile import PolicyFile
from psserver.security.verbs import ANY, LANE, METHODS

AUTHORIZATION = "authorization"  # metadata with the bearer token
LONGEST_TOKEN = 4096  # characters
NO_CREDENTIALS = (
    "the call has no credentials: expected the metadata 'authorization: Bearer TOKEN' (psclient and"
    " psctl send it with token_file), or a client certificate with a name in the policy"
)
CERTIFICATE = "x509_pem_cert"  # property of gRPC's authentication context

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Decode = Callable[[Any, int], tuple[Any, "codec.Exchange | Exception"]]


class Proof(NamedTuple):
    """A valid credential: the SHA-256 of a token, or a client certificate; the other is empty.

    certificate  name in the certificate by which the principal was found
    shown        the credential in the audit log
    names        all names in the certificate
    """

    digest: bytes
    certificate: str
    shown: str
    names: tuple[str, ...] = ()


NOBODY = Proof(b"", "", "")


class Actor:
    """Who is behind one call, stream, subscription or connection of the same-host lane.

    name     name of the principal; "": there is no policy
    proof    its credential
    peer     address of the client, from gRPC
    method   full name of the method
    budget   counts what the principal uses; None: it has no limits
    revoked  error with which the policy has ended this stream; None: it has not

    Its checks may be used on any thread; they raise PermissionDenied.
    """

    __slots__ = (
        "_guard",
        "_known",
        "_principal",
        "_task",
        "budget",
        "method",
        "name",
        "peer",
        "proof",
        "revoked",
    )

    def __init__(
        self,
        guard: Guard,
        method: str,
        peer: str,
        principal: Principal | None = None,
        proof: Proof = NOBODY,
        budget: Budget | None = None,
    ) -> None:
        self._guard = guard
        self._principal = principal
        self._task: asyncio.Task[Any] | None = None
        self._known: dict[str, set[str]] = {}  # rights found so far: verb -> tables
        if principal is not None:
            self._known |= {"pull": set(), "push": set()}
        self.name = "" if principal is None else principal.name
        self.proof = proof
        self.peer = peer
        self.method = method
        self.budget = budget
        self.revoked: Refused | None = None

    @property
    def credential(self) -> str:
        """The credential as the audit log shows it, for example "cn:trainer"."""
        return self.proof.shown

    # ---- rights

    def holds(self, verb: str, table: str = "") -> bool:
        """Return whether the principal has the right (verb, table)."""
        return self._principal is None or self._principal.holds(verb, table)

    def require(self, request: Any) -> None:
        """Require the rights that the decoded request of this method needs."""
        needs = METHODS[self.method].needs
        if self._principal is not None and needs is not None:
            for verb, table in needs(request):
                self.require_right(verb, table)

    def require_right(self, verb: str, table: str) -> None:
        """Require the right (verb, table)."""
        if (error := self._look(verb, table)) is not None:
            raise error

    def refusal(self, exchange: codec.Exchange) -> PermissionDenied | None:
        """Return the error for an exchange that pushes to or pulls from a table without the right;
        None: all of it is allowed.
        """
        if self._principal is None:
            return None
        pushes, pulls = self._known["push"], self._known["pull"]
        for push in exchange.pushes:
            if (table := push.header.table) not in pushes and (error := self._look("push", table)):
                return error
        for pull in exchange.pulls:
            if (table := pull.header.table) not in pulls and (error := self._look("pull", table)):
                return error
        return None

    def checking(self, decode: Decode) -> Decode:
        """Return ``decode`` with a check of the rights: it returns the error instead of an exchange
        that is not allowed. Without a policy, return ``decode`` itself.
        """
        if self._principal is None:
            return decode

        def checked(message: Any, budget: int) -> tuple[Any, codec.Exchange | Exception]:
            header, exchange = decode(message, budget)
            if isinstance(exchange, Exception):
                return header, exchange
            return header, self.refusal(exchange) or exchange

        return checked

    def _look(self, verb: str, table: str) -> PermissionDenied | None:
        """Return None if the principal has the right (verb, table), and remember that it used it;
        else return the error.
        """
        while (principal := self._principal) is not None:
            if not principal.holds(verb, table):
                return self._guard.denied(self, verb, table)
            known = self._known.setdefault(verb, set())
            if len(known) < KEPT:
                known.add(table)
            if principal is self._principal:
                return None
            known.discard(table)  # the policy has changed meanwhile
        return None

    # ---- streams

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End this task when the policy no longer allows what it did, while the block runs.

        The block then raises PermissionDenied or Unauthenticated.
        """
        if self._principal is None:
            yield
            return
        self._task = asyncio.current_task()
        self._guard.watching.add(self)
        try:
            yield
        except asyncio.CancelledError:
            if self.revoked is None:
                raise
            raise self.revoked from None
        finally:
            self._guard.watching.discard(self)

    def renew(self, policy: Policy) -> None:
        """Act by another policy from now on, or end the task if it does not allow what it did."""
        principal = _principal_of(policy, self.proof)
        if principal is None or principal.name != self.name:
            self._revoke(Unauthenticated(f"the credential of {self.name!r} was revoked"))
            return
        used = [(verb, table) for verb, tables in self._known.items() for table in list(tables)]
        lost = next((right for right in used if not principal.holds(*right)), None)
        verbs = METHODS[self.method].verbs
        if lost is None and not _holds_any(principal, verbs):
            lost = verbs[0], ""
        if lost is not None:
            self._revoke(self._guard.denied(self, *lost))
        else:
            self._principal = principal
            self.budget = self._guard.budget_of(principal)

    def _revoke(self, error: Refused) -> None:
        self.revoked = error
        if self._task is not None:
            self._task.cancel()

    # ---- audit

    def recorded(self, request: Message) -> AbstractAsyncContextManager[None]:
        """Return a context that records how its block ends, if the method is audited."""
        rule, audit = METHODS[self.method], self._guard.audit
        if audit is None or not rule.audited:
            return nullcontext()
        tables = [] if rule.needs is None else [table for _, table in rule.needs(request)]
        details = {name: _value(request, name) for name in rule.details}
        return audit.recorded(self, list(dict.fromkeys(tables)), details)

    def recorded_rows(self, table: str, count: int) -> AbstractAsyncContextManager[None]:
        """Return a context that records how its block ends, which changes rows of a table.

        count  number of keys or rows in the request
        """
        audit = self._guard.audit
        if audit is None:
            return nullcontext()
        return audit.recorded(self, [table], {"rows": count})


class Guard:
    """Authenticates and authorizes the callers of one server.

    file   policy file; None: everybody may do everything
    audit  audit log; None: nothing is recorded

    watching  actors of the open streams and subscriptions
    refused   reason -> number of refused calls and requests

    Must be used on the event loop, except ``denied``.
    """

    def __init__(self, file: PolicyFile | None = None, audit: Audit | None = None) -> None:
        self.file = file
        self.audit = audit
        self.watching: set[Actor] = set()
        self.refused = dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED", "BUDGET_EXCEEDED"), 0)
        self._policy = None if file is None else file.first
        self._budgets: dict[str, Budget] = {}
        if self._policy is not None:
            self._take_budgets(self._policy)

    def open(self) -> None:
        """Follow changes of the policy file from now on."""
        if self.file is not None:
            self.file.open(partial(post, asyncio.get_running_loop(), self.take))

    def close(self) -> None:
        """Stop to follow the policy file, and close the audit log."""
        if self.file is not None:
            self.file.close()
        if self.audit is not None:
            self.audit.close()

    def take(self, policy: Policy) -> None:
        """Use another policy from now on, and end the streams that it does not allow."""
        self._policy = policy
        self._take_budgets(policy)
        for actor in list(self.watching):
            actor.renew(policy)

    def actor(self, method: str, context: Context, peer: str) -> Actor:
        """Return who calls a method.

        method  full name, for example "/ps.v1.RowService/Pull"
        peer    ``context.peer()``

        Raises Unauthenticated without a valid credential, and PermissionDenied if the principal has
        none of the verbs that the method needs.
        """
        policy = self._policy
        if policy is None or not (verbs := METHODS[method].verbs):
            return Actor(self, method, peer)
        try:
            proof, principal = _authenticate(policy, context)
        except Unauthenticated:
            self._refuse(Actor(self, method, peer), "UNAUTHENTICATED", "", "")
            raise
        actor = Actor(self, method, peer, principal, proof, self.budget_of(principal))
        if not _holds_any(principal, verbs):
            raise self.denied(actor, verbs[0], "")
        return actor

    def of_lane(self, proof: Proof, peer: str) -> Actor:
        """Return who uses a connection of the same-host lane.

        proof  credential of the client that asked the server for the lane
        """
        policy, method = self._policy, LANE
        if policy is None:
            return Actor(self, method, peer)
        principal = _principal_of(policy, proof)
        if principal is None:
            self._refuse(Actor(self, method, peer), "UNAUTHENTICATED", "", "")
            raise Unauthenticated("the credential with which the client got the lane was revoked")
        return Actor(self, method, peer, principal, proof, self.budget_of(principal))

    def budget_of(self, principal: Principal) -> Budget | None:
        """Return what counts the use of a principal; None: it has no limits."""
        return self._budgets.get(principal.name)

    def knows(self, proof: Proof) -> bool:
        """Return whether the present policy accepts a credential; without a policy, all are."""
        return self._policy is None or _principal_of(self._policy, proof) is not None

    def denied(self, actor: Actor, verb: str, table: str) -> PermissionDenied:
        """Count and record a refused attempt; return its error. Any thread may call this."""
        self._refuse(actor, "PERMISSION_DENIED", verb, table)
        return PermissionDenied(actor.name, verb, table)

    def _refuse(self, actor: Actor, reason: str, verb: str, table: str) -> None:
        self.refused[reason] += 1
        if self.audit is not None:
            self.audit.refused(actor, reason, verb, table)

    def _count_exceeded(self) -> None:
        self.refused["BUDGET_EXCEEDED"] += 1

    def _take_budgets(self, policy: Policy) -> None:
        """Keep a budget for each principal with limits; counts of known principals stay."""
        budgets = {}
        for name, principal in policy.principals.items():
            budget, limit = self._budgets.get(name), principal.limit
            if budget is not None and budget.limits != limit:
                budget.limit(limit)
            if not limit.unlimited:
                budgets[name] = budget or Budget(name, limit, self._count_exceeded)
        self._budgets = budgets


def _authenticate(policy: Policy, context: Context) -> tuple[Proof, Principal]:
    """Return credential and principal of a call. Raises Unauthenticated."""
    tokens = [value for key, value in context.invocation_metadata() or () if key == AUTHORIZATION]
    if tokens:
        proof = _token_proof(tokens)
        if (principal := policy.of_token(proof.digest)) is None:
            raise Unauthenticated("no principal of the policy has this bearer token")
        return proof, principal
    names = _names(context.auth_context())
    if not names:
        raise Unauthenticated(NO_CREDENTIALS)
    if (found := policy.of_certificate(names)) is None:
        raise Unauthenticated(
            "the names in the client certificate must belong to exactly one principal of the"
            f" policy, got {', '.join(names)[:512]!a}"
        )
    return Proof(b"", found[0], found[0], names), found[1]


def _token_proof(values: Sequence[str | bytes]) -> Proof:
    """Return the digest of the bearer token in the values of the metadata ``authorization``."""
    value = values[0] if isinstance(values[0], str) else values[0].decode(errors="replace")
    scheme, _, token = value.partition(" ")
    token = token.strip(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not 0 < len(token) <= LONGEST_TOKEN:
        raise Unauthenticated(
            "metadata 'authorization' must be given once, and be 'Bearer TOKEN', with a token of at"
            f" most {LONGEST_TOKEN} characters"
        )
    digest = hashlib.sha256(token.encode()).digest()
    return Proof(digest, "", f"token:{digest.hex()[:8]}")


def _names(properties: Any) -> tuple[str, ...]:
    """Return the names in the verified client certificate of a call, such as "dns:a.example".

    properties  gRPC's authentication context: name of a property -> its values

    The names are read from the certificate itself: in the properties, gRPC cuts a name off at its
    first NUL, so that a certificate for "a.example\\0.evil.example" would pass for a.example.
    Raises Unauthenticated if the certificate cannot be read.
    """
    certificate = properties.get(CERTIFICATE)
    if not certificate:
        return ()
    from psserver.security import pem  # imports a large package, only if TLS is used

    try:
        return pem.client_names(certificate[0])
    except ValueError as error:
        raise Unauthenticated("the names in the client certificate cannot be read") from error


def _principal_of(policy: Policy, proof: Proof) -> Principal | None:
    """Return the principal whose credential ``proof`` is, by a newer policy."""
    if proof.digest:
        return policy.of_token(proof.digest)
    found = policy.of_certificate(proof.names or (proof.certificate,))
    return None if found is None else found[1]


def _holds_any(principal: Principal, verbs: Sequence[str]) -> bool:
    """Return whether a principal has one of the verbs, on any table."""
    return any(verb in principal.verbs or (verb == ANY and principal.verbs) for verb in verbs)


def _value(request: Any, name: str) -> Any:
    """Return a field of a request for a record: a number, a text, a list, or the name of an enum's
    value.
    """
    value, field = getattr(request, name), request.DESCRIPTOR.fields_by_name[name]
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    return list(value) if field.is_repeated else value


def guard_of(policy: Path | None, audit: Path | None, shard: int) -> Guard:
    """Return the guard for the settings policy_file and audit_file. Raises ConfigError.

    With a policy but without an audit file, the audit log is a part of the server's log.
    """
    file = None if policy is None else PolicyFile(policy)
    recorded = policy is not None or audit is not None
    return Guard(file, Audit(audit, shard) if recorded else None)
