# Answers (GPU) and scores (CPU) are separate: a change of the scorer never generates again.


rule generate:
    input:
        prompts=prompts_of,
        model=model_inputs,
    output:
        manifest="<results>/{run}/{task}_responses.manifest.json",
        responses="<results>/{run}/{task}_responses.jsonl",
    log:
        "<logs>/{run}/generate_{task}.log",
    benchmark:
        "<benchmarks>/{run}/generate_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=TASKS,
    conda:
        ENV
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=16000,
        runtime="3h",
    params:
        options=options,
        step=lambda wildcards: PLAN.generate(wildcards.task, wildcards.run),
    shell:
        "exec python -m workflow_scripts.steps.generate --step {params.step:q} --inputs {input:q} --out {output.manifest:q}"
        " {params.options} --log {log:q}"


rule score:
    input:
        manifest="<results>/{run}/{task}_responses.manifest.json",
        responses=ancient("<results>/{run}/{task}_responses.jsonl"),
        prompts=prompts_of,
    output:
        scores="<results>/{task}_{run}.json",
    log:
        "<logs>/{run}/score_{task}.log",
    benchmark:
        "<benchmarks>/{run}/score_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=TASKS,
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=2000,
        runtime="30m",
    params:
        options=options,
        step=lambda wildcards: PLAN.score(wildcards.task, wildcards.run),
    shell:
        "exec python -m workflow_scripts.steps.score_{wildcards.task} --step {params.step:q} --inputs {input:q} --out {output.scores:q}"
        " {params.options} --log {log:q}"


rule eval_rm:
    input:
        model=model_inputs,
        rows=lambda wildcards: edges(PLAN.slice_inputs(PLAN.experiment(wildcards.run)["slice"])),
    output:
        scores="<results>/{run}/rm_eval.json",
    log:
        "<logs>/{run}/eval_rm.log",
    benchmark:
        "<benchmarks>/{run}/eval_rm.tsv"
    wildcard_constraints:
        run=runs_of("rm"),
    conda:
        ENV
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=16000,
        runtime="1h",
    params:
        options=options,
        step=lambda wildcards: PLAN.eval_rm(wildcards.run),
    shell:
        "exec python -m workflow_scripts.steps.eval_rm --step {params.step:q} --inputs {input:q} --out {output.scores:q}"
        " {params.options} --log {log:q}"
