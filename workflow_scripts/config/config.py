"""The config: files merged, every key and type checked once, experiments resolved. Runs at parse time, in milliseconds.

Every error names the file and the path of the key. Nothing is detected here (no GPU, no network): a login node plans what a GPU
node plans.
"""

from pathlib import Path

from workflow_scripts.config import experiments, references, schema, sweep
from workflow_scripts.config.names import RUN_NAME
from workflow_scripts.config.written import Written, merge_all
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plumbing.messages import InputError


class Config(Written):
    """A config that has been checked. `data` is the merged tree, `experiments` the resolved experiments by name."""

    def __init__(self, user: dict, files: list[str] | None = None):
        """user: the merged config (as Snakemake hands it over); files: where it came from, for the errors.

        Raises InputError with the file and the path of the key.
        """
        super().__init__(user, files)
        self.copies: dict[str, str] = {}  # of a rank sweep -> the experiment that each is a copy of
        schema.check(self)
        self.experiments: dict[str, dict] = experiments.resolve(self)
        schema.check_experiments(self, self.experiments)
        references.check(self, self.experiments)
        self.experiments, self.copies = sweep.expand(self, self.experiments)

    def place(self, name: str, path: list) -> list:
        return super().place(self.copies.get(name, name), path)

    def run(self, name: str) -> tuple[str, int]:
        """(experiment, seed) of a run's name, such as `dpo` (seed 1) or `dpo.seed2`. InputError if there is none."""
        match = RUN_NAME.fullmatch(name)
        if not match or match["experiment"] not in self.experiments:
            raise InputError(f"{name}: no experiment of this config ({', '.join(self.experiments)})")
        if match["seed"] is not None and (int(match["seed"]) < 2 or match["seed"].startswith("0")):
            raise InputError(f"{name}: {match['experiment']} without a suffix is seed 1; suffixes start at .seed2")
        return match["experiment"], int(match["seed"] or 1)

    def lora(self, experiment: str) -> dict:
        """The LoRA block of an experiment: the global one, or that of a copy's rank."""
        return self.experiments[experiment].get("lora", self.data["lora"])


def load(*files: Path | str) -> Config:
    """The config of files given in the order in which they are laid over each other."""
    return Config(merge_all([read_yaml(file) for file in files]), [str(file) for file in files])
