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
        mem_mb=4000,
        runtime="1h",
    params:
        options=options,
        files=base_files,
        step=lambda wildcards: PLAN.base(),
    shell:
        "exec python -m workflow_scripts.steps.make_base --step {params.step:q} --inputs {input:q} {params.files} --out {output.manifest:q}"
        " {params.options} --log {log:q}"
