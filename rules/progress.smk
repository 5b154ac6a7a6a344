# What a person sees of a run: how far it is, and of a job that failed the line of its step, not the step's JSON twice.
import signal
import subprocess
import threading
import time
from pathlib import Path

from snakemake.logging import DefaultFormatter, logger
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake.settings.enums import Quietness

from workflow_scripts.plumbing import progress
from workflow_scripts.tools.explain import duration, jobs_on_card, seconds_of, shortened


class Clock:
    """The time that a run still needs: as of its longest chain of jobs, or of all of them side by side where that takes longer."""

    def __init__(self):
        jobs = set(workflow.dag.needrun_jobs())
        self.at_once = at_once()
        found = {job: expected(job) for job in jobs}
        self.expected = {job: seconds for job, (seconds, _) in found.items()}
        self.work = {job: seconds / (beside or self.at_once) for job, (seconds, beside) in found.items()}
        self.below = {}  # seconds of the longest chain of jobs that wait for one
        for level in reversed(list(workflow.dag.toposorted(jobs))):
            for job in level:
                waiting = [one for one in workflow.dag.depending[job] if one in jobs]
                self.below[job] = max((self.expected[one] + self.below[one] for one in waiting), default=0)
        self.begun = {}

    def left(self, running):
        now = time.monotonic()
        for job in running:
            self.begun.setdefault(job, now)
        of_running = {job: max(0, self.expected.get(job, 0) - now + self.begun[job]) for job in running}
        waiting = sum(self.work.values()) - sum(self.work.get(job, 0) for job in self.begun)
        chain = max((seconds + self.below.get(job, 0) for job, seconds in of_running.items()), default=0)
        return max(chain, waiting + sum(of_running.values()) / self.at_once)


@cache
def clock():
    return Clock()


def put_first():
    """What others wait for goes first, by the time of the longest chain behind it; what nothing needs fills the gaps."""
    try:
        below = clock().below
        ranks = {seconds: rank for rank, seconds in enumerate(sorted(set(below.values())))}
        for job, seconds in below.items():
            workflow.dag._priority[job] = max(workflow.dag._priority.get(job, 0), ranks[seconds])
    except Exception as error:
        logger.debug(f"no order by what waits: {error!r}")


def expected(job):
    """Seconds: of the last run of the same phase, as `make why` says, else of the estimate by which it asks for its time. And how
    many jobs shared its card then, where that is known."""
    manifest = Path(job.output.get("manifest", job.output[0] if job.output else ""))
    if (known := seconds_of(manifest, str(job.benchmark or ""))) is not None:
        return known, jobs_on_card(manifest) if GPU else None
    requests = PLAN.config.data["requests"]
    return max(5, (job.resources.get("runtime", 0) - requests["minutes"] - 0.5) * 60 / requests["time"]), None


def at_once():
    """How many jobs may run side by side."""
    if not workflow.local_exec:
        return workflow.resource_settings.nodes or 1
    side_by_side = max(1, (workflow.resource_settings.cores or 1) // THREADS)
    if not GPU:
        return side_by_side
    asked = [job.resources["gpu_mb"] for job in workflow.dag.needrun_jobs() if job.resources.get("gpu")]
    by_memory = sum(OFFERED.values()) * len(asked) // max(sum(asked), 1) if OFFERED else side_by_side
    offered = getattr(workflow.global_resources.get("gpu"), "value", None) or side_by_side
    return max(1, min(offered, by_memory, side_by_side))


def run_and_say(self, jobs, executor=None):
    """Start jobs, and say how far the run is. What only decorates it fails nothing."""
    start_jobs(self, jobs, executor)
    try:
        if not hasattr(self, "told"):
            self.told = True
            threading.Thread(target=say_now_and_then, args=(self,), daemon=True).start()
        say_how_far(self)
    except Exception as error:
        logger.debug(f"no estimate of the time left: {error!r}")


def say_how_far(self):
    """How many steps are done; of those that run, where several do, a line each."""
    running = [job for one in list(self.running) for job in getattr(one, "jobs", [one])]
    says = f"{self.finished_jobs} of {len(workflow.dag)} steps done, {len(running)} running, about"
    lines = [f"{says} {duration(clock().left(running))} left", *(f"  {line}" for line in progress.on_board(BOARD))]
    logger.info("\n".join(lines), extra={"quietness": Quietness.PROGRESS})


def say_now_and_then(self):
    while True:
        time.sleep(60)
        try:
            if self.running and progress.on_board(BOARD):
                say_how_far(self)
        except Exception as error:
            logger.debug(f"no lines of progress: {error!r}")


def without_its_command(error):
    """A job's command holds the JSON of its step. What its step says of the failure stands above, and in its log."""
    if "workflow_scripts.steps." not in str(error.cmd):
        return say_all(error)
    killed = -error.returncode if error.returncode < 0 else error.returncode - 128
    if killed == signal.SIGKILL:
        return "The step was killed (SIGKILL): most often the machine had no memory left"
    return f"The step ended with exit status {error.returncode}; why, says the line above, and its log"


def without_its_step(self, msg):
    """A reason may be two parameters, old and new: `make why` says what changed in them."""
    return say_job(self, {**msg, "reason": shortened(msg["reason"])} if msg.get("reason") else msg)


def failed(self, msg):
    if workflow.output_settings.printshellcmds:
        return say_job_error(self, msg)
    return say_job_error(self, {**msg, "msg": msg["rule_msg"], "shellcmd": None})


if workflow.is_main_process and not workflow.dryrun:
    start_jobs, say_all, say_job_error = (
        JobScheduler.run,
        subprocess.CalledProcessError.__str__,
        DefaultFormatter._format_job_error,
    )
    JobScheduler.run = run_and_say
    subprocess.CalledProcessError.__str__ = without_its_command
    DefaultFormatter._format_job_error = failed
    say_job, DefaultFormatter._format_job_info = DefaultFormatter._format_job_info, without_its_step
