"""
A stand-in for Triton's CPU backend, which no wheel has: with it, vLLM's Model Runner V2 runs on a CPU.

vLLM falls back to Model Runner V1 where Triton has no backend for the device. Triton finds backends by entry points:
with this folder's parent on `PYTHONPATH` every process of an engine finds this one. Nothing is compiled:
`TRITON_INTERPRET=1` runs the kernels in Triton's interpreter.
"""
