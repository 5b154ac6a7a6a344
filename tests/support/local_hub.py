"""A hub of local folders: what huggingface_hub and datasets ask of one, over HTTP, from files. Nothing of them is replaced.

    python -m tests.support.local_hub FOLDER --port 8123      then HF_ENDPOINT=http://127.0.0.1:8123

FOLDER/models/ORGANISATION/NAME/ and FOLDER/datasets/ORGANISATION/NAME/ hold the files of a repository, at each commit that is
asked for. The few calls of the hub's interface that reading needs are here: a repository's information, its file tree, the
information of paths, and the files themselves, whole or in part.
"""

import argparse
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{REPOSITORY}(/(?P<call>revision|tree|paths-info)/(?P<commit>[^/]+)(?P<path>/.*)?)?$"
)
RESOLVE = re.compile(rf"/((?P<kind>datasets)/)?{REPOSITORY}/resolve/(?P<commit>[^/]+)/(?P<path>.+)$")


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]  # "kind name commit" of each repository that was asked for

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, found: object) -> None:
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def missing(self, what: str) -> None:
        self.answer(404, b"", X_Error_Code=what)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := API.match(path):
            self.call(**found.groupdict())
        elif found := RESOLVE.match(path):
            self.file(found["kind"] or "models", found["name"], found["commit"], found["path"])
        else:
            self.missing("RepoNotFound")

    do_HEAD = do_POST = do_GET

    def call(self, kind: str, name: str, call: str | None, commit: str | None, path: str | None) -> None:
        folder = self.folder / kind / name
        if not folder.is_dir():
            return self.missing("RepoNotFound")
        commit = commit or "main"
        self.asked.append(f"{kind} {name} {commit}")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if call == "tree":
            below = folder / (path or "").strip("/")
            if not below.exists():
                return self.missing("EntryNotFound")
            return self.tell([entry(folder, one) for one in sorted(below.rglob("*"))])
        if call == "paths-info":
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.tell([entry(folder, folder / one) for one in asked if (folder / one).exists()])
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        self.tell({"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False, "gated": False, "downloads": 0})

    def file(self, kind: str, name: str, commit: str, path: str) -> None:
        file = self.folder / kind / name / path
        if not file.is_file():
            return self.missing("EntryNotFound")
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            return self.answer(206, body[first : last + 1], **headers)
        self.answer(200, body, **headers)


def entry(folder: Path, path: Path) -> dict:
    """A file or a folder as the hub lists it."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    body = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(body).hexdigest(), "size": len(body)}


def serve(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the folder, not yet running; `server_port` says where, `RequestHandlerClass.asked` what was asked of it."""
    return ThreadingHTTPServer(("127.0.0.1", port), type("FolderHub", (Hub,), {"folder": folder, "asked": []}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8123)
    arguments = parser.parse_args()
    serve(arguments.folder, arguments.port).serve_forever()
