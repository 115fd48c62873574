"""What all psctl commands share: options, connection, output, errors.

To add a command: decorate a function with ``command()`` in the file of its group. Its first
parameter is a Session, the others are options and arguments of typer. The decorator adds the
options in SHARED. The first line of the docstring appears in the list of commands of ``psctl
--help``. Let the function compute first, and print what it found with ``Session.show`` last.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from psclient.access import Access, Security
from psclient.addresses import checked_where, is_name
from psclient.client import Client
from psclient.errors import DeadlineExceeded, InvalidArgument, PsError, Unavailable
from psclient.status import ShardStatus, Watch, status
from psclient.tls import Tls
from psclient.tools.commands import exits, output
from psclient.tools.commands.exits import Exit
from psclient.tools.commands.output import Output

CHECK_SECONDS = 1.0  # time to find out why a server is not reached
DEFAULT = "127.0.0.1:7000"
Servers = Annotated[
    str,
    typer.Option(
        envvar="PSCTL_SERVERS",
        help="Addresses of all shards, in the order of their numbers: HOST:PORT,HOST:PORT,... Or"
        " one NAME:PORT, if the DNS name has the addresses of all shards.",
    ),
]
OutputOption = Annotated[
    Output,
    typer.Option(help="Format of the output: text to read, or JSON (see docs/psctl.md)."),
]
TlsCa = Annotated[
    str,
    typer.Option(
        envvar="PSCLIENT_TLS_CA",
        help="File with the certificates of the CAs that sign the servers' certificates, in PEM."
        " With it, psctl uses TLS.",
    ),
]
TlsCertificate = Annotated[
    str,
    typer.Option(
        envvar="PSCLIENT_TLS_CERTIFICATE",
        help="File with the certificate that tells the servers who you are, in PEM.",
    ),
]
TlsKey = Annotated[
    str,
    typer.Option(
        envvar="PSCLIENT_TLS_KEY",
        help="File with the private key of --tls-certificate, in PEM and without a password.",
    ),
]
TlsName = Annotated[
    str,
    typer.Option(
        envvar="PSCLIENT_TLS_NAME",
        help="Name that the servers' certificates must have, instead of the host in --servers.",
    ),
]
TokenFile = Annotated[
    str,
    typer.Option(
        envvar="PSCLIENT_TOKEN_FILE",
        help="File with the token that tells the servers who you are.",
    ),
]
TokenInPlaintext = Annotated[
    bool,
    typer.Option(
        "--token-in-plaintext",
        help="Send the token without TLS to other machines, where others may be able to read it.",
    ),
]
SHARED: dict[str, tuple[Any, Any]] = {  # options of all commands: (annotation, default) by field
    "output": (OutputOption, Output.TEXT),  # of Session
    "servers": (Servers, DEFAULT),
    "tls_ca": (TlsCa, ""),
    "tls_certificate": (TlsCertificate, ""),
    "tls_key": (TlsKey, ""),
    "tls_name": (TlsName, ""),
    "token_file": (TokenFile, ""),
    "token_in_plaintext": (TokenInPlaintext, False),
}
WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or the copy that typer has


@dataclass(slots=True, kw_only=True)
class Session:
    """One run of a command: how it reaches the cluster, and how it prints.

    servers             value of --servers
    output              value of --output
    tls_ca, tls_certificate, tls_key, tls_name, token_file, token_in_plaintext
                        values of the options of these names; "": not given
    """

    servers: str
    output: Output
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_name: str = ""
    token_file: str = ""
    token_in_plaintext: bool = False

    @property
    def addresses(self) -> str | list[str]:
        """Return the value of --servers as ``Client`` takes it: one name, or addresses."""
        listed = [each.strip() for each in self.servers.split(",")]
        return listed[0] if len(listed) == 1 and is_name(listed[0]) else listed

    @property
    def security(self) -> Security:
        """Return the arguments of ``Client`` for TLS and the token."""
        given = self.tls_ca, self.tls_certificate, self.tls_key, self.tls_name
        tls: Tls | Literal[False] = False
        if any(given):
            ca, certificate, key, name = given
            try:
                tls = Tls(ca=ca, certificate=certificate, key=key, name=name)
            except InvalidArgument as error:
                raise typer.BadParameter(str(error), param_hint="--tls-...") from None
        return {
            "tls": tls,
            "token_file": self.token_file,
            "token_in_plaintext": self.token_in_plaintext,
        }

    @property
    def access(self) -> Access:
        """Return how to connect to the servers."""
        return Access(**self.security)

    def status(self, timeout: float = 5.0) -> list[ShardStatus]:
        """Ask every shard for its state, at most ``timeout`` seconds. Works if some are down."""
        return status(self.addresses, timeout=timeout, access=self.access)

    def watch(self) -> Watch:
        """Return a Watch, to ask every shard for its state again and again. It must be closed."""
        return Watch(self.addresses, self.access)

    @contextmanager
    def client(self, timeout: float | None = None) -> Iterator[Client]:
        """Connect to the shards and yield a client.

        timeout  seconds for each call; None: the default of ``Client``

        If a shard is unreachable at the start, this raises Unavailable or TlsError within seconds.
        If it becomes unreachable later, the client retries until its timeout, because a restore
        restarts the shards.
        """
        try:
            shards = checked_where(self.addresses)
        except InvalidArgument as error:
            raise typer.BadParameter(str(error), param_hint="--servers") from None
        limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        with Client(shards, **limit, **self.security) as client:
            for each in status(shards, **limit, access=self.access):
                if each.state == "unreachable":
                    _require_credentials(shards, self.security)
                    raise Unavailable(f"shard {each.shard} is unreachable: {each.problem}")
            yield client

    def show(self, data: Any, text: Callable[[], Any]) -> None:
        """Print the result of the command: ``data`` as JSON, or text by calling ``text``."""
        if self.output is Output.JSON:
            output.print_json(data)
        else:
            text()

    def line(self, data: Any, text: Callable[[], Any]) -> None:
        """Print one of many results, at once: ``data`` as a line of JSON, or by ``text``."""
        if self.output is Output.JSON:
            output.print_line(data)
        else:
            text()

    def note(self, text: str) -> None:
        """Print a remark to stderr."""
        output.print_note(text, self.output)

    def confirm(self, question: str) -> None:
        """Ask the user a question on stderr; end the command unless the answer is yes."""
        if self.output is Output.JSON:
            raise typer.BadParameter(f"--output json does not ask {question!r}: add --yes")
        typer.confirm(question, abort=True, err=True)


def _require_credentials(shards: str | list[str], security: Security) -> None:
    """Raise the error of a shard that is reached, but does not accept the client's credentials."""
    unreached = suppress(Unavailable, DeadlineExceeded)
    with Client(shards, timeout=CHECK_SECONDS, **security) as client, unreached:
        client._connect()


