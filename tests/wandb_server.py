"""A server that speaks as much of W&B's protocol as dytrun needs: python wandb_server.py PORT FOLDER HOW.

With port 0 it takes a free one; FOLDER/port says which, once it listens.
What it is sent it appends to FOLDER/sent.jsonl, a request a line, and reads back when it is started again; files lie
in FOLDER/files. Rows of history are kept by their offset, as W&B keeps them. HOW it answers: `well`, `500`, `never`,
`dribble` (a byte a second), `deaf` (everything but GraphQL, and that never), or `slow` (a second and a half after each
post).
"""

import base64
import contextlib
import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

WHEN = "2026-01-01T00:00:00Z"
ENTITY = {"id": "e", "name": "someone"}


def requests_of(folder: Path) -> list[dict]:
    """Return every request that a server in `folder` got, oldest first."""
    path = folder / "sent.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]  # the last may be half there


def history_of(folder: Path, run: str) -> list[dict]:
    """Return the rows of a run's history in order of their offsets, with what came twice under two offsets twice."""
    rows: dict[int, dict] = {}
    for request in requests_of(folder):
        chunk = request["body"].get("files", {}).get("wandb-history.jsonl")
        if request["path"].endswith(f"/{run}/file_stream") and chunk:
            rows |= {chunk["offset"] + place: json.loads(row) for place, row in enumerate(chunk["content"])}
    return [rows[offset] for offset in sorted(rows)]


def run_of(folder: Path, run: str) -> dict[str, Any]:
    """Return what a server has of a run besides its history: displayName, groupName, jobType, tags, config, summary."""
    found: dict[str, Any] = {"config": {}, "summary": {}}
    for request in requests_of(folder):
        body = request["body"]
        values = body.get("variables") or {}
        if "UpsertBucket" in body.get("query", "") and values.get("name") == run:
            given = {key: value for key, value in values.items() if value is not None}
            config = {key: item["value"] for key, item in json.loads(given.pop("config", "{}")).items()}
            found |= given
            found["config"] |= config
        chunk = body.get("files", {}).get("wandb-summary.json") if isinstance(body.get("files"), dict) else None
        if request["path"].endswith(f"/{run}/file_stream") and chunk:
            found["summary"] = json.loads(chunk["content"][-1])
    return found


def views_of(folder: Path) -> list[dict[str, Any]]:
    """Return the saved views, workspaces and reports, as they were last sent: id, name, displayName, type, spec."""
    views: dict[str, dict[str, Any]] = {}
    for request in requests_of(folder):
        values = request["body"].get("variables") or {}
        if "upsertView(" in request["body"].get("query", ""):
            # A view is the one of its id, or else a new one.
            key = values.get("id") or base64.b64encode(f"View:{len(views)}".encode()).decode()
            views[key] = views.get(key, {}) | {name: item for name, item in values.items() if item is not None}
            views[key] |= {"id": key, "spec": json.loads(values["spec"])}
    return list(views.values())


def answer(query: str, variables: dict, folder: Path, address: str) -> dict:
    """Return the data that a GraphQL operation asks for; what is not known is null."""
    name = (re.findall(r"(?:query|mutation)\s+(\w+)", query) or [""])[0]
    run = variables.get("name") or variables.get("runName") or variables.get("run") or ""
    viewer = {"id": "u", "entity": ENTITY["name"], "username": "someone", "email": None, "flags": "{}",
              "teams": {"edges": []}}  # fmt: skip
    if name == "UpsertBucket":
        bucket = _bucket(folder, run, variables.get("project"))
        return {"upsertBucket": {"bucket": bucket, "inserted": not bucket["historyLineCount"]}}
    if name == "RunResumeStatus":
        known = any(f'"{run}"' in json.dumps(request["body"]) for request in requests_of(folder)[:-1])
        bucket = _bucket(folder, run, variables.get("project")) if known else None
        return {"model": {"id": "p", "name": variables.get("project"), "entity": ENTITY, "bucket": bucket}}
    if name == "ServerFeaturesQuery":
        return {"serverInfo": {"features": []}}
    if name in ("Viewer", "GetDefaultEntity"):
        return {"viewer": viewer}
    if name == "CreateRunFiles":
        files = [{"name": file, "uploadUrl": f"{address}/upload/{run}/{quote(file)}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": f"b-{run}", "uploadHeaders": [], "files": files}}
    return _answer_of_views(name, variables, folder)


