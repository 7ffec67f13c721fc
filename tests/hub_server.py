"""A stand-in for the part of the Hub's HTTP API that an upload uses, files kept in a folder."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS_SUFFIXES = (".safetensors", "tokenizer.json")


class Hub:
    """What the server holds, and what it was asked.

    Args:
        folder: a repository's commits become `folder/<name>/<revision>/`, uploaded objects `folder/lfs/`.
        stall: an upload of an object hangs after its first bytes, until `release` is set.
        forbidden: creating a repository is refused, as for a token without the right to write.
    """

    def __init__(self, folder, stall=False, forbidden=False):
        self.folder, self.stall, self.forbidden = folder, stall, forbidden
        self.requests, self.sent, self.branches = [], [], {"main"}
        self.stalled, self.release = threading.Event(), threading.Event()
        (folder / "lfs").mkdir(parents=True, exist_ok=True)

    def commit(self, repository, revision, lines):
        """Put the files of a commit in place, all or none."""
        target = self.folder / repository / revision
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.folder / "lfs" / value["oid"]).read_bytes()
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.hub.requests.append((path, self.headers.get("Authorization")))
        if path == "/api/repos/create":
            if self.hub.forbidden:
                return self._answer(403, {"error": "You need a token with write access."})
            asked = json.loads(body)
            return self._answer(200, {"url": f"{self._root}/{asked.get('organization', 'me')}/{asked['name']}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            return self._answer(200, {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._object(entry) for entry in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.hub.branches.add(found[2])
            return self._answer(200, {})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            if found[2] not in self.hub.branches:
                return self._answer(404, {"error": f"no branch {found[2]}"})
            self.hub.commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
            address = f"{self._root}/{found[1]}/commit/abc"
            return self._answer(200, {"success": True, "commitOid": "abc", "commitUrl": address})
        return self._answer(501, {"error": f"the stand-in does not know {path}"})

    def do_PUT(self):
        oid, length = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        if self.hub.stall:
            self.rfile.read(1)
            self.hub.stalled.set()
            self.hub.release.wait(60)
            self.close_connection = True
            return None
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "content and name differ"})
        (self.hub.folder / "lfs" / oid).write_bytes(content)
        self.hub.sent.append(oid)
        return self._answer(200, {})

    def _object(self, entry):
        kept = (self.hub.folder / "lfs" / entry["oid"]).is_file()
        upload = {"upload": {"href": f"{self._root}/lfs/{entry['oid']}"}}
        return {**entry, "authenticated": True, **({} if kept else {"actions": upload})}

    @property
    def _root(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing on the screen."""


def _mode(path):
    lfs = path.endswith(LFS_SUFFIXES)
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}


@contextmanager
def serve(hub):
    """The address of a server of this hub."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
