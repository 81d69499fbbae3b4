"""What benchmarks.convergence is made of: a corpus, one run, the choice of learning rates, records, a page."""
