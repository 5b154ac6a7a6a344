"""The HTTP interfaces of Kubernetes and of AWS Batch, as far as the executors use them: real clients, recorded requests."""

import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers on a free port of this host until closed. `calls`: (method, path, body) of every request."""

    def __init__(self):
        self.calls: list[tuple[str, str, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(text) if text else {}
                outer.calls.append((self.command, self.path, body))
                status, answer = outer.answer(self.command, self.path, body)
                out = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
                self.send_header("Content-Length", str(len(out)))
                self.end_headers()
                self.wfile.write(out)

            do_GET = do_POST = do_DELETE = do_PUT = handle_any

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: dict) -> tuple[int, dict | str]:
        raise NotImplementedError

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Kubernetes(Server):
    """With `run`, each job's command is run here, in an empty folder, as its only pod. Refuses what Kubernetes refuses."""

    def __init__(self, run_in=None, env=None):
        self.jobs: dict[str, dict] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.run_in, self.env = run_in, env
        super().__init__()

    def config(self) -> str:
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )

    def create(self, body: dict) -> tuple[int, dict]:
        container = body["spec"]["template"]["spec"]["containers"][0]
        requests, limits = (container["resources"].get(name) or {} for name in ("requests", "limits"))
        if any("/" in name and limits.get(name) != count for name, count in requests.items()):
            return 422, {"message": "an extended resource needs a limit that equals its request"}
        name = body["metadata"]["name"]
        self.jobs[name] = body
        if self.run_in is not None:
            log = open(self.run_in / f"{name}.log", "w")
            command = [*container["command"], *container["args"]]
            self.processes[name] = subprocess.Popen(command, cwd=self.run_in, env=self.env, stdout=log, stderr=log)
        return 201, body

    def answer(self, method, path, body):
        name = path.split("?")[0].removesuffix("/status").removesuffix("/log").rsplit("/", 1)[-1]
        status = self.processes[name].poll() if name in self.processes else None
        if method == "POST" and path.endswith("/jobs"):
            return self.create(body)
        if "/jobs/" in path and method == "GET":
            counts = {} if status is None else {"succeeded": 1} if status == 0 else {"failed": 1}
            return 200, {"metadata": {"name": name}, "status": counts}
        if path.split("?")[0].endswith("/pods"):
            job = re.search(r"job-name%3D([\w-]+)", path)[1]
            code = self.processes[job].poll() if job in self.processes else None
            if code is None:
                return 200, {"items": []}
            state = {"terminated": {"exitCode": code}}
            container = {"name": "snakemake", "image": "i", "imageID": "i", "ready": False, "restartCount": 0, "state": state}
            return 200, {"items": [{"metadata": {"name": f"pod-{job}"}, "status": {"containerStatuses": [container]}}]}
        if "/log" in path and "previous=" in path:
            return 400, {"message": "previous terminated container not found"}
        if "/log" in path:
            return 200, (self.run_in / f"{name.removeprefix('pod-')}.log").read_text()
        return 200, body or {}


class Batch(Server):
    """AWS Batch: definitions and jobs; a job is never done."""

    def answer(self, method, path, body):
        if path == "/v1/registerjobdefinition":
            name = body["jobDefinitionName"]
            return 200, {"jobDefinitionName": name, "revision": 1, "jobDefinitionArn": f"arn:aws:batch:::job-definition/{name}:1"}
        if path == "/v1/submitjob":
            return 200, {"jobName": body["jobName"], "jobId": f"id-{len(self.calls)}"}
        if path == "/v1/describejobs":
            return 200, {"jobs": [{"jobId": id, "jobName": id, "status": "RUNNABLE"} for id in body["jobs"]]}
        return 200, {}
