rule make_base:
    input:
        base_inputs,
    output:
        manifest="<results>/base/manifest.json",
        weights="<results>/base/model.safetensors",
    log:
        "<logs>/base/make_base.log",
    benchmark:
        "<benchmarks>/base/make_base.tsv"
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
        step=signed(lambda wildcards: PLAN.base()),
    shell:
        call("make_base", "manifest", "{params.files}")
