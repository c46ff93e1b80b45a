"""The loop, the step, optimisers, schedules, checkpoints."""
