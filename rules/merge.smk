# The weights of a merge are a cache: only the manifest is declared, and whoever needs deleted weights rebuilds them.
rule merge:
    input:
        model_inputs,
    output:
        manifest="<results>/{run}/merged/manifest.json",
    log:
        "<logs>/{run}/merge.log",
    benchmark:
        "<benchmarks>/{run}/merge.tsv"
    wildcard_constraints:
        run=TRAINED,
    conda:
        ENV
    threads: THREADS
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "merge"),
        runtime=asks("runtime", "merge"),
        disk_mb=asks("disk_mb", "merge"),
    params:
        step=signed(lambda wildcards: PLAN.merge(wildcards.run)),
    shell:
        call("merge", "manifest")
