"""Steps that only pretend to compute, on a host of pretended GPUs: the real rules, ledger and manifests, in a second a job.

A folder with this file's text as `sitecustomize.py` stands in PYTHONPATH: Python reads it before anything else, and where it
was told to run a step (`-m workflow_scripts.steps.NAME`), runs this instead.
"""

SECONDS = 0.4
PROGRAM = """
import os, sys, time

module = next((word for word in sys.orig_argv if word.startswith("workflow_scripts.")), "")
if module in ("workflow_scripts.tools.gpu", "workflow_scripts.tools.rehearse"):
    os._exit(0)  # there is a card, it says, and the scorers, which no pretended step asks, can judge
if module.startswith("workflow_scripts.steps."):
    sys.argv = ["step", *sys.orig_argv[sys.orig_argv.index(module) + 1:]]
    sys.path.insert(0, os.environ["PYTHONPATH"].split(":")[0])
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.plumbing import gpus, progress
    from workflow_scripts.steps import cli
    FILES = {"train": "adapter_model.safetensors", "make": "model.safetensors", "merge": "model.safetensors"}

    def main(job):
        using = f"{FOLDER}/using/{os.getpid()}"
        def note(what):
            if gpus.held:
                held = f"{gpus.held.gpu} {(gpus.held.bytes or 0) >> 20}"
                with open(FOLDER + "/notes", "a") as file:
                    file.write(f"{what} {os.getpid()} {held} {job.out} {time.time()}\\n")
        note("begin")
        if gpus.held and gpus.held.bytes:
            with open(using, "w") as file:
                file.write(f"{gpus.held.gpu} {gpus.held.bytes >> 20}")
        bar = progress.Progress(2, f"{job.out.parts[1]} pretended")
        bar.step(1)
        time.sleep(SECONDS)
        bar.close()
        with manifests.complete(job, "pretended", job.parents()) as draft:
            verb = module.rpartition(".")[2].partition("_")[0]
            name = FILES.get(verb) or job.out.name.replace(".manifest.json", ".jsonl")
            if name != job.out.name:
                (draft.folder / name).write_text(f"{job.out}\\n")
        note("end")
        if os.path.exists(using):
            os.unlink(using)

    cli._peak = lambda: 0.0
    cli.run(main, "")
    sys.stdout.flush()
    os._exit(0)
"""


def text(folder: str) -> str:
    return PROGRAM.replace("FOLDER", repr(folder)).replace("SECONDS", str(SECONDS))
