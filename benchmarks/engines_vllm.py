"""vLLM's rows of `benchmarks.engines`, for an interpreter that has it: `engines_vllm.py DIR DTYPE PROMPT NEW LONG BATCH...`

Decoding is the time of NEW + 1 tokens less that of one, from prompts that are all different, so nothing is cached and every
row of a batch is in the same step.
"""

import json
import random
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, dtype, prompt, new, long, *batches = sys.argv[1:]
    prompt, new, long, batches = int(prompt), int(new), int(long), [int(b) for b in batches]
    llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=2048, max_num_seqs=max(batches),
              skip_tokenizer_init=True)  # fmt: skip
    draw, size = random.Random(0), llm.llm_engine.model_config.get_vocab_size()

    def took(rows: int, length: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [draw.randrange(size) for _ in range(length)]} for _ in range(rows)]
        begun = time.perf_counter()
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begun

    took(2, prompt, 4)  # for the buffers
    rates = {str(rows): rows * new / max(took(rows, prompt, new + 1) - took(rows, prompt, 1), 1e-9) for rows in batches}
    print(json.dumps({**rates, "prefill": long / took(1, long, 1)}))


if __name__ == "__main__":
    main()
