# Answers (GPU) and scores (CPU) are separate: a change of the scorer never generates again.


rule generate:
    input:
        prompts=edges(PLAN.slice_inputs(PLAN.prompts_slice)),
        model=model_inputs,
    output:
        manifest="<results>/{run}/ifeval_responses.manifest.json",
        responses="<results>/{run}/ifeval_responses.jsonl",
    log:
        "<logs>/{run}/generate.log",
    benchmark:
        "<benchmarks>/{run}/generate.tsv"
    conda:
        ENV
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=16000,
        runtime="3h",
    params:
        options=options,
        step=lambda wildcards: PLAN.generate(wildcards.run),
    shell:
        "python -m workflow_scripts.steps.generate --step {params.step:q} --inputs {input:q} --out {output.manifest:q}"
        " {params.options} --log {log:q}"


rule score_ifeval:
    input:
        manifest="<results>/{run}/ifeval_responses.manifest.json",
        responses=ancient("<results>/{run}/ifeval_responses.jsonl"),
        prompts=edges(PLAN.slice_inputs(PLAN.prompts_slice)),
    output:
        scores="<results>/ifeval_{run}.json",
    log:
        "<logs>/{run}/score_ifeval.log",
    benchmark:
        "<benchmarks>/{run}/score_ifeval.tsv"
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime="30m",
    params:
        options=options,
        step=lambda wildcards: PLAN.score(wildcards.run),
    shell:
        "python -m workflow_scripts.steps.score_ifeval --step {params.step:q} --inputs {input:q} --out {output.scores:q}"
        " {params.options} --log {log:q}"
