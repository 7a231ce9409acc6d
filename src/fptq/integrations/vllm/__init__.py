"""A plugin for vLLM on CPUs: it loads checkpoints of fptq with no flag, and runs their products on our kernels.

vLLM calls `register` in each of its processes, by the entry point "vllm.general_plugins". Nothing else is needed:

    vllm serve SmolLM2-135M-W4A8

Only checkpoints that say they are fptq's are claimed. What can't be run is an error, never another arithmetic.
"""


def register() -> None:
    """Make the method known to vLLM; harmless when repeated."""
    import fptq.integrations.vllm.method  # noqa: F401
