"""A stored response as the stream that it would have been. Pure."""

from __future__ import annotations

from typing import Any

from agent.endpoint.openai.responses import Event

_UNTIL_THE_END: dict[str, Any] = {
    "status": "in_progress", "output": [], "usage": None, "incomplete_details": None, "error": None,
}  # fmt: skip


def replay(response: dict[str, Any], starting_after: int = -1) -> list[Event]:
    """Return the events of a finished response, each text and each call's arguments in one delta.

    Those up to sequence number ``starting_after`` are left out. The numbers are of this replay: the first stream of the
    same response had one event for each token.
    """
    opening = response | _UNTIL_THE_END
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": opening},
        {"type": "response.in_progress", "response": opening},
    ]
    for index, item in enumerate(response["output"]):
        events += _call(index, item) if item["type"] == "function_call" else _with_part(index, item)
    events.append({"type": f"response.{response['status']}", "response": response})
    numbered = [{**event, "sequence_number": number} for number, event in enumerate(events)]
    return [(event["type"], event) for event in numbered if event["sequence_number"] > starting_after]


def _with_part(index: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a message, or of thoughts."""
    part = item["content"][0]
    at = {"item_id": item["id"], "output_index": index, "content_index": 0}
    kind, empty, said = f"response.{part['type']}", {**part, "text": ""}, {}
    if "logprobs" in part:
        empty["logprobs"] = []
        plain = [{key: value for key, value in entry.items() if key != "bytes"} for entry in part["logprobs"]]
        said = {"logprobs": plain}
    begun = {**item, "status": "in_progress", "content": []}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        {"type": "response.content_part.added", **at, "part": empty},
        {"type": f"{kind}.delta", **at, "delta": part["text"], **said},
        {"type": f"{kind}.done", **at, "text": part["text"], **said},
        {"type": "response.content_part.done", **at, "part": part},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]


def _call(index: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    at = {"item_id": item["id"], "output_index": index}
    begun = {**item, "status": "in_progress", "arguments": ""}
    done = {"name": item["name"], "arguments": item["arguments"]}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]},
        {"type": "response.function_call_arguments.done", **at, **done},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
