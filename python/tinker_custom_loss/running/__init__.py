"""One term, wherever it runs: evaluation, places, and what nan does."""
