"""A model of the CUDA kernels' speed, from their machine code alone: tools/cuda_cycles.py."""
