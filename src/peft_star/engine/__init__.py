"""Running a model over rows, fast: batches, shared prefixes, replayed layers, several processes."""
