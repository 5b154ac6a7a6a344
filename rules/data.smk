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
