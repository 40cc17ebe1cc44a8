"""The trainer: schedules, optimizers, the step, checkpoints, records and the loop around them."""
