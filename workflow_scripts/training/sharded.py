"""`shard: true`: the frozen base of a training lies on its ranks in parts, for one that no card holds alone.

It is torch's FSDP2 (`torch.distributed.fsdp.fully_shard`): of each decoder layer a rank keeps its part of the weights, all
gather a layer when it computes, forwards and backwards, the next one meanwhile, and drop it again. Nothing else changes.
Adapters, and a reward model's head, are no part of it: they are whole on each rank, and their gradients are summed by the
exchange that is there for them (training/over_ranks.py). So is what stands outside the layers: embedding, LM head and last
norm, which TRL's LM head and its hooks take as tensors (7 B of Qwen2.5: 2.2 GB of 15.2).

A layer is gathered by all ranks at once, so all make the same number of passes. Of the micro-batches of a step each has as many,
but for the last step of an epoch that ends within it. There, and where batches are shared out otherwise (held-out rows, the
reference), the last round is computed by all, and one rank's is taken.

The base is read into the host's memory by each rank, as many times as there are ranks, and goes to the card layer by layer.
"""

from typing import Any

from torch import nn

from workflow_scripts.artifacts.manifests import Artifact, Job
from workflow_scripts.models import loading
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.training import exchange


def load(start: Artifact, job: Job, reward: bool = False) -> Any:
    """The base of a training: whole, or this rank's part. What `loading.load` says of `reward`."""
    step, quant = job.step, job.config.get("quant")
    if not job.shard or ranks.count == 1:
        return loading.load(start, job.work, step["device"], step["precision"], quant, reward)
    if quant is not None:
        raise InputError("--shard: a base in 4-bit is not shared out; set quantise: none, or leave shard away")
    model = loading.load(start, job.work, "cpu", step["precision"], None, reward)
    split(model, step["device"])
    return model


def split(model: Any, device: str) -> None:
    """Keep this rank's part of each layer of a causal LM, or of one with another head, on its device; all else whole."""
    from torch.distributed.fsdp import fully_shard

    body = model.base_model
    if not isinstance(layers := getattr(body, "layers", None), nn.ModuleList):
        raise InputError(f"shard: a {type(model).__name__} has no list of decoder layers to share out; leave shard away")
    mesh = exchange.mesh(device)
    model.requires_grad_(False)  # as peft does: nothing of it gets a gradient, so none is exchanged
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    rest = {parameter for parameter in body.parameters() if id(parameter) not in in_layers}
    fully_shard(body, mesh=mesh, ignored_params=rest)  # so that layers know each other, and gather ahead
    model.to(device)
    body.register_forward_pre_hook(lambda *_: ranks.come("a pass through the layers") and None)
    ranks.in_step = True
