"""`ftlaunch serve`: one model or two on a port."""

import ipaddress
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ftlaunch.errors import BAD_INPUT, DONE, UserError
from ftlaunch.tools import ServeOptions
from fttrain.tools.chat import base_of, load
from fttrain.tools.output import called_with

TOKEN = "FTLAUNCH_SERVE_TOKEN"
"""Variable with the token that is asked for beyond this machine."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def main(options: ServeOptions) -> int:
    """Serve until interrupted; the exit code."""
    try:
        return _serve(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _serve(options: ServeOptions) -> int:
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("fastapi and uvicorn are not installed", "pip install 'ftlaunch[serve]'")
    token = token_for(options.host)
    import uvicorn

    from fttrain.serving.api import Limits, make_app
    from fttrain.serving.worker import Worker

    paths = [options.model]
    if options.compare is not None:
        paths.append(base_of(options.model) if options.compare == "base" else options.compare)
    sizes = {"batch_size": options.batch_size, "most_waiting": options.most_waiting}
    workers = {name: Worker(name, *load(path), **sizes) for name, path in zip(names(paths), paths, strict=True)}
    hosts = frozenset({*LOOPBACK, options.host.lower(), *map(str.lower, options.allow_host)})
    app = make_app(workers, Limits(options.max_new_tokens, options.timeout), hosts, token)
    print(f"serving {', '.join(workers)} on http://{options.host}:{options.port}", file=sys.stderr, flush=True)
    print(f"for real traffic: vllm serve {options.model}, of a merged model", file=sys.stderr)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", server_header=False)
    return DONE


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
    sys.exit(main(called_with(ServeOptions)))
