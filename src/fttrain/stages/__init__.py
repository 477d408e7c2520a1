"""What a step can be: each module has `run(step, folder, world, stop)`, which returns the content of result.json."""
