"""Snakemake's AWS Batch executor, for results on an EFS file system that every job mounts.

The executor that this builds on (snakemake-executor-plugin-aws-batch) mounts no volume and tells Snakemake that jobs share no
file system; profiles/kubernetes/plugin says what is lost then. It also ends every job after one and the same time (300 s unless
set), and gives a job whose memory is not in Fargate's table the *least* of that table. This one:

- mounts `--aws-batch-shared-efs ID:PATH`, and refuses to start anywhere else than below PATH;
- gpu -> GPU, mem_mb -> MEMORY, threads -> VCPU, runtime -> the timeout of each attempt, as they are.
"""

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import snakemake_executor_plugin_aws_batch as plugin
from snakemake_executor_plugin_aws_batch.batch_job_builder import BatchJobBuilder
from snakemake_interface_common.exceptions import WorkflowError

common_settings = replace(
    plugin.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)


@dataclass
class ExecutorSettings(plugin.ExecutorSettings):
    efs: Optional[str] = field(  # noqa: UP045 - Snakemake calls the type
        default=None,
        metadata={"help": "The EFS file system with clone and results, and where it is mounted: ID:PATH", "required": True},
    )


class Builder(BatchJobBuilder):
    """Job definitions of EC2, which takes any memory: `build_job_definition` checks against Fargate's table."""

    def _validate_resources(self, vcpu, mem):
        return vcpu, mem


plugin.BatchJobBuilder = Builder  # the name that the executor looks up


class Executor(plugin.Executor):
    def __post_init__(self):
        self.submitting = None
        here = Path(self.workflow.workdir_init)
        self.efs, _, self.path = (self.workflow.executor_settings.efs or "").partition(":")
        if not self.path or not here.is_relative_to(self.path):
            found = self.workflow.executor_settings.efs or "none"
            raise WorkflowError(
                f"aws-batch-shared-efs: found {found}, expected ID:PATH of the file system "
                f"with {here}, where Snakemake runs; start it in a clone on that file system, mounted at PATH as in the jobs"
            )
        super().__post_init__()
        register = self.batch_client.register_job_definition
        self.batch_client.register_job_definition = lambda **definition: register(**self.complete(definition))

    def get_job_exec_prefix(self, job):
        return f"cd {shlex.quote(str(self.workflow.workdir_init))}"

    def run_job(self, job):
        self.submitting = job
        super().run_job(job)

    def complete(self, definition):
        """The job definition as the plugin made it, with the volume, GPUs and time."""
        resources = self.submitting.resources
        container = definition["containerProperties"]
        volume = {"fileSystemId": self.efs, "rootDirectory": "/", "transitEncryption": "ENABLED"}
        container["volumes"] = [{"name": "shared", "efsVolumeConfiguration": volume}]
        container["mountPoints"] = [{"sourceVolume": "shared", "containerPath": self.path, "readOnly": False}]
        if gpus := int(resources.get("gpu") or 0):
            others = [asked for asked in container["resourceRequirements"] if asked["type"] != "GPU"]
            container["resourceRequirements"] = [*others, {"type": "GPU", "value": str(gpus)}]
        if runtime := resources.get("runtime"):
            definition["timeout"] = {"attemptDurationSeconds": int(runtime) * 60}
        return definition
