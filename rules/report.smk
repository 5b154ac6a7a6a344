rule report:
    input:
        report_inputs,
    output:
        manifest="<results>/report/manifest.json",
        page=report("<results>/report/comparison.html", category="Comparison"),
        table="<results>/report/comparison.csv",
    log:
        "<logs>/report/report.log",
    benchmark:
        "<benchmarks>/report/report.tsv"
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "report"),
        runtime=asks("runtime", "report"),
        disk_mb=asks("disk_mb", "report"),
    params:
        step=signed(lambda wildcards: PLAN.report()),
    shell:
        call("report", "manifest")
