"""Turn a sentence into JSON of a fixed form.

The schema goes to the runtime, which then can only produce tokens that fit it: the answer always parses, however small
the model is. Whether it is *right* is the model's affair.
"""

from __future__ import annotations

import argparse
import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 40},
        "quantity": {"type": "string", "enum": ["temperature", "pressure", "humidity", "other"]},
        "value": {"type": "integer"},
    },
    "required": ["place", "quantity", "value"],
    "additionalProperties": False,
}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--endpoint", default="http://127.0.0.1:8600/v1")
    parser.add_argument("--api-key", default="none", help="only needed where the agent's settings name keys")
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.endpoint, api_key=arguments.api_key)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"Extract the measurement as JSON: {arguments.text}"}],
        max_tokens=120,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "measurement", "schema": SCHEMA}},
    )
    choice = answer.choices[0]
    if choice.finish_reason == "length":
        sys.exit("the answer was cut at max_tokens before the object was complete; allow more tokens")
    print(json.dumps(json.loads(choice.message.content or ""), indent=2))


if __name__ == "__main__":
    main()
