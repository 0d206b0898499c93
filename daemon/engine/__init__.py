"""Local inference: one child process per served model."""