def _bucket(folder: Path, run: str, project: str | None) -> dict[str, Any]:
    rows, sent = history_of(folder, run), run_of(folder, run)
    config = json.dumps({key: {"value": value} for key, value in sent["config"].items()})
    last = json.dumps([json.dumps(rows[-1])] if rows else [])
    return {
        "id": f"b-{run}", "name": run, "displayName": sent.get("displayName", run), "description": None,
        "config": config, "sweepName": None, "project": {"id": "p", "name": project, "entity": ENTITY},
        "historyLineCount": len(rows), "summaryMetrics": json.dumps(sent["summary"]), "logLineCount": 0,
        "eventsLineCount": 0, "historyTail": last, "eventsTail": "[]", "tags": sent.get("tags", []), "notes": None,
        "wandbConfig": '{"t": 1}',
    }  # fmt: skip


def _answer_of_views(name: str, variables: dict, folder: Path) -> dict:
    """Answer what the library wandb-workspaces asks."""
    asked = {key: variables.get(key) for key in ("project", "projectName", "name")}
    # A project is there once a run is.
    projects = {(request["body"].get("variables") or {}).get("project") for request in requests_of(folder)
                if "UpsertBucket" in request["body"].get("query", "")} - {None}  # fmt: skip
    nodes = [{"id": f"p-{one}", "internalId": f"i-{one}", "name": one, "entityName": ENTITY["name"], "entity": ENTITY,
              "createdAt": WHEN, "isBenchmark": False, "user": None} for one in sorted(projects)]  # fmt: skip
    edges = [{"node": node, "cursor": node["name"]} for node in nodes]
    page = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
    if name in ("UpsertView2", "upsertView"):
        return {"upsertView": {"view": _view(_last_sent(folder)), "inserted": not variables.get("id")}}
    if name == "SpecificReport":
        return {"view": next((_view(one) for one in views_of(folder) if one["id"] == variables["reportId"]), None)}
    if name == "View":
        found = [_view(one) for one in views_of(folder) if one["name"] == variables["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": one} for one in found]}}}
    if "rojects" in name:
        return {"models": page, "projects": page}
    mine = [node for node in nodes if node["name"] in asked.values()]
    return {"project": mine[0] if mine else None, "model": mine[0] if mine else None}


def _last_sent(folder: Path) -> dict[str, Any]:
    """Return the view that the newest request to save one was about."""
    names = [(request["body"].get("variables") or {}).get("name") for request in requests_of(folder)
             if "upsertView(" in request["body"].get("query", "")]  # fmt: skip
    return next(one for one in views_of(folder) if one["name"] == names[-1])


def _view(one: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "p", "name": one["projectName"], "entityName": one["entityName"]}
    spec = json.dumps(one["spec"])
    return {"description": "", "updatedAt": WHEN, "createdAt": WHEN, "project": project, "spec": spec} | {
        key: one[key] for key in ("id", "name", "displayName", "type")
    }


class Handler(BaseHTTPRequestHandler):
    """Answers as the server was told to."""

    protocol_version = "HTTP/1.1"
    how, folder, address = "well", Path(), ""

    def do_GET(self) -> None:
        """Answer a probe."""
        self._reply({})

    def do_PUT(self) -> None:
        """Keep a file."""
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.folder / "files" / unquote(self.path).removeprefix("/upload/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
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
            found = answer(body.get("query", ""), body.get("variables") or {}, self.folder, self.address)
            self._reply({"data": found})
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
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    Handler.how, Handler.folder = sys.argv[3], Path(sys.argv[2])
    Handler.address = f"http://127.0.0.1:{server.server_port}"
    (Handler.folder / "port").write_text(f"{server.server_port}\n")
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