class Group(TyperGroup):
    """The command psctl. Prints all errors about arguments as the other errors of psctl."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run psctl with the words ``args``, and end the process with an exit status.

        The arguments are those of TyperGroup.main. ``standalone_mode=False`` returns the status.
        """
        words = list(sys.argv[1:] if args is None else args)
        status = self._main(words, prog_name, complete_var, extra)
        if standalone_mode:
            sys.exit(status)
        return status

    def _main(
        self, words: list[str], prog_name: str | None, variable: str | None, extra: dict[str, Any]
    ) -> int:
        """Run psctl; return its exit status. The arguments are those of ``main``."""
        form = output.asked(words)
        try:
            done = super().main(words, prog_name, variable, standalone_mode=False, **extra)
        except WrongUsage as error:
            if form is Output.TEXT:
                error.show()  # type: ignore[attr-defined]
            else:
                said = error.format_message()  # type: ignore[attr-defined]
                output.print_error(error, said, Exit.USAGE, form)
            return Exit.USAGE
        except typer.Abort as error:
            output.print_error(error, "aborted: nothing was changed", Exit.FAILED, form)
            return Exit.FAILED
        return int(done or Exit.OK)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(
    help="Operate a parameter-server cluster: tables, checkpoints, files, analyses."
    f"\n\n\b\nExit status:\n{exits.listed()}"
)
def _group() -> None:
    """Do nothing before the command."""


def command(
    name: str | None = None, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to psctl, as a command. Its first parameter is a Session.

    name      name of the command; None: the name of the function
    settings  arguments of ``typer.Typer.command``
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(each, keyword, default=default, annotation=kind)
            for each, (kind, default) in SHARED.items()
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            session = Session(**{each: values.pop(each) for each in SHARED})
            with reported(session):
                function(session, **values)

        signature = inspect.Signature([*own, *shared])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
        app.command(name, **settings)(run)
        return function

    return add


@contextmanager
def reported(session: Session) -> Iterator[None]:
    """Turn an error in the block into one line on stderr and an exit status; end the process."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, PsError, OSError) as error:
        status = exits.exit_of(error)
        text = "interrupted" if status is Exit.INTERRUPTED else str(error)
        output.print_error(error, text, status, session.output)
        raise typer.Exit(status) from None
