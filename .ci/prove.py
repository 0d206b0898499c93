"""One real decode: proves that the llama.cpp which was built computes on this machine. `python prove.py MODEL`; exit 0 when it does.

Runs in a child of set-up, because a build for instructions that the machine announces but does not have ends by a signal.
"""

from __future__ import annotations

import sys

import llama_cpp

# Longer than 32 tokens: smaller batches may take another path than the matrix kernels that chats use.
QUESTION = (
    "You are asked one question about geography. Answer it with the name of a single city and nothing else, "
    "without any explanation before or after the name. What is the capital of France?"
)


def main(model: str) -> int:
    llama = llama_cpp.Llama(model_path=model, n_ctx=256, n_threads=2, verbose=False)
    reply = llama.create_chat_completion(messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0.0)
    text = reply["choices"][0]["message"]["content"]
    print(f"llama.cpp answered {text!r}")
    return 0 if "Paris" in text else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
