# Which rows the trainings can take decides nothing here: it is a check, which could otherwise fail only after SFT.
LIMITS = "--limits " + shlex.quote(json.dumps(PLAN.limits())).replace("{", "{{").replace("}", "}}")


rule slice_data:
    input:
        slice_inputs,
    output:
        manifest="<results>/data/{slice}.manifest.json",
        rows="<results>/data/{slice}.jsonl",
    log:
        "<logs>/data/{slice}.log",
    benchmark:
        "<benchmarks>/data/{slice}.tsv"
    wildcard_constraints:
        slice=any_of([name for name in SLICES if not PLAN.is_sampled(name)]),
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "slice"),
        runtime=asks("runtime", "slice"),
        disk_mb=asks("disk_mb", "slice"),
    params:
        step=signed(lambda wildcards: PLAN.slice(wildcards.slice)),
    shell:
        call("slice_data", "manifest", LIMITS)


# A slice whose rows a run makes: its answers, on the device, and the choice among them, which only a reward model does there.
rule sample:
    input:
        signed(lambda wildcards: edges(PLAN.sample_inputs(wildcards.slice))),
    output:
        manifest="<results>/data/{slice}.answers.manifest.json",
        answers="<results>/data/{slice}.answers.jsonl",
    log:
        "<logs>/data/{slice}.answers.log",
    benchmark:
        "<benchmarks>/data/{slice}.answers.tsv"
    wildcard_constraints:
        slice=SAMPLED_WHOLE,
    conda:
        ENV
    threads: THREADS
    resources:
        **room("samples"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "samples"),
        runtime=asks("runtime", "samples"),
        disk_mb=asks("disk_mb", "samples"),
    params:
        step=signed(lambda wildcards: PLAN.samples(wildcards.slice)),
    shell:
        call("sample", "manifest", ON_GPU)


# With `eval.shards`, as in rules/eval.smk.
rule sample_shard:
    input:
        signed(lambda wildcards: edges(PLAN.sample_inputs(wildcards.slice))),
    output:
        answers=temp("<results>/data/{slice}_shards/{shard}of{shards}.json"),
    log:
        "<logs>/data/{slice}.answers_{shard}of{shards}.log",
    benchmark:
        "<benchmarks>/data/{slice}.answers_{shard}of{shards}.tsv"
    wildcard_constraints:
        slice=SAMPLED_SHARDED,
        shard="[1-9][0-9]*",
        shards="[1-9][0-9]*",
    conda:
        ENV
    threads: THREADS
    resources:
        **room("samples"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "samples"),
        runtime=asks("runtime", "samples"),
        disk_mb=asks("disk_mb", "samples"),
    params:
        step=signed(lambda wildcards: PLAN.sample_shard(wildcards.slice, int(wildcards.shard))),
    shell:
        call("sample", "answers", ON_GPU)


rule gather_samples:
    input:
        made=signed(lambda wildcards: edges(PLAN.sample_inputs(wildcards.slice))),
        shards=signed(lambda wildcards: PLAN.sample_shard_files(wildcards.slice)),
    output:
        manifest="<results>/data/{slice}.answers.manifest.json",
        answers="<results>/data/{slice}.answers.jsonl",
    log:
        "<logs>/data/{slice}.answers.log",
    benchmark:
        "<benchmarks>/data/{slice}.answers.tsv"
    wildcard_constraints:
        slice=SAMPLED_SHARDED,
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "slice"),
        runtime=asks("runtime", "slice"),
        disk_mb=asks("disk_mb", "samples"),
    params:
        step=signed(lambda wildcards: PLAN.samples(wildcards.slice)),
    shell:
        call("sample", "manifest", "--gpus 0")


rule choose_rows:
    input:
        choice_inputs,
    output:
        manifest="<results>/data/{slice}.manifest.json",
        rows="<results>/data/{slice}.jsonl",
    log:
        "<logs>/data/{slice}.log",
    benchmark:
        "<benchmarks>/data/{slice}.tsv"
    wildcard_constraints:
        slice=SAMPLED,
    conda:
        ENV
    threads: THREADS
    resources:
        **room("slice", by_model),
        gpu=signed(lambda wildcards: GPU if by_model(wildcards) else 0),
        mem_mb=asks("mem_mb", "slice"),
        runtime=asks("runtime", "slice"),
        disk_mb=asks("disk_mb", "slice"),
    params:
        step=signed(lambda wildcards: PLAN.slice(wildcards.slice)),
    shell:
        call("choose_rows", "manifest", LIMITS, ON_GPU)
