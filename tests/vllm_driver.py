"""Runs vLLM on one folder and prints what it wrote; tests/test_vllm.py starts it in vLLM's own environment.

    python vllm_driver.py '{"model": DIR, "prompts": [[ids], …], "max_tokens": 8, "engine": {…}}'

The last line of output is JSON: the token ids of each answer, and the method that vLLM took for the checkpoint.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], enable_prefix_caching=False, **job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    method = llm.llm_engine.model_config.quantization
    print(json.dumps({"tokens": [list(answer.outputs[0].token_ids) for answer in answers], "method": method}))


if __name__ == "__main__":
    main()
