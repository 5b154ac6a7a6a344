"""Profiles: each loads, and what rules ask for reaches each scheduler under its own names. Also: a plan needs no GPU to look at.

Executors, plugins and their clients are the real ones; schedulers and servers behind them are stand-ins (tests/profiles/).
What is expected comes from the jobs that were submitted, not from the numbers that rules have today.
"""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import MICRO, ROOT
from tests.profiles import servers
from tests.profiles.sites import CUDA, DOCS, HERE, Site, fence
from tests.support.packages import packages

PROFILES = sorted(path.parent.name for path in ROOT.glob("profiles/*/profile.yaml"))
PLUGINS = {"kubernetes": "profiles/kubernetes/plugin", "aws-batch": "profiles/aws-batch/plugin"}
TARGETS = [*(f"results/ifeval_{run}.json" for run in ("dpo", "kto", "ppo", "grpo", "rloo")), "results/rm/rm_eval.json"]
GPU_RULES = {"generate", "eval_rm", *(f"train_{method}" for method in ("sft", "dpo", "kto", "rm", "ppo", "grpo", "rloo"))}


@pytest.fixture(scope="module")
def plugins() -> str:
    try:
        return str(packages(HERE / "requirements.txt"))
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def site(tmp_path_factory, plugins) -> Site:
    return Site(tmp_path_factory.mktemp("site"), plugins)


def submitted(jobs: list[dict]) -> list[dict]:
    """The jobs that left this host. They ask for a GPU where their step uses one: the config says `device: cuda`."""
    sent = [job for job in jobs if not job["local"]]
    by_gpu = {gpu: {job["rule"] for job in sent if job["resources"]["gpu"] == gpu} for gpu in (0, 1)}
    assert GPU_RULES <= by_gpu[1] and {"make_base", "merge"} <= by_gpu[0] and not by_gpu[0] & by_gpu[1]
    assert not any(job["resources"].get("gpu") for job in jobs if job["local"])
    return sent


def job_table(site: Site, profile: str, env: dict[str, str]) -> str:
    done = site.snakemake("-n", *TARGETS, "--workflow-profile", f"profiles/{profile}", "--configfile", *CUDA, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return (done.stdout + done.stderr).split("Job stats:")[1].split("total")[0]


@pytest.fixture(scope="module")
def default_table(site) -> str:
    return job_table(site, "default", site.environment())


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_loads_and_plans_what_the_default_one_plans(site, name, default_table):
    profile = yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())
    env = site.environment(name.replace("-", "_"), PLUGINS.get(name))
    executor = profile.get("executor", "local").replace("-", "_")
    look = f"from importlib import util; assert util.find_spec('snakemake_executor_plugin_{executor}')"
    found = subprocess.run([sys.executable, "-c", look], env=env, capture_output=True)
    if executor != "local" and found.returncode:
        pytest.skip(f"the plugin of executor {executor} is not among tests/profiles/requirements.txt")
    assert job_table(site, name, env) == default_table and "train_ppo" in default_table


def test_a_folder_of_profiles_has_a_profile():
    assert PROFILES == sorted(path.name for path in (ROOT / "profiles").iterdir() if path.is_dir())


@pytest.mark.parametrize("name", [*PROFILES, "lsf"])
def test_every_profile_reruns_by_parameters_alone_and_keeps_our_lock(site, name):
    folder = f"profiles/{name}" if name in PROFILES else site.snippet(name)
    profile = yaml.safe_load((site.clone.folder / folder / "profile.yaml").read_text())
    default = yaml.safe_load((ROOT / "profiles/default/profile.yaml").read_text())
    for key in ("rerun-triggers", "rerun-incomplete", "keep-going", "nolock"):
        assert profile[key] == default[key], key


# Slurm


def test_slurm_gets_gpus_memory_cores_and_time_and_signals_the_job_step(site):
    env = site.warmed("slurm", **site.queue())
    sent = submitted(site.jobs(*TARGETS, "--workflow-profile", "profiles/slurm", env=env))
    calls = site.calls("sbatch")
    assert len(calls) == len(sent)
    for job, call in zip(sent, calls, strict=True):
        wants, asked = job["resources"], dict(re.findall(r"-([\w-]+)[= ]([\w@]+)", " ".join(call).split("--wrap")[0]))
        asked = {name.strip("-"): value for name, value in asked.items()}
        assert asked["t"] == str(wants["runtime"]) and asked["mem"] == str(wants["mem_mb"])
        assert asked["cpus-per-task"] == str(job["threads"]) and asked.get("gpus", "0") == str(wants["gpu"])
        assert asked["signal"] == "TERM@300" and asked["open-mode"] == "append" and "--requeue" in call
        assert "ntasks-per-gpu" not in asked and asked.get("ntasks", "1") == "1"


