"""The training pipeline: configuration, model, depth, optimization, engine, loop, checkpoints, evaluation, export."""
