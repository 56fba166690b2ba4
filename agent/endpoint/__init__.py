"""The OpenAI-compatible endpoint that applications on the device use."""

from agent.endpoint.app import create_app
from agent.endpoint.http.config import ApiKey, EndpointConfig, Limits
from agent.endpoint.http.metrics import FinishedRequest, HostStats
from agent.endpoint.openai.strictness import Strictness
from agent.endpoint.server import EndpointServer

__all__ = [
    "ApiKey",
    "EndpointConfig",
    "EndpointServer",
    "FinishedRequest",
    "HostStats",
    "Limits",
    "Strictness",
    "create_app",
]
