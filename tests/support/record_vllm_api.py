"""Writes tests/files/vllm_api.json: the version and the names of arguments and attributes of vLLM's Python API, from its wheel.

vLLM is not installed where tests run, so tests/support/vllm_standin.py stands for it, and is held against this list.

    pip download --no-deps vllm==0.26.0 && python -m tests.support.record_vllm_api vllm-0.26.0-*.whl
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "files/vllm_api.json"
# Class -> (file, the method whose arguments count; "" for the fields of the class).
WANTED = {
    "LLM": ("entrypoints/llm.py", "__init__"),
    "LLM.generate": ("entrypoints/llm.py", "generate"),
    "EngineArgs": ("engine/arg_utils.py", ""),  # which LLM takes as well, as further arguments by name
    "SamplingParams": ("sampling_params.py", ""),
    "TokensPrompt": ("inputs/llm.py", ""),
    "LoRARequest": ("lora/request.py", ""),
    "RequestOutput": ("outputs.py", "__init__"),
    "CompletionOutput": ("outputs.py", ""),
    "Logprob": ("logprobs.py", ""),
}


def names(source: str, of: str, method: str) -> list[str]:
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == of).body
    if not method:
        fields = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
        return [name for name in fields if not name.startswith("_")]
    arguments = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == method).args
    return [one.arg for one in (*arguments.args, *arguments.kwonlyargs) if one.arg != "self"]


def main() -> None:
    wheel = zipfile.ZipFile(sys.argv[1])
    meta = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(meta).decode()
    found: dict = {"version": next(line.split(": ")[1] for line in text.splitlines() if line.startswith("Version: "))}
    for name, (file, method) in WANTED.items():
        found[name] = names(wheel.read(f"vllm/{file}").decode(), name.partition(".")[0], method)
    ranks = next(
        node.value
        for node in ast.parse(wheel.read("vllm/config/lora.py").decode()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MaxLoRARanks"
    )
    found["ranks"] = list(ast.literal_eval(ranks.slice))  # type: ignore[attr-defined]
    texts = {
        str(node.value) for node in ast.walk(ast.parse(wheel.read("vllm/envs.py").decode())) if isinstance(node, ast.Constant)
    }
    found["variables"] = sorted(text for text in texts if text.startswith("VLLM_") and text.isupper() and " " not in text)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
