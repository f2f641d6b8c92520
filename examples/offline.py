"""Batch inference in this process: python examples/offline.py MODEL (a folder, a .gguf file or a hub id)."""

import sys

from gossamer import LLM, SamplingParams


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} MODEL")
    llm = LLM(sys.argv[1])

    # Prompts of different lengths run as one batch; each may have its own parameters.
    prompts = ["The capital of France is", "Water boils at", "Once upon a time"]
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    creative = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=1)
    for output in llm.generate(prompts, [greedy, greedy, creative]):
        print(f"{output.prompt}|{output.outputs[0].text}")

    # A conversation goes through the model's chat template.
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(messages, greedy)[0]
    print(f"chat: {answer.outputs[0].text}")

    # The second question begins with the same tokens: their KV comes from the prefix cache.
    context = "Paris, Rome, Madrid and Berlin are capitals of countries in Europe. " * 20
    for question in ("Name one of them:", "Name another:"):
        output = llm.generate(context + question, greedy)[0]
        print(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached")


if __name__ == "__main__":
    main()