# PBS


def test_pbs_gets_gpus_memory_cores_and_time(site):
    env = site.warmed("cluster_generic", **site.queue())
    sent = submitted(site.jobs(*TARGETS, "--workflow-profile", "profiles/cluster-generic", env=env))
    calls = site.calls("qsub")
    assert len(calls) == len(sent)
    for job, call in zip(sent, calls, strict=True):
        wants, asked = job["resources"], [call[i + 1] for i, word in enumerate(call) if word == "-l"]
        select = f"select=1:ncpus={job['threads']}:ngpus={wants['gpu']}:mem={wants['mem_mb']}mb"
        assert asked == [select, f"walltime={wants['runtime'] * 60}"]
        assert call[call.index("-N") + 1] == job["rule"] and "-V" in call


def test_the_commented_lines_for_sge_ask_for_the_same(site):
    text = (ROOT / "profiles/cluster-generic/profile.yaml").read_text()
    (submit,) = re.findall(r"^# (cluster-generic-submit-cmd: >-\n(?:#   .*\n)+)", text, flags=re.M)
    (status,) = re.findall(r"^# (cluster-generic-status-cmd: .*)$", text, flags=re.M)
    profile = yaml.safe_load(text) | yaml.safe_load(submit.replace("\n# ", "\n")) | yaml.safe_load(status)
    (site.clone.folder / "profiles/sge").mkdir()
    (site.clone.folder / "profiles/sge/profile.yaml").write_text(yaml.safe_dump(profile))
    env = site.warmed("cluster_generic", **site.queue())
    sent = submitted(site.jobs(*TARGETS, "--workflow-profile", "profiles/sge", env=env))
    for job, call in zip(sent, site.calls("qsub"), strict=True):
        wants = job["resources"]
        (asked,) = (call[i + 1] for i, word in enumerate(call) if word == "-l")
        assert asked == f"gpu={wants['gpu']},h_vmem={wants['mem_mb'] // job['threads']}M,h_rt={wants['runtime'] * 60}"
        assert call[call.index("-pe") + 1 :][:2] == ["smp", str(job["threads"])] and {"-terse", "-V", "-cwd"} <= set(call)


