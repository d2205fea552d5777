"""The routes of a :class:`LocalHub` that write: repositories, uploads, commits, pull requests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import yaml

from . import xet
from .server import MODEL, REPO, SIGNATURE, Error, Handler, Routes, row
from .store import File, Pull, is_lfs

RELATIONS = ("adapter", "finetune", "merge", "quantized")


def whoami(self: Handler) -> None:
    user = self.signed_in()
    orgs = [{"type": "org", "name": name} for name in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    self.json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token})


def may_write(self: Handler, name: str, *, create_pr: bool = False) -> None:
    """Raise what the hub says to somebody who may not write to ``name``; anybody may open a pull request."""
    self.checked(name)
    user = self.signed_in()
    if user.role != "write" or not (create_pr or self.owns(name.split("/")[0])):
        raise Error(403, "", f"You have no permission to write to {name}")


def create(self: Handler) -> None:
    asked, user = json.loads(self.body), self.signed_in()
    namespace = asked.get("organization") or user.name
    name = f"{namespace}/{asked['name']}"
    if user.role != "write" or not self.owns(namespace):
        raise Error(403, "", f"You don't have the rights to create a model under the namespace {namespace!r}")
    with self.hub.store.lock:
        there = self.hub.store.exists(name)
        if not there:
            self.hub.store.create(name, private=asked.get("visibility") == "private")
    url = {"url": f"{self.hub.url}/{name}"}
    self.json(url | ({"error": "You already created this model repo"} if there else {}), 409 if there else 200)


def delete(self: Handler) -> None:
    asked = json.loads(self.body)
    name = f"{asked.get('organization') or self.signed_in().name}/{asked['name']}"
    may_write(self, name)
    self.hub.store.delete(name)
    self.json({})


def validate_yaml(self: Handler) -> None:
    """A part of what the hub checks: that it is YAML, and the fields that people get wrong."""
    problems = _problems(json.loads(self.body)["content"])
    self.json({"errors": [{"message": one} for one in problems], "warnings": []}, 400 if problems else 200)


def _problems(card: str) -> list[str]:
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {str(error).splitlines()[0]}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    problems = []
    bases = data.get("base_model", [])
    for one in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(one)):
            problems.append(f'"base_model" with value "{one}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        problems.append('"base_model_relation" must be one of ' + ", ".join(RELATIONS))
    if data.get("license") == "other" and not {"license_name", "license_link"} <= set(data):
        problems.append('"license_name" and "license_link" are required where "license" is "other"')
    if not all(isinstance(one, str) for one in data.get("tags") or []):
        problems.append('"tags" must be strings')
    for one in data.get("model-index") or []:
        if not {"name", "results"} <= set(one):
            problems.append('"model-index" needs a name and results')
    return problems


def auth_check(self: Handler, name: str, write: str = "") -> None:
    self.checked(name)
    if write:
        may_write(self, name)
    self.json({})


# --- files


def preupload(self: Handler, name: str, revision: str) -> None:
    may_write(self, name, create_pr=_wants_pull(self) or revision.startswith("refs/pr/"))
    self.checked(name, revision)
    there = self.hub.repo(name, revision) or {}
    answer = []
    for one in json.loads(self.body)["files"]:
        known = there.get(one["path"])
        oid = {"oid": known.sha256 or known.oid} if known else {}
        mode = "lfs" if is_lfs(one["path"], one["size"]) else "regular"
        answer.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    self.json({"files": answer})


def _wants_pull(self: Handler) -> bool:
    return self.query.get("create_pr") == ["1"]


def batch(self: Handler, name: str) -> None:
    """What of large files is missing, and where it is to go."""
    self.checked(name)
    if self.signed_in().role != "write":
        raise Error(403, "", "a read token")
    answer: list[dict[str, Any]] = []
    for one in json.loads(self.body)["objects"]:
        oid, size = one["oid"], one["size"]
        found: dict[str, Any] = {"oid": oid, "size": size}
        if not self.hub.store.has_object(name, oid):
            place = f"{self.hub.cdn_url}/upload/{name}/{oid}"
            upload: dict[str, Any] = {"href": f"{place}?{SIGNATURE}"}
            if self.hub.part_size and size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                parts = {f"{part:05d}": f"{place}/{part}?{SIGNATURE}" for part in range(1, count + 1)}
                complete = f"{self.hub.url}/complete/{name}/{oid}"
                upload = {"href": complete, "header": {"chunk_size": str(self.hub.part_size), **parts}}
            verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
            found["actions"] = {"upload": upload, "verify": verify}
        answer.append(found)
    self.json({"transfer": "basic", "objects": answer})


def put(self: Handler, name: str, oid: str) -> None:
    assert self.upload is not None
    with self.upload.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if SIGNATURE not in self.path or digest.hexdigest() != oid:
        raise Error(403, "", "these are not the bytes that were announced")
    self.hub.store.keep(name, oid, self.upload)
    self.json({})


def put_part(self: Handler, name: str, oid: str, part: str) -> None:
    assert self.upload is not None
    self.upload.replace(self.hub.store.temporary(f"{oid}.{part}").with_name(f"{oid}.{part}"))
    self.json({}, ETag=f'"{part}"')


def complete(self: Handler, name: str, oid: str) -> None:
    whole = self.hub.store.temporary("whole")
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for part in json.loads(self.body)["parts"]:
            piece = whole.with_name(f"{oid}.{part['partNumber']}")
            digest.update(data := piece.read_bytes())
            out.write(data)
            piece.unlink()
    if digest.hexdigest() != oid:
        raise Error(403, "", "these are not the bytes that were announced")
    self.hub.store.keep(name, oid, whole)
    self.json({})


def verify(self: Handler, name: str) -> None:
    asked = json.loads(self.body)
    found = self.hub.store.object(asked["oid"])
    if found is None or found.size != asked["size"]:
        raise Error(404, "", "there is no such object")
    self.json({})


def xet_token(self: Handler, name: str, kind: str, revision: str) -> None:
    if kind == "write":
        may_write(self, name, create_pr=_wants_pull(self) or revision.startswith("refs/pr/"))
    else:
        self.checked(name)
    if self.hub.xet is None:
        raise Error(404, "", "no Xet here")
    self.hub.xet.mkdir(parents=True, exist_ok=True)
    url, until = f"local://{self.hub.xet}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet-access", "X-Xet-Token-Expiration": str(until)}
    self.json({"accessToken": "xet-access", "exp": until, "casUrl": url}, **headers)


def paths_info(self: Handler, name: str, revision: str) -> None:
    self.checked(name, revision)
    there = self.hub.repo(name, revision) or {}
    asked = parse_qs(self.body.decode()).get("paths", [])
    copied = name not in self.hub.uncopied
    self.json([row(self, path, there[path], copied=copied) for path in asked if path in there])


def duplicate(self: Handler, name: str) -> None:
    """Large files of ``name`` become known to another repository."""
    self.checked(name)
    if name in self.hub.gated:
        raise Error(403, "GatedRepo")
    asked = json.loads(self.body)
    target = asked["target"]["name"]
    self.checked(target)
    self.signed_in()
    listings = [self.hub.repo(name) or {}, *(one.files for one in self.hub.commits(name))]
    large = {file.sha256: file for listing in listings for file in listing.values()}
    failed = []
    for one in asked["files"]:
        if one["sha256"] in large and name not in self.hub.uncopied:
            self.hub.store.share(large[one["sha256"]], target)
        else:
            failed.append({"sha256": one["sha256"], "error": "it cannot be copied"})
    self.json({"failed": failed})


# --- commits


def commit(self: Handler, name: str, revision: str) -> None:
    pulled = _wants_pull(self)
    may_write(self, name, create_pr=pulled or revision.startswith("refs/pr/"))
    head = self.checked(name, revision)
    lines = [json.loads(line) for line in self.body.splitlines() if line]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, head):
        raise Error(412, "", "A commit has happened since. Please refresh and try again.")
    with self.hub.store.lock:
        files = dict(self.hub.repo(name, revision) or {})
        for line in lines[1:]:
            for path, file in _applied(self, name, line["key"], line["value"], files):
                if file is None:
                    del files[path]
                else:
                    files[path] = file
        if problems := _problems(files["README.md"].path.read_text()) if "README.md" in files else []:
            raise Error(400, "", problems[0])
        pull = _new_pull(self, name, header["summary"]) if pulled else None
        made = self.hub.store.commit(name, pull.ref if pull else revision, header["summary"], files)
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{self.hub.url}/{name}/commit/{made.id}"}
    number = re.fullmatch(r"refs/pr/(\d+)", made.ref)
    if number:
        answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number[1]}"
    self.json(answer)


def _applied(
    self: Handler, name: str, key: str, value: dict[str, Any], files: dict[str, File]
) -> Iterator[tuple[str, File | None]]:
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        if is_lfs(path, len(data)):
            raise Error(400, "", f"{path} must go up as a large file")
        yield path, self.hub.store.blob(data)
    elif key == "lfsFile":
        yield path, _large(self, name, value["oid"], value.get("size"))
    elif key == "deletedFile":
        if path not in files:
            raise Error(404, "EntryNotFound", "A file with this name doesn't exist")
        yield path, None
    elif key == "deletedFolder":
        yield from ((one, None) for one in list(files) if one.startswith(path.rstrip("/") + "/"))
    else:
        raise Error(400, "", f"no operation {key!r}")


def _large(self: Handler, name: str, oid: str, size: int | None) -> File:
    hash_of = dict(xet.files(self.hub.xet)) if self.hub.xet else {}
    if self.hub.xet and oid in hash_of and size and not self.hub.store.has_object(name, oid):
        whole = self.hub.store.temporary(oid)
        xet.fetch(self.hub.xet, hash_of[oid], size, whole)
        if hashlib.sha256(whole.read_bytes()).hexdigest() != oid:
            raise Error(400, "", f"{oid} was stored with other bytes")
        self.hub.store.keep(name, oid, whole)
    found = self.hub.store.object(oid) if self.hub.store.has_object(name, oid) else None
    if found is None:  # of the same repository, and never replaced
        there = (self.hub.repo(name) or {}).values() if self.hub.store.has_object(name, oid) else ()
        found = next((one for one in there if one.sha256 == oid), None)
    if found is None or size not in (None, found.size):
        raise Error(400, "", f"there is no large file {oid} in {name}")
    return found


# --- branches and pull requests


def branch(self: Handler, name: str, new: str) -> None:
    may_write(self, name)
    if new == "main" or new in self.hub.store[name].refs:
        raise Error(409, "", f"Reference already exists: {new}")
    start = json.loads(self.body or b"{}").get("startingPoint", "main")
    self.checked(name, start)
    self.hub.store.branch(name, new, start)
    self.json({})


def tag(self: Handler, name: str, revision: str) -> None:
    may_write(self, name)
    self.checked(name, revision)
    new = json.loads(self.body)["tag"]
    if new in self.hub.store[name].refs:
        raise Error(409, "", f"Reference already exists: {new}")
    self.hub.store.branch(name, new, revision)
    self.json({})


def refs(self: Handler, name: str) -> None:
    head = self.checked(name)
    others = self.hub.store[name].refs
    rows = {ref: {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": one.id} for ref, one in others.items()}
    branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": head}]
    pulls = [{"name": ref, "ref": ref, "targetCommit": others[ref].id} for ref in rows if ref.startswith("refs/")]
    branches += [one for ref, one in rows.items() if not ref.startswith("refs/")]
    self.json({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})


def _new_pull(self: Handler, name: str, title: str) -> Pull:
    pulls = self.hub.store[name].pulls
    pulls.append(Pull(len(pulls) + 1, title, self.signed_in().name))
    self.hub.store.branch(name, pulls[-1].ref, "main")
    return pulls[-1]


def open_pull(self: Handler, name: str) -> None:
    may_write(self, name, create_pr=True)
    with self.hub.store.lock:
        pull = _new_pull(self, name, json.loads(self.body)["title"])
    self.json({"num": pull.number, "pullRequest": True})


def pulls(self: Handler, name: str) -> None:
    self.checked(name)
    author = self.query.get("author")
    found = [one for one in self.hub.store[name].pulls if author in (None, [one.author])]
    self.json({"count": len(found), "start": 0, "discussions": [_pull(name, one) for one in found]})


def pull(self: Handler, name: str, number: str) -> None:
    self.checked(name)
    found = [one for one in self.hub.store[name].pulls if one.number == int(number)]
    if not found:
        raise Error(404)
    self.json(_pull(name, found[0]) | {"events": [], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}})


def _pull(name: str, found: Pull) -> dict[str, Any]:
    return {
        "num": found.number, "title": found.title, "author": {"name": found.author}, "status": found.status,
        "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}, "isPullRequest": True,
    }  # fmt: skip


#: The first that fits.
ROUTES: Routes = [
    ("hub", "GET", "/api/whoami-v2", whoami),
    ("hub", "POST", "/api/repos/create", create),
    ("hub", "DELETE", "/api/repos/delete", delete),
    ("hub", "POST", "/api/validate-yaml", validate_yaml),
    ("hub", "GET", f"{MODEL}/auth-check", auth_check),
    ("hub", "GET", f"{MODEL}/auth-check/(write)", auth_check),
    ("hub", "POST", f"{MODEL}/preupload/([^/]+)", preupload),
    ("hub", "POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    ("hub", "POST", rf"/{REPO}\.git/info/lfs/verify", verify),
    ("hub", "POST", f"/complete/{REPO}/([0-9a-f]{{64}})", complete),
    ("cdn", "PUT", f"/upload/{REPO}/([0-9a-f]{{64}})", put),
    ("cdn", "PUT", f"/upload/{REPO}/([0-9a-f]{{64}})/([0-9]+)", put_part),
    ("hub", "GET", f"{MODEL}/xet-(write|read)-token/([^/]+)", xet_token),
    ("hub", "POST", f"{MODEL}/paths-info/([^/]+)", paths_info),
    ("hub", "POST", f"{MODEL}/lfs-files/duplicate", duplicate),
    ("hub", "POST", f"{MODEL}/commit/([^/]+)", commit),
    ("hub", "POST", f"{MODEL}/branch/([^/]+)", branch),
    ("hub", "POST", f"{MODEL}/tag/([^/]+)", tag),
    ("hub", "GET", f"{MODEL}/refs", refs),
    ("hub", "GET", f"{MODEL}/discussions", pulls),
    ("hub", "POST", f"{MODEL}/discussions", open_pull),
    ("hub", "GET", f"{MODEL}/discussions/([0-9]+)", pull),
]
