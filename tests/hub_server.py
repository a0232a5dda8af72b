"""A Hugging Face Hub on this machine, as far as its own client asks: models, branches, pull requests, LFS"""
import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_OfTheTestsAndNoOther'


class Repo:
    def __init__(self, private):
        self.private = private
        self.commits = {}  # oid -> {path: content, an oid of LFS where it is a str}
        self.messages = []
        self.refs = {'main': self.commit(None, {'.gitattributes': b'*.safetensors filter=lfs\n'}, 'initial commit')}

    def commit(self, parent, files, message):
        oid = hashlib.sha1(f'{parent}{len(self.commits)}{message}'.encode()).hexdigest()
        self.commits[oid] = dict(self.commits.get(parent, {}), **files)
        self.messages.append(message)
        return oid

    def resolve(self, revision):
        """Return the commit of a branch, pull request or commit, None if there is none."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Serves repositories from memory on a free port of 127.0.0.1.

    Attributes:
        repos: Repository of each repo_id.
        faults: (method, pattern of the path, status or 'drop', times) of requests that are to fail.
        requests: (method, path, authorization) of each request so far.
    """

    def __init__(self):
        self.repos, self.blobs, self.faults, self.requests = {}, {}, [], []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), dict(hub=self)))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.cdn = f'http://localhost:{self.port}/cdn'  # another host for the client, which keeps its token from it
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method, pattern, how, times=1000):
        self.faults.append([method, re.compile(pattern), how, times])

    def files(self, repo_id, revision='main'):
        """Return {path: content} of a revision."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.resolve(revision)]
        return {path: self.blobs[held] if isinstance(held, str) else held for path, held in files.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    routes = (
        ('POST', r'/api/repos/create', 'create_repo'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', 'model_info'),
        ('POST', r'/api/models/([^/]+/[^/]+)/branch/([^/]+)', 'create_branch'),
        ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', 'preupload'),
        ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', 'commit'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('PUT', r'/lfs/([0-9a-f]{64})', 'lfs_upload'),
        ('POST', r'/lfs/([0-9a-f]{64})/verify', 'lfs_verify'),
        ('GET', r'/cdn/([0-9a-f]{64})', 'cdn'),
        ('HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
        ('GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
    )

    def handle_request(self):
        self.body = self.read_body()
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.authorization = self.headers.get('authorization')
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.authorization))
            for fault in self.hub.faults:
                if fault[0] == self.command and fault[1].search(path) and fault[3] > 0:
                    fault[3] -= 1
                    if fault[2] == 'drop':
                        self.close_connection = True
                        return self.connection.shutdown(socket.SHUT_RDWR)
                    return self.error(fault[2], {409: 'Conflict.', 404: 'Not found.'}.get(fault[2], 'Denied.'))
            for method, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    return getattr(self, name)(*(g and unquote(g) for g in match.groups()))
            return self.error(404, f'no such route: {self.command} {path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self):
        if self.headers.get('transfer-encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('content-length') or 0))

    def answer(self, status=200, content=b'', **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers['content_type'] = 'application/json'
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('content-length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def error(self, status, message, code=None):
        headers = dict(x_error_message=message, **(dict(x_error_code=code) if code else {}))
        self.answer(status, dict(error=message), **headers)

    def log_message(self, *args):
        pass

    def find(self, repo_id, revision='main', write=False):
        """Return a repository and a commit of it, None after an error was answered."""
        known = self.authorization == f'Bearer {TOKEN}'
        repo = self.hub.repos.get(repo_id)
        if self.authorization and not known:
            return self.error(401, 'Invalid credentials in Authorization header')
        if repo is None or (repo.private and not known):
            return self.error(404 if known else 401, 'Repository not found', 'RepoNotFound')
        if write and not known:
            return self.error(401, 'Invalid username or password.')
        oid = repo.resolve(revision or 'main')
        if oid is None:
            return self.error(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, oid

    def create_repo(self):
        if self.authorization != f'Bearer {TOKEN}':
            return self.error(401, 'Invalid username or password.')
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        answer = dict(url=f'{self.hub.url}/{repo_id}', name=repo_id)
        if repo_id in self.hub.repos:
            return self.answer(409, dict(answer, error='You already created this model repo'))
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.repos[repo_id] = Repo(bool(private))
        return self.answer(200, answer)

    def validate_yaml(self):
        front = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.DOTALL)
        if front is None:
            return self.answer(200, dict(errors=[], warnings=[dict(message='empty or missing yaml metadata')]))
        valid = isinstance(yaml.safe_load(front[1]), dict)
        return self.answer(200 if valid else 400, dict(errors=[] if valid else [dict(message='bad')], warnings=[]))

    def model_info(self, repo_id, revision):
        if found := self.find(repo_id, revision):
            repo, oid = found
            files = [dict(rfilename=path) for path in repo.commits[oid]]
            self.answer(200, dict(id=repo_id, modelId=repo_id, sha=oid, private=repo.private, tags=[], siblings=files))

    def create_branch(self, repo_id, branch):
        if found := self.find(repo_id, write=True):
            repo, oid = found
            if branch in repo.refs:
                return self.error(409, f'Reference already exists: {branch}')
            repo.refs[branch] = oid
            self.answer(201, {})

    def preupload(self, repo_id, revision):
        if found := self.find(repo_id, revision, write=True):
            repo, oid = found
            files = []
            for file in json.loads(self.body)['files']:
                held = repo.commits[oid].get(file['path'])
                if isinstance(held, bytes):
                    held = hashlib.sha1(b'blob %d\0' % len(held) + held).hexdigest()
                mode = 'lfs' if file['path'].endswith('.safetensors') else 'regular'
                files.append(dict(path=file['path'], uploadMode=mode, shouldIgnore=False, oid=held))
            self.answer(200, dict(files=files, commitOid=oid))

    def commit(self, repo_id, revision):
        if not (found := self.find(repo_id, revision, write=True)):
            return
        repo, parent = found
        message, files = '', {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                message = value['summary']
            elif item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile' and value['oid'] in self.hub.blobs:
                files[value['path']] = value['oid']
            else:
                return self.error(400, f"cannot {item['key']} {value}")
        oid = repo.commit(parent, files, message)
        answer = dict(success=True, commitOid=oid, commitUrl=f'{self.hub.url}/{repo_id}/commit/{oid}')
        if self.query.get('create_pr'):
            number = 1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)
            revision = f'refs/pr/{number}'
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
        repo.refs[revision] = oid
        self.answer(200, answer)

    def lfs_batch(self, repo_id):
        if self.find(repo_id, write=True):
            objects = []
            for o in json.loads(self.body)['objects']:
                href = f"{self.hub.url}/lfs/{o['oid']}"
                actions = dict(upload=dict(href=href), verify=dict(href=f'{href}/verify'))
                objects.append(o if o['oid'] in self.hub.blobs else dict(o, actions=actions))
            self.answer(200, dict(transfer='basic', objects=objects))

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, 'another content than announced')
        self.hub.blobs[oid] = self.body
        self.answer(200)

    def lfs_verify(self, oid):
        self.answer(200 if oid in self.hub.blobs else 404)

    def cdn(self, oid):
        content = self.hub.blobs[oid]
        start = re.match(r'bytes=(\d+)-', self.headers.get('range') or '')
        self.answer(206 if start else 200, content[int(start[1]):] if start else content)

    def resolve(self, repo_id, revision, path):
        if found := self.find(repo_id, revision):
            repo, oid = found
            content = repo.commits[oid].get(path)
            if content is None:
                return self.error(404, 'Entry not found', 'EntryNotFound')
            if isinstance(content, str):
                size = str(len(self.hub.blobs[content]))
                return self.answer(
                    302, x_repo_commit=oid, x_linked_etag=f'"{content}"', x_linked_size=size,
                    location=f'{self.hub.cdn}/{content}')
            self.answer(200, content, x_repo_commit=oid, etag=f'"{hashlib.sha1(content).hexdigest()}"')
