"""Settings of all tests: random inputs are fresh in every run, and a failure prints its own."""

import os

# Nothing is taken from a hub, and every try would wait for its retries; read when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import HealthCheck, settings

# Threads that wait for each other on busy cores make the suite several times slower. What depends
# on their number is tested by changing it.
torch.set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,  # the first call of a process loads and compiles
    print_blob=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=1000)
settings.register_profile("few", settings.get_profile("default"), max_examples=5)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)

# The CUDA kernels, run on the CPU, in place of the CPU's own.
if "EFLAT_TEST_KERNELS" in os.environ:
    import host_cuda

    _replaced = host_cuda.replace_cpu_kernels(os.environ["EFLAT_TEST_KERNELS"])

# A second device has to be there before the first backward pass of a process.
if "EFLAT_TEST_SECOND_DEVICE" in os.environ:
    import second_device

    second_device.register()
