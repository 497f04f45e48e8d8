"""The worker process: runs tasks, or one actor."""
