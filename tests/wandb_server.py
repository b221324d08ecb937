"""A server that speaks as much of W&B's protocol as a run of scalars needs: python wandb_server.py PORT FOLDER HOW.

What it is sent it appends to FOLDER/sent.jsonl, a request a line, and reads back when it is started again. Rows of
history are kept by their offset, as W&B keeps them. HOW it answers: `well`, `500`, `never`, `dribble` (a byte a
second), `deaf` (everything but GraphQL, and that never), or `slow` (a second and a half after each post).
"""

import contextlib
import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENTITY = {"id": "e", "name": "someone"}


def requests_of(folder: Path) -> list[dict]:
    """Return every request that a server in `folder` got, oldest first."""
    path = folder / "sent.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def history_of(folder: Path, run: str) -> list[dict]:
    """Return the rows of a run's history in order of their offsets, with what came twice under two offsets twice."""
    rows: dict[int, dict] = {}
    for request in requests_of(folder):
        chunk = request["body"].get("files", {}).get("wandb-history.jsonl")
        if request["path"].endswith(f"/{run}/file_stream") and chunk:
            rows |= {chunk["offset"] + place: json.loads(row) for place, row in enumerate(chunk["content"])}
    return [rows[offset] for offset in sorted(rows)]


def answer(query: str, variables: dict, folder: Path) -> dict:
    """Return the data that a GraphQL operation asks for; what is not known is null."""
    name = (re.findall(r"(?:query|mutation)\s+(\w+)", query) or [""])[0]
    run = variables.get("name") or variables.get("runName") or ""
    rows = history_of(folder, run) if run else []
    bucket = {
        "id": f"b-{run}", "name": run, "displayName": run, "description": None, "config": "{}", "sweepName": None,
        "project": {"id": "p", "name": variables.get("project"), "entity": ENTITY}, "historyLineCount": len(rows),
    }  # fmt: skip
    if name == "UpsertBucket":
        return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
    if name == "RunResumeStatus":
        known = any(f'"{run}"' in json.dumps(request["body"]) for request in requests_of(folder)[:-1])
        last = json.dumps([json.dumps(rows[-1])] if rows else [])
        resumed = bucket | {
            "summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "historyTail": last, "eventsTail": "[]",
            "tags": [], "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        model = {"id": "p", "name": variables.get("project"), "entity": ENTITY, "bucket": resumed if known else None}
        return {"model": model}
    if name == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    if name == "Viewer":
        return {"viewer": {"id": "u", "entity": ENTITY["name"], "username": "someone", "email": None, "flags": "{}",
                           "teams": {"edges": []}}}  # fmt: skip
    if name == "CreateRunFiles":
        return {"createRunFiles": {"runID": f"b-{run}", "uploadHeaders": [], "files": []}}
    return {}


class Handler(BaseHTTPRequestHandler):
    """Answers as the server was told to."""

    protocol_version = "HTTP/1.1"
    how, folder = "well", Path()

    def do_GET(self) -> None:
        """Answer a probe."""
        self._reply({})

    def do_POST(self) -> None:
        """Keep what was sent and answer it."""
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_json = "json" in (self.headers.get("Content-Type") or "json")
        body = json.loads(text) if is_json and text else {}  # what is not JSON is W&B's own telemetry
        with (self.folder / "sent.jsonl").open("a") as file:
            file.write(json.dumps({"path": self.path, "body": body}) + "\n")
        if self.path.startswith("/graphql"):
            if self.how == "deaf":
                time.sleep(600)
            self._reply({"data": answer(body.get("query", ""), body.get("variables") or {}, self.folder)})
        else:
            self._reply({"exitcode": None, "limits": {}})

    def _reply(self, values: dict) -> None:
        if self.how == "never":
            time.sleep(600)
        if self.how == "slow" and self.command == "POST":
            time.sleep(1.5)
        data = json.dumps(values).encode()
        if self.how == "dribble":
            for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 600:
                self.wfile.write(bytes([byte]))
                time.sleep(1)
        self.send_response(500 if self.how == "500" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Be silent."""


class Server(ThreadingHTTPServer):
    """Lets requests that are never answered die with it."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Be silent where a client went away."""


if __name__ == "__main__":
    Handler.how, Handler.folder = sys.argv[3], Path(sys.argv[2])
    with contextlib.suppress(KeyboardInterrupt):
        Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
