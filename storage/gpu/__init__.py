"""What runs on a GPU. Nothing here imports CuPy before somebody asks for a CUDA device.

source.py   the CUDA C of all kernels, generated from the formulas of the optimizers
nvrtc.py    compile CUDA C for a GPU; no GPU is needed
device.py   the contract of a device: memory, page-locked host memory, queues, marks
cuda.py     the device that CuPy gives: an NVIDIA GPU
staging.py  a queue, and the page-locked memory through which batches reach its kernels
slab.py     rows in device memory, in pieces that never move
gpu.py      the device of a shard, its budget, and page-locked memory for its batches
"""
