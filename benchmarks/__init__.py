"""The benchmark suite. `diwa bench` runs it; installed copies have it as `diwa.benchmarks`."""
