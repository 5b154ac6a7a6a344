# The base, and the models that are only scored beside it.
rule make_base:
    input:
        base_inputs,
    output:
        manifest="<results>/{run}/manifest.json",
        weights="<results>/{run}/model.safetensors",
    log:
        "<logs>/{run}/make_base.log",
    benchmark:
        "<benchmarks>/{run}/make_base.tsv"
    wildcard_constraints:
        run=MODELS,
    conda:
        ENV
    threads: THREADS
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "base"),
        runtime=asks("runtime", "base"),
        disk_mb=asks("disk_mb", "base"),
    params:
        files=base_files,
        step=signed(lambda wildcards: PLAN.base(wildcards.run)),
    shell:
        call("make_base", "manifest", "{params.files}")
