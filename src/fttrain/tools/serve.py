"""`ftlaunch serve`: one model or two on a port."""

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.tools import ServeOptions
from fttrain.tools.chat import base_of, load, recorded_dtype
from fttrain.tools.output import run

TOKEN = "FTLAUNCH_SERVE_TOKEN"
"""Variable with the token that is asked for beyond this machine."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def main(options: ServeOptions) -> Iterable[str]:
    """Serve until interrupted; nothing is left to be said then."""
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("fastapi and uvicorn are not installed", "pip install 'ftlaunch[serve]'")
    token = token_for(options.host)
    # Before the models are loaded: a port in use is told at once, and nobody takes it in the meantime.
    sockets = listen(options.host.strip("[]"), options.port)
    import uvicorn

    from fttrain.serving.api import Limits, make_app
    from fttrain.serving.worker import Worker

    paths = [options.model]
    if options.compare is not None:
        paths.append(base_of(options.model) if options.compare == "base" else options.compare)
    sizes = {"batch_size": options.batch_size, "most_waiting": options.most_waiting}
    dtype, called = recorded_dtype(paths), zip(names(paths), paths, strict=True)
    workers = {name: Worker(name, *load(path, dtype=dtype), **sizes) for name, path in called}
    host = f"[{options.host}]" if ":" in options.host.strip("[]") and "[" not in options.host else options.host
    hosts = frozenset({*LOOPBACK, host.lower(), *map(str.lower, options.allow_host)})
    app = make_app(workers, Limits(options.max_new_tokens, options.timeout), hosts, token)
    print(f"serving {', '.join(workers)} on http://{host}:{options.port}", file=sys.stderr, flush=True)
    print(f"for real traffic: vllm serve {options.model}, of a merged model", file=sys.stderr)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets)
    return ()


def listen(host: str, port: int) -> list[socket.socket]:
    """A socket that listens on the port for each address of the host, IPv4 or IPv6.

    UserError where the port is in use or may not be taken, or the host is none of this machine.
    """
    made: list[socket.socket] = []
    try:
        for family, *_, address in dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
            try:
                made.append(socket.create_server(address, family=family))
            except OSError as error:
                # "localhost" may name ::1 where there is no IPv6: its other address is enough.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError as error:
        for one in made:
            one.close()
        message = f"nothing can listen on port {port} of {host}: {(error.strerror or str(error)).lower()}"
        raise UserError(message, "name another port with --port, or another address with --host") from error
    if not made:
        raise UserError(f"--host {host} is no address of this machine", "use 127.0.0.1, ::1 or its own name")
    return made


def token_for(host: str) -> str | None:
    """The token that is asked for: of others than this machine always. UserError where there is none for them."""
    token = os.environ.get(TOKEN) or None
    if token is None and not is_loopback(host):
        remedy = f"export {TOKEN}=$(openssl rand -hex 16), or serve on 127.0.0.1 and use ssh -L"
        raise UserError(f"--host {host} lets others in, and there is no token", remedy)
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def names(paths: Sequence[str]) -> list[str]:
    """What models are called: the last parts of their paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(one[-depth:]) for one in parts]
        if (len(set(short)) == len(short) and depth > 1) or max(map(len, parts)) == 1:
            return short
    raise UserError(f"{paths[0]} would be compared with itself", "name another model")


if __name__ == "__main__":
    run(main, ServeOptions)
