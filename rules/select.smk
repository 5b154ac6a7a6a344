# The choice among trials (`tune:`): one of their adapters, byte for byte. It stands where a training would have put its own.
rule select:
    input:
        select_inputs,
    output:
        manifest="<results>/{run}/adapter/manifest.json",
        weights="<results>/{run}/adapter/adapter_model.safetensors",
    log:
        "<logs>/{run}/select.log",
    benchmark:
        "<benchmarks>/{run}/select.tsv"
    wildcard_constraints:
        run=any_of(list(PLAN.config.tuned)) + SEED,
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "select"),
        runtime=asks("runtime", "select"),
        disk_mb=asks("disk_mb", "select"),
    params:
        step=signed(lambda wildcards: PLAN.train(wildcards.run)),
    shell:
        call("select", "manifest", "--gpus 0")
