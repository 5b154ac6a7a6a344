# One rule for each method, made in a loop, and one more where a method trains over several nodes, or holds its base in parts. The
# step's module is a parameter: a loop variable inside the shell string would be bound late, and every job would run the last method.
for method, shard, spread in sorted({(body["method"], *way_of(name)) for name, body in PLAN.config.experiments.items()}):

    rule:
        name:
            f"train_{method}{'_shard' * shard}{'_nodes' * spread}"
        input:
            train_inputs,
        output:
            manifest="<results>/{run}/adapter/manifest.json",
            weights="<results>/{run}/adapter/adapter_model.safetensors",
        log:
            "<logs>/{run}/train.log",
        benchmark:
            "<benchmarks>/{run}/train.tsv"
        wildcard_constraints:
            run=runs_of(method, chosen=False, ways=[(shard, spread)]),
        conda:
            ENV
        threads: threads_of
        resources:
            **room("train"),
            **(SPREAD if spread else {}),
            gpu=gpus_of,
            ranks=ranks_of,
            mem_mb=asks("mem_mb", "train"),
            runtime=asks("runtime", "train"),
            disk_mb=asks("disk_mb", "train"),
        params:
            module=f"train_{method}",
            step=signed(lambda wildcards: PLAN.train(wildcards.run)),
        shell:
            call("{params.module}", "manifest", "--gpus {resources.ranks}", *SHARD[shard], *NODES[spread], ON_GPU)
