"""Many cells: what a run consists of (plan), what is already there (store), who computes the rest (executors)."""