def test_a_pbs_job_that_is_killed_is_seen_and_tried_again(tmp_path, plugins):
    site = Site(tmp_path, plugins)
    env = site.environment("cluster_generic", **site.queue(RUN_JOBS="1", QUEUE_ENDS="KILL"))
    quick = ["--max-status-checks-per-second", "10", "--seconds-between-status-checks", "1", "--latency-wait", "5"]
    base = "results/base/manifest.json"
    done = site.snakemake(base, "--workflow-profile", "profiles/cluster-generic", *quick, "--configfile", *MICRO, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert json.loads((site.clone.folder / base).read_text())["kind"] == "base"
    names = [call[call.index("-N") + 1] for call in site.calls("qsub")]
    scripts = [(site.folder / f"queue/{number}.sh").read_text() for number in range(1, len(names) + 1)]
    again = [name for name, script in zip(names, scripts, strict=True) if "--attempt 2" in script]
    assert again == [names[0]] and "--attempt 1" in scripts[0]  # the first job was killed without running


ENDED = ("", "Following jobs do not exist: \n7", 1)


@pytest.mark.parametrize(
    ("kind", "answers", "expected"),
    [
        ("pbs", {"qstat": ("job_state = Q", "", 0)}, "running"),
        ("pbs", {"qstat": ("    job_state = F\n    Exit_status = 0", "", 0)}, "success"),
        ("pbs", {"qstat": ("    job_state = F\n    Exit_status = 271", "", 0)}, "failed"),
        ("pbs", {"qstat": ("    job_state = F\n    comment = never ran", "", 0)}, "failed"),
        ("pbs", {"qstat": ("    job_state = C\n    exit_status = 0", "", 0)}, "success"),
        ("pbs", {"qstat": ("", "qstat: Unknown Job Id 7.pbs", 153)}, "failed"),
        ("pbs", {"qstat": ("", "qstat: cannot connect to server pbs (errno=15010)", 1)}, "running"),
        ("pbs", {}, "running"),
        ("sge", {"qstat": ("job_number: 7", "", 0)}, "running"),
        ("sge", {"qstat": ENDED, "qacct": ("failed 0\nexit_status 0", "", 0)}, "success"),
        ("sge", {"qstat": ENDED, "qacct": ("failed 0\nexit_status 1", "", 0)}, "failed"),
        ("sge", {"qstat": ENDED, "qacct": ("failed 37 : qmaster enforced h_rt\nexit_status 0", "", 0)}, "failed"),
        ("sge", {"qstat": ENDED, "qacct": ("", "job id 7 not found", 1)}, "running"),
        ("sge", {"qstat": ("", "error: commlib error", 1)}, "running"),
    ],
)
def test_the_status_of_a_job_in_the_words_of_its_scheduler(tmp_path, kind, answers, expected):
    for name, (out, errors, status) in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s\\n' '{out}'\nprintf '%s\\n' '{errors}' >&2\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, str(ROOT / "profiles/cluster-generic/status.py"), kind, "7"]
    path = f"{tmp_path}:/usr/bin:/bin" if answers else str(tmp_path)
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{expected}\n", 0)


# Kubernetes


def kubernetes(site: Site, server: servers.Kubernetes) -> dict[str, str]:
    (site.folder / "kubeconfig").write_text(server.config())
    return site.warmed("kubernetes", PLUGINS["kubernetes"], KUBECONFIG=str(site.folder / "kubeconfig"), HF_TOKEN="of a user")


def test_kubernetes_gets_gpus_memory_cores_disk_and_time(site):
    server = servers.Kubernetes()
    volume = ["--kubernetes-shared-persistent-volumes", f"phaseline:{site.folder}"]
    more = ["--set-resources", "train_sft:disk_mb=4321", "--envvars", "HF_TOKEN"]
    try:
        env = kubernetes(site, server)
        sent = submitted(site.jobs(*TARGETS, "--workflow-profile", "profiles/kubernetes", *volume, *more, env=env))
    finally:
        server.close()
    assert len(server.jobs) == len(sent)
    profile = yaml.safe_load((ROOT / "profiles/kubernetes/profile.yaml").read_text())
    for job, body in zip(sent, server.jobs.values(), strict=True):
        wants, pod = job["resources"], body["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        asked = {"memory": f"{wants['mem_mb']}M", "ephemeral-storage": f"{wants['disk_mb']}M"}
        if wants["gpu"]:
            asked["nvidia.com/gpu"] = str(wants["gpu"])
        assert container["resources"]["limits"] == {"cpu": f"{job['threads'] * 1000}m", **asked}
        assert container["resources"]["requests"] == {"cpu": f"{job['threads'] * 950}m", **asked}
        assert ("tolerations" in pod) == bool(wants["gpu"])  # CPU jobs stay off the nodes that are kept for GPUs
        assert pod["activeDeadlineSeconds"] == wants["runtime"] * 60
        assert "activeDeadlineSeconds" not in body["spec"]  # would count the time in the queue
        assert container["image"] == profile["container-image"]
        assert {"name": "phaseline", "persistentVolumeClaim": {"claimName": "phaseline"}} in pod["volumes"]
        assert {"name": "phaseline", "mountPath": str(site.folder)} in container["volumeMounts"]
        assert [variable["name"] for variable in container["env"]] == ["HF_TOKEN"]
        command = container["args"][1]
        assert command.startswith(f"cd {site.clone.folder} && python -m snakemake ")
        assert str(Path.home()) not in command  # a path of this host that no pod has
    assert {job["resources"]["disk_mb"] for job in sent if job["rule"] == "train_sft"} == {4321}
    (secret,) = (body for method, path, body in server.calls if path.endswith("/secrets"))
    assert base64.b64decode(secret["data"]["hf_token"]) == b"of a user"


TOY = """
rule again:
    output: "made.txt"
    resources: gpu=0, mem_mb=100, runtime=5
    shell: "echo attempt >> attempts.txt; test $(wc -l < attempts.txt) = 2 && echo made > {output}"
"""


def test_a_failed_pod_is_tried_again_and_the_documented_role_is_what_is_needed(site):
    work = site.folder / "toy"
    (site.folder / "pods").mkdir()
    work.mkdir()
    (work / "Snakefile").write_text(TOY)
    server = servers.Kubernetes(run_in=site.folder / "pods")
    try:
        server.env = env = kubernetes(site, server)
        profile = ["--workflow-profile", str(site.clone.folder / "profiles/kubernetes"), "--latency-wait", "5"]
        quick = ["--seconds-between-status-checks", "1", "--kubernetes-shared-persistent-volumes", f"phaseline:{site.folder}"]
        done = site.snakemake("made.txt", *profile, *quick, env=env, cwd=work)
    finally:
        server.close()
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (work / "made.txt").read_text() == "made\n" and (work / "attempts.txt").read_text().count("attempt") == 2
    assert len(server.jobs) == 2
    (log,) = work.glob(".snakemake/**/kubernetes-logs/*.log")
    assert "rule again" in log.read_text()  # what the failed pod said, although it never restarted
    needed = set()
    for method, path, _ in server.calls:
        kind = re.search(r"/namespaces/\w+/(\w+)(?:/[\w-]+(/\w+)?)?", path)
        verb = {"POST": "create", "DELETE": "delete", "GET": "get" if kind[0].count("/") > 3 else "list"}[method]
        needed.add((kind[1] + (kind[2] or ""), verb))
    (role,) = (part for part in yaml.safe_load_all(fence("kind: Role\n")) if part["kind"] == "Role")
    assert {(name, verb) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]} == needed


def test_the_documented_pod_mounts_what_the_profile_mounts(site):
    profile = yaml.safe_load((ROOT / "profiles/kubernetes/profile.yaml").read_text())
    pod = yaml.safe_load(fence("kind: Pod\n"))["spec"]
    (volume,) = pod["volumes"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert profile["kubernetes-shared-persistent-volumes"] == [f"{claim}:{mount['mountPath']}"]
    assert pod["containers"][0]["image"] == profile["container-image"]
    parts = {part["kind"]: part for part in yaml.safe_load_all(fence("kind: Role\n"))}
    assert parts["PersistentVolumeClaim"]["metadata"]["name"] == claim
    assert parts["ServiceAccount"]["metadata"]["name"] == pod["serviceAccountName"]
    pinned = (HERE / "requirements.txt").read_text().split()
    for text in (DOCS, (ROOT / "profiles/kubernetes/Dockerfile").read_text()):
        assert {name for name in re.findall(r"snakemake-executor-plugin-[\w-]+==[\d.]+", text)} <= set(pinned)


def test_kubernetes_is_refused_off_the_volume_and_without_ours_everywhere(site):
    server = servers.Kubernetes()
    try:
        env = kubernetes(site, server)
        done = site.snakemake(TARGETS[0], "--workflow-profile", "profiles/kubernetes", "--configfile", *CUDA, env=env)
        assert done.returncode
        assert f"found phaseline:/shared, expected one that is mounted at or above {site.clone.folder}" in done.stderr
        shared = ["--shared-fs-usage", "persistence", "input-output", "sources"]
        alone = ["-n", TARGETS[0], "--executor", "kubernetes", "--jobs", "1", *shared]
        done = site.snakemake(*alone, "--configfile", *CUDA, env=env)
        assert done.returncode, "this works now: profiles/kubernetes/plugin can go"
        assert "default storage provider" in done.stdout + done.stderr
    finally:
        server.close()
    assert not server.jobs


# LSF: the profile that the documentation shows; and AWS Batch


def test_lsf_gets_gpus_memory_cores_and_time(site):
    env = site.warmed("lsf", **site.queue())
    sent = submitted(site.jobs(*TARGETS, "--workflow-profile", site.snippet("lsf"), env=env))
    calls = site.calls("bsub")
    assert len(calls) == len(sent)
    for job, call in zip(sent, calls, strict=True):
        wants = job["resources"]
        options = {word: call[i + 1] for i, word in enumerate(call) if re.fullmatch(r"-[a-zA-Z]+", word)}
        assert options.get("-gpu") == ("num=1" if wants["gpu"] else None), job["rule"]
        assert int(options["-W"]) == wants["runtime"] and int(options["-n"]) == job["threads"]
        (memory,) = (float(word[len("rusage[mem=") : -1]) for word in call if word.startswith("rusage"))
        assert memory * job["threads"] == wants["mem_mb"]
        assert (options["-q"], options["-P"], options["-cwd"]) == ("normal", "phaseline", str(site.clone.folder))


def test_aws_batch_gets_gpus_memory_cores_and_time(site):
    server, profile = servers.Batch(), ["--workflow-profile", "profiles/aws-batch"]
    more = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_EC2_METADATA_DISABLED": "true"}
    env = site.warmed("aws_batch", PLUGINS["aws-batch"], AWS_ENDPOINT_URL=server.url, **more)
    try:
        refused = site.snakemake(TARGETS[0], *profile, "--configfile", *CUDA, env=env)
        assert f"expected ID:PATH of the file system with {site.clone.folder}" in refused.stderr
        sent = submitted(site.jobs(*TARGETS, *profile, "--aws-batch-shared-efs", f"fs-1:{site.folder}", env=env))
    finally:
        server.close()
    definitions = [body for _, path, body in server.calls if path == "/v1/registerjobdefinition"]
    queued = [body for _, path, body in server.calls if path == "/v1/submitjob"]
    assert len(definitions) == len(queued) == len(sent)
    shown = yaml.safe_load((ROOT / "profiles/aws-batch/profile.yaml").read_text())
    for job, definition, entry in zip(sent, definitions, queued, strict=True):
        wants, container = job["resources"], definition["containerProperties"]
        asked = {part["type"]: int(part["value"]) for part in container["resourceRequirements"]}
        gpus = {"GPU": wants["gpu"]} if wants["gpu"] else {}
        assert asked == {"VCPU": job["threads"], "MEMORY": wants["mem_mb"], **gpus}
        assert definition["timeout"] == {"attemptDurationSeconds": wants["runtime"] * 60}
        assert container["volumes"][0]["efsVolumeConfiguration"]["fileSystemId"] == "fs-1"
        assert container["mountPoints"] == [{"sourceVolume": "shared", "containerPath": str(site.folder), "readOnly": False}]
        assert container["command"][-1].startswith(f"cd {site.clone.folder} && python -m snakemake ")
        assert entry["jobQueue"] == shown["aws-batch-shared-job-queue"]
        assert entry["jobDefinition"] == f"{definition['jobDefinitionName']}:1"


# A plan looks at no hardware

TORCH = """
class cuda:
    is_available = staticmethod(lambda: {found})
    device_count = staticmethod(lambda: {found:d})
    is_bf16_supported = staticmethod(lambda: {found})
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Site:
    """A site without plugins: planning needs none."""
    return Site(tmp_path_factory.mktemp("plain"), "no-plugins")


def host(site: Site, folder: Path, gpu: bool) -> dict[str, str]:
    """A host with a GPU, as far as programs ask nvidia-smi, the environment or torch; or one without."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib/torch").mkdir(parents=True)
    (folder / "lib/torch/__init__.py").write_text(TORCH.format(found=gpu))
    env = site.environment()
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if gpu:
        (folder / "bin/nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
        (folder / "bin/nvidia-smi").chmod(0o755)
        env["CUDA_VISIBLE_DEVICES"] = env["NVIDIA_VISIBLE_DEVICES"] = "0"
    env["PYTHONPATH"] = f"{folder / 'lib'}:{env['PYTHONPATH']}"
    return {**env, "PATH": f"{folder / 'bin'}:{env['PATH']}"}


@pytest.mark.parametrize("configs", [CUDA, ["config/qwen05b.yaml"]], ids=["tiny", "qwen05b"])
def test_a_host_without_a_gpu_plans_what_a_host_with_one_plans(plain, tmp_path, configs):
    plans = []
    targets = ["results/qwen05b/ifeval_dpo.json"] if "qwen05b" in configs[0] else TARGETS
    for gpu in (True, False):
        env = host(plain, tmp_path / str(gpu), gpu)
        plain.jobs("-n", *targets, env=env, configs=configs)
        plans.append((plain.folder / "jobs.jsonl").read_bytes())
    assert plans[0] == plans[1] and plans[0].count(b"\n") > 5


def test_a_rule_that_looked_for_a_gpu_would_be_seen(tmp_path):
    looks = Site(tmp_path, "no-plugins")
    found = '"cuda" if __import__("torch").cuda.is_available() else "cpu"'
    looks.clone.edit("rules/common.smk", 'DEVICE = PLAN.config.data["device"]', f"DEVICE = {found}")
    plans = []
    for gpu in (True, False):
        jobs = looks.jobs("-n", TARGETS[0], env=host(looks, tmp_path / str(gpu), gpu))
        plans.append(sum(job["resources"]["gpu"] for job in jobs))
    assert plans[0] > 0 == plans[1]


# A node is not oversubscribed


def test_no_step_computes_with_more_threads_than_its_job_reserves(plain):
    (plain.clone.folder / "threads.yaml").write_text("threads: 2\n")
    jobs = plain.jobs("-n", *TARGETS, "--cores", "8", env=plain.environment(), configs=[*MICRO, "threads.yaml"])
    threads = {job["rule"]: (job["threads"], json.loads(job["params"]["step"]).get("threads", 1)) for job in jobs}
    assert all(reserved == used for reserved, used in threads.values()), threads
    assert threads["train_dpo"] == threads["generate"] == (2, 2) and threads["slice_data"] == (1, 1)
