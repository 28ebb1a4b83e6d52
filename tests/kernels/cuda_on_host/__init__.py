"""CUDA C++ kernels compiled for the host: the same sources, with the GPU's instructions and threads acted out."""
