"""What a step can be: each module has `run(step, folder, world, stop)`, whose answer becomes result.json."""
