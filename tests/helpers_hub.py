"""Stand-ins for the Hugging Face hub: a cache folder in its layout, and a server on this machine with its endpoints.

The server takes what huggingface_hub's own client sends, so the tests of what is uploaded and downloaded run the
client that users have, and no network.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def cached(cache, repo, files, revision="main"):
    """Puts a commit with these files, bytes by name, into a cache folder. Returns the commit's hash."""
    commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    root = Path(cache, "models--" + repo.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha1(content).hexdigest()
        blob.write_bytes(content)
        if not (snapshot / name).exists():
            (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
    (root / "refs" / revision).write_text(commit)
    return commit


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Hub:
    """Repositories by name: their commits, each with its files, and their branches."""

    def __init__(self, url):
        self.url = url
        self.commits, self.branches, self.messages, self.private = {}, {}, [], {}
        self.requests = []  # of every request: its method and path

    def create(self, repo, private=None):
        self.commits[repo], self.branches[repo], self.private[repo] = {}, {}, private
        self.commit(repo, {}, "main")

    def commit(self, repo, files, branch="main"):
        old = self.commits[repo].get(self.branches[repo].get(branch), {})
        digest = hashlib.sha1(f"{len(self.messages)} {len(self.commits[repo])} {branch}".encode()).hexdigest()
        self.commits[repo][digest] = {**old, **files}
        self.branches[repo][branch] = digest
        return digest

    def files(self, repo, revision="main"):
        """The files of a branch or commit; None where there is none."""
        return self.commits[repo].get(self.branches[repo].get(revision, revision))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(("POST", path))
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            fields = json.loads(body)
            repo = "/".join(filter(None, (fields.get("organization") or "user", fields["name"])))
            if exists := repo in hub.commits:
                return self.reply(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            hub.create(repo, fields.get("private", fields.get("visibility")))
            return self.reply(409 if exists else 200, {"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
        repo, action, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
        if action == "branch":
            hub.branches[repo].setdefault(revision, hub.branches[repo]["main"])
            return self.reply(200, {})
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return self.reply(200, {"files": modes})
        assert action == "commit", path
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.messages.append(line["value"]["summary"])
            else:
                assert line["key"] == "file", line["key"]
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        digest = hub.commit(repo, files, revision)
        self.reply(200, {"success": True, "commitOid": digest, "commitUrl": f"{hub.url}/{repo}/commit/{digest}"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        match = api or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/(.+)", path)
        if match is None:
            return self.reply(404, {"error": "Not found"})
        repo, action, rest = match.groups()
        revision, _, name = (rest or "main").partition("/")
        if repo not in hub.commits:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = hub.files(repo, revision)
        if files is None:
            return self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        commit = hub.branches[repo].get(revision, revision)
        if action == "tree":
            entries = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in files.items()]
            return self.reply(200, entries, Content_Type="application/json")
        if action in ("revision", None):
            siblings = [{"rfilename": n} for n in files]
            return self.reply(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
        if name not in files:
            return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.reply(200, files[name], ETag=f'"{digest(files[name])}"', X_Repo_Commit=commit)


def digest(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def served():
    """A hub that is served on this machine while the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
