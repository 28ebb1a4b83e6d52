"""Products of quantised weights: kernels against each other and against cuBLAS."""
