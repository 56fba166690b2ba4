"""``/v1/conversations``: items that responses go on from and add to, kept for a while."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from aiohttp import web

from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, read_request
from agent.endpoint.http.replies import json_reply
from agent.endpoint.openai.answers import new_id
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.items import entries, item_list, messages, page_of
from agent.endpoint.openai.prompting import plain_messages
from agent.endpoint.openai.response_shapes import AddItemsRequest, ConversationRequest, Item, UpdateConversationRequest
from agent.endpoint.openai.stored import Conversation, Entry


async def create(request: web.Request) -> web.Response:
    """``POST /v1/conversations``."""
    asked = await read_request(request, ConversationRequest)
    listed = _checked(asked.items or [])
    conversation = Conversation(new_id("conv_"), int(time.time()), asked.metadata or {}, tuple(listed))
    keep(request, conversation)
    return json_reply(conversation.to_dict())


async def retrieve(request: web.Request) -> web.Response:
    """``GET /v1/conversations/{id}``."""
    return json_reply(find(request, request.match_info["id"]).to_dict())


async def update(request: web.Request) -> web.Response:
    """``POST /v1/conversations/{id}``: its metadata."""
    asked = await read_request(request, UpdateConversationRequest)
    conversation = dataclasses.replace(find(request, request.match_info["id"]), metadata=asked.metadata or {})
    keep(request, conversation)
    return json_reply(conversation.to_dict())


async def delete(request: web.Request) -> web.Response:
    """``DELETE /v1/conversations/{id}``."""
    identifier = find(request, request.match_info["id"]).id
    request.app[CONTEXT].store.delete(request[REQUEST_CONTEXT].client, identifier, _now())
    return json_reply({"id": identifier, "object": "conversation.deleted", "deleted": True})


async def items(request: web.Request) -> web.Response:
    """``GET /v1/conversations/{id}/items``, newest first unless ``order=asc``."""
    return json_reply(page_of(find(request, request.match_info["id"]).entries, request.query))


async def item(request: web.Request) -> web.Response:
    """``GET /v1/conversations/{id}/items/{item}``."""
    conversation = find(request, request.match_info["id"])
    return json_reply(_item(conversation, request.match_info["item"]))


async def delete_item(request: web.Request) -> web.Response:
    """``DELETE /v1/conversations/{id}/items/{item}``; the conversation as it is then."""
    conversation = find(request, request.match_info["id"])
    gone = _item(conversation, request.match_info["item"])
    left = dataclasses.replace(conversation, entries=tuple(one for one in conversation.entries if one is not gone))
    keep(request, left)
    return json_reply(left.to_dict())


def _item(conversation: Conversation, identifier: str) -> Entry:
    for entry in conversation.entries:
        if entry["id"] == identifier:
            return entry
    raise ApiError(404, f"conversation {conversation.id} has no item {identifier[:128]!r}", code="not_found")


async def add_items(request: web.Request) -> web.Response:
    """``POST /v1/conversations/{id}/items``."""
    asked = await read_request(request, AddItemsRequest)
    listed = _checked(asked.items)
    conversation = find(request, request.match_info["id"])
    keep(request, dataclasses.replace(conversation, entries=(*conversation.entries, *listed)))
    return json_reply(item_list(listed))


def find(request: web.Request, identifier: str, param: str | None = None) -> Conversation:
    """That client's.

    Raises:
        ApiError: 404.
    """
    found = request.app[CONTEXT].store.get(request[REQUEST_CONTEXT].client, identifier, _now())
    if not isinstance(found, Conversation):
        message = f"there is no conversation {identifier[:128]!r}: it was never made, is too old, or made room"
        raise ApiError(404, message, param=param, code="not_found")
    return found


def keep(request: web.Request, conversation: Conversation) -> None:
    """As it is now.

    Raises:
        ApiError: 413: it is larger than all the room for conversations.
    """
    store = request.app[CONTEXT].store
    if not store.put(request[REQUEST_CONTEXT].client, conversation.id, conversation, conversation.size(), _now()):
        raise ApiError(413, "the conversation is larger than all the room there is for them", code="body_too_large")


def _checked(given: list[Item]) -> list[Entry]:
    """Refuse now what no prompt could be made of later."""
    listed = entries(given)
    plain_messages(messages(listed), "items")
    return listed


def _now() -> float:
    return asyncio.get_running_loop().time()
