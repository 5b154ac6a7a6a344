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
        task=WHOLE,
    conda:
        ANSWER_ENV
    threads: THREADS
    resources:
        **room("generate_"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "generate_"),
        runtime=asks("runtime", "generate_"),
        disk_mb=asks("disk_mb", "generate_"),
    params:
        step=signed(lambda wildcards: PLAN.generate(wildcards.task, wildcards.run)),
    shell:
        call("generate", "manifest", ON_GPU)


# With `eval.shards`, jobs that answer some batches each. What they wrote goes once it is put together.
rule generate_shard:
    input:
        prompts=prompts_of,
        model=model_inputs,
    output:
        answers=temp("<results>/{run}/{task}_shards/{shard}of{shards}.json"),
    log:
        "<logs>/{run}/generate_{task}_{shard}of{shards}.log",
    benchmark:
        "<benchmarks>/{run}/generate_{task}_{shard}of{shards}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=SHARDED,
        shard="[1-9][0-9]*",
        shards="[1-9][0-9]*",
    conda:
        ANSWER_ENV
    threads: THREADS
    resources:
        **room("generate_"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "generate_"),
        runtime=asks("runtime", "generate_"),
        disk_mb=asks("disk_mb", "generate_"),
    params:
        step=signed(lambda wildcards: PLAN.shard(wildcards.task, wildcards.run, int(wildcards.shard))),
    shell:
        call("generate", "answers", ON_GPU)


# The step that would have answered alone: same parameter, same bytes. It loads no model.
rule gather:
    input:
        prompts=prompts_of,
        model=model_inputs,
        shards=signed(lambda wildcards: PLAN.shard_files(wildcards.task, wildcards.run)),
    output:
        manifest="<results>/{run}/{task}_responses.manifest.json",
        responses="<results>/{run}/{task}_responses.jsonl",
    log:
        "<logs>/{run}/generate_{task}.log",
    benchmark:
        "<benchmarks>/{run}/generate_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=SHARDED,
    localrule: True
    conda:
        ANSWER_ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "score_"),
        runtime=asks("runtime", "score_"),
        disk_mb=asks("disk_mb", "generate_"),
    params:
        step=signed(lambda wildcards: PLAN.generate(wildcards.task, wildcards.run)),
    shell:
        call("generate", "manifest", "--gpus 0")


rule score:
    input:
        answers=answers_of,
        prompts=prompts_of,
    output:
        scores="<results>/{task}_{run}.json",
    log:
        "<logs>/{run}/score_{task}.log",
    benchmark:
        "<benchmarks>/{run}/score_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=SCORED,
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "score_"),
        runtime=asks("runtime", "score_"),
        disk_mb=asks("disk_mb", "score_"),
    params:
        step=signed(lambda wildcards: PLAN.score(wildcards.task, wildcards.run)),
    shell:
        call("score_{wildcards.task}", "scores")


# Of development prompts, by which trials are chosen: scored as the task that they stand for.
rule score_development:
    input:
        answers=signed(lambda wildcards: edges(PLAN.answers_inputs(names.DEVELOPMENT, wildcards.run))),
        prompts=signed(lambda wildcards: edges(PLAN.prompts_inputs(names.DEVELOPMENT))),
    output:
        scores="<results>/dev_{run}.json",
    log:
        "<logs>/{run}/score_dev.log",
    benchmark:
        "<benchmarks>/{run}/score_dev.tsv"
    wildcard_constraints:
        run=ANSWERING if PLAN.config.development else any_of([]),
    localrule: True
    conda:
        ENV
    threads: 1
    resources:
        gpu=0,
        mem_mb=asks("mem_mb", "score_dev"),
        runtime=asks("runtime", "score_dev"),
        disk_mb=asks("disk_mb", "score_dev"),
    params:
        step=signed(lambda wildcards: PLAN.score(names.DEVELOPMENT, wildcards.run)),
    shell:
        call(f"score_{PLAN.config.development.get('task', 'ifeval')}", "scores")


# Rewards of answers by one reward model: for win rates, which are no verdicts.
rule judge_answers:
    input:
        signed(lambda wildcards: edges(PLAN.judge_inputs(wildcards.run))),
    output:
        scores="<results>/judge_{run}.json",
    log:
        "<logs>/{run}/judge_answers.log",
    benchmark:
        "<benchmarks>/{run}/judge_answers.tsv"
    wildcard_constraints:
        run=JUDGED,
    conda:
        ENV
    threads: THREADS
    resources:
        **room("judge"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "judge"),
        runtime=asks("runtime", "judge"),
        disk_mb=asks("disk_mb", "judge"),
    params:
        step=signed(lambda wildcards: PLAN.score("judge", wildcards.run)),
    shell:
        call("judge_answers", "scores", ON_GPU)


# Multiple choice: the log-likelihood of each option, by lm-eval's own tasks. Nothing is answered in text.
rule lm_eval_task:
    input:
        prompts=prompts_of,
        model=model_inputs,
    output:
        scores="<results>/{task}_{run}.json",
    log:
        "<logs>/{run}/lm_eval_{task}.log",
    benchmark:
        "<benchmarks>/{run}/lm_eval_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=CHOICE,
    conda:
        ENV
    threads: THREADS
    resources:
        **room("choice_"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "choice_"),
        runtime=asks("runtime", "choice_"),
        disk_mb=asks("disk_mb", "choice_"),
    params:
        step=signed(lambda wildcards: PLAN.score(wildcards.task, wildcards.run)),
    shell:
        call("lm_eval_task", "scores", ON_GPU)


# Any task of lm-eval (`eval.tasks`), asked and scored in one step.
rule own_task:
    input:
        task=own_task_inputs,
        model=model_inputs,
    output:
        scores="<results>/{task}_{run}.json",
    log:
        "<logs>/{run}/own_task_{task}.log",
    benchmark:
        "<benchmarks>/{run}/own_task_{task}.tsv"
    wildcard_constraints:
        run=ANSWERING,
        task=OWN_TASKS,
    conda:
        own_env
    threads: THREADS
    resources:
        **room("own_"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "own_"),
        runtime=asks("runtime", "own_"),
        disk_mb=asks("disk_mb", "own_"),
    params:
        step=signed(lambda wildcards: PLAN.score(wildcards.task, wildcards.run)),
    shell:
        call("own_task", "scores", ON_GPU)


rule eval_rm:
    input:
        model=model_inputs,
        rows=signed(lambda wildcards: edges(PLAN.slice_inputs(PLAN.slice_of(wildcards.run)))),
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
        **room("eval_rm"),
        gpu=GPU,
        mem_mb=asks("mem_mb", "eval_rm"),
        runtime=asks("runtime", "eval_rm"),
        disk_mb=asks("disk_mb", "eval_rm"),
    params:
        step=signed(lambda wildcards: PLAN.eval_rm(wildcards.run)),
    shell:
        call("eval_rm", "scores", ON_GPU)
