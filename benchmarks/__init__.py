"""Benchmarks of the fused head: time in P, extra peak memory and error against float64."""
