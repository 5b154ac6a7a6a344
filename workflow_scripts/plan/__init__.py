"""From a config to steps: paths, edges, the JSON of each step, what it needs."""
