"""A Hub on the loopback address: the two requests that huggingface_hub makes for a file, and their faults."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """What the server holds, how it fails, and what it was asked.

    Attributes:
        content: of model.safetensors; None for a repository without it.
        sent: what is sent in its place.
        cut: connections that are cut in the middle of the content, before one is not.
        requests: "METHOD RANGE" of every request for the file, with "-" for the whole of it.
        tokens: the Authorization headers that came.
    """

    content: bytes | None
    sent: bytes | None = None
    cut: int = 0
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[str]:
    """Serve {"OWNER/NAME": repository}, each with the revisions main, v1 and `COMMIT`; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def fail(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, *, body: bool) -> None:
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/model\.safetensors", self.path)
            repository = repositories.get(match[1]) if match else None
            if match is None or repository is None:
                self.fail("RepoNotFound")
            elif match[2] not in ("main", "v1", COMMIT):
                self.fail("RevisionNotFound")
            elif repository.content is None:
                self.fail("EntryNotFound")
            else:
                self.send(repository, repository.content, body=body)

        def send(self, repository: Repository, right: bytes, *, body: bool) -> None:
            wanted = self.headers.get("Range")
            repository.requests.append(f"{self.command} {wanted or '-'}")
            repository.tokens.append(self.headers.get("Authorization"))
            content = right if repository.sent is None else repository.sent
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if body and wanted else 0
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(right).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start if body else len(right)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body and repository.cut:
                repository.cut -= 1
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
            elif body:
                self.wfile.write(content[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
