"""An S3 server on the loopback, and a proxy in front of it that fails on request."""

import contextlib
import http.client
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import fsspec
import pytest

Fault = Literal["refuse", "fail", "lose", "cut", "shorten", "stall"]

_OWN = ("content-length", "connection", "transfer-encoding", "date", "server")
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_INTERNAL_ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yield the endpoint of moto's server, which runs in a thread."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        _forget_buckets(host, port)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def _forget_buckets(host: str, port: int) -> None:
    """Delete all buckets of moto: the servers of one process share them."""
    connection = http.client.HTTPConnection(host, port)
    with contextlib.closing(connection):
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()


@contextlib.contextmanager
def s3_bucket() -> Iterator["Proxy"]:
    """Yield a proxy in front of an S3 server with one bucket. Within this context `s3://bucket` is that bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        with s3_server() as endpoint, Proxy(endpoint) as proxy:
            patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
            fsspec.filesystem("s3").mkdir("bucket")
            yield proxy


@dataclass
class _Rule:
    fault: Fault
    method: str
    path: str
    times: int


class Proxy:
    """Forwards to a server; `requests` holds the method and path of every request."""

    def __init__(self, endpoint: str) -> None:
        self.target = endpoint.removeprefix("http://")
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._rules: list[_Rule] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def break_next(self, fault: Fault, method: str, path: str, times: int = 1) -> None:
        """Make the next requests of a method fail if their paths end in `path`.

        refuse: answer with 403. fail: answer with 500. lose: carry the request out, then answer with 500. cut: close
        the connection in the middle of the body. shorten: answer with half of the body as if it were the whole.
        stall: never answer.
        """
        self._rules.append(_Rule(fault, method, path, times))

    def mend(self) -> None:
        self._rules.clear()
        self.requests.clear()

    def fault_of(self, method: str, path: str) -> Fault | None:
        self.requests.append((method, path))
        for rule in self._rules:
            if rule.times and rule.method == method and path.endswith(rule.path):
                rule.times -= 1
                return rule.fault
        return None


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Write no log."""

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.fault_of(self.command, self.path.partition("?")[0])
        if fault == "stall":
            self.proxy.released.wait()
            self.close_connection = True
        elif fault in ("refuse", "fail"):
            self._answer(403 if fault == "refuse" else 500, {}, _DENIED if fault == "refuse" else _INTERNAL_ERROR)
        else:
            status, headers, data = self._ask(body)
            if fault == "lose":
                status, data = 500, _INTERNAL_ERROR
            self._answer(status, headers, data, fault)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.proxy.target)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None = None) -> None:
        sent = data[: len(data) // 2] if fault in ("cut", "shorten") else data
        length = len(data if fault == "cut" else sent)
        if self.command == "HEAD":
            length = int(headers.get("Content-Length", 0))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OWN and not (fault and name.startswith("x-amz-checksum")):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection = fault == "cut"

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815


def endpoint_of(proxy: Proxy) -> dict[str, str]:
    """The variables by which another process finds the same bucket."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE")
    return {name: os.environ[name] for name in names} | {"FSSPEC_S3_ENDPOINT_URL": f"http://{proxy.target}"}
