"""Ask the model on this device, and print the answer while it comes.

The endpoint speaks OpenAI's API, so that the official client works unchanged; only its address is another.
"""

from __future__ import annotations

import argparse
import sys
import time

from openai import OpenAI


def main() -> None:
    """Stream one answer to standard output; its figures go to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--endpoint", default="http://127.0.0.1:8600/v1")
    parser.add_argument("--api-key", default="none", help="only needed where the agent's settings name keys")
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.endpoint, api_key=arguments.api_key)
    # An update may have changed the model since the last call: ask which one serves now.
    model = client.models.list().data[0].id
    began = time.monotonic()
    first: float | None = None
    tokens = 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.prompt}],
        max_tokens=128,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - began
            sys.stdout.write(chunk.choices[0].delta.content)
            sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.monotonic() - began
    sys.stderr.write(
        f"{model}: {tokens} tokens in {seconds:.2f} s, the first after {(first or seconds) * 1000:.0f} ms\n"
    )


if __name__ == "__main__":
    main()
