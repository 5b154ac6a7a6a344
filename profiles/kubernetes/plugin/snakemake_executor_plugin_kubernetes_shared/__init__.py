"""Snakemake's Kubernetes executor, for results on a volume that every job mounts.

The executor that this builds on (snakemake-executor-plugin-kubernetes) tells Snakemake that jobs share no file system, and no
setting overrules it. Every declared file then travels through object storage, and what is not declared is lost: checkpoints,
run.json, tokenizers, merged weights. This one says that the files are shared, and refuses to start where they are not. Besides:

- `runtime` ends a pod that has run for longer (the plugin ignores it); waiting for a node does not count.
- A job with `gpu: 0` asks for no GPU and does not tolerate the taint that keeps GPU nodes free.
- The log of a failed job that can't be read fails that job only, not the whole run.
"""

import shlex
from dataclasses import replace
from pathlib import Path

import kubernetes
import snakemake_executor_plugin_kubernetes as plugin
from snakemake_interface_common.exceptions import WorkflowError

ExecutorSettings = plugin.ExecutorSettings
common_settings = replace(
    plugin.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)
GPUS = ("nvidia.com/gpu", "amd.com/gpu")


class Executor(plugin.Executor):
    def __post_init__(self):
        self.submitting = None
        mounts = self.workflow.executor_settings.persistent_volumes
        here = Path(self.workflow.workdir_init)
        if not any(here.is_relative_to(volume.path) for volume in mounts):
            found = ", ".join(volume.unparse() for volume in mounts) or "none"
            raise WorkflowError(
                f"kubernetes-shared-persistent-volumes: found {found}, expected one that is mounted at or above {here}, where "
                "Snakemake runs; start it in a clone on the shared volume, or name that volume as CLAIM:PATH"
            )
        super().__post_init__()

    def get_job_exec_prefix(self, job):
        return f"cd {shlex.quote(str(self.workflow.workdir_init))}"

    def run_job(self, job):
        self.submitting = job
        super().run_job(job)

    # The plugin makes its clients anew when a token has expired; each is completed as it is set.

    @property
    def batchapi(self):
        return self._batchapi

    @batchapi.setter
    def batchapi(self, api):
        create = api.create_namespaced_job
        api.create_namespaced_job = lambda namespace, body: create(namespace, self.complete(body))
        self._batchapi = api

    @property
    def kubeapi(self):
        return self._kubeapi

    @kubeapi.setter
    def kubeapi(self, api):
        read = api.read_namespaced_pod_log

        def log(previous=None, **which):  # previous: of a container before its restart; these never restart
            try:
                return read(**which)
            except kubernetes.client.rest.ApiException as error:
                return f"no log: {error.status} {error.reason}"

        api.read_namespaced_pod_log = log
        self._kubeapi = api

    def complete(self, body):
        """The job as the plugin made it, with what `runtime` and `gpu: 0` mean."""
        pod = body.spec.template.spec
        resources = self.submitting.resources
        if runtime := resources.get("runtime"):
            pod.active_deadline_seconds = int(runtime) * 60  # of the pod: a deadline of the job would count the time in the queue
        if not resources.get("gpu"):
            pod.tolerations = None
            for asked in (pod.containers[0].resources.requests, pod.containers[0].resources.limits):
                for name in GPUS:
                    (asked or {}).pop(name, None)
        return body
