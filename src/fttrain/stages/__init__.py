"""What a stage can be: each module has `run(spec, folder, world, stop)`, whose result becomes result.json."""
