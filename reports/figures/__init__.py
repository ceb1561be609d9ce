"""One figure a file; each takes a frame of `reports.scores` or `reports.outliers` and returns a matplotlib Figure."""
