"""Time the kernels, compare their errors, calculate their floors."""
