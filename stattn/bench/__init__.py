"""Named shapes and what is measured of them: shared by `stattn bench` and the benchmarks."""
