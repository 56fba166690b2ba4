"""MQTT 5: the only place that imports an MQTT client. The fleet uses it too, by the names listed here."""

from agent.core.ports import Handler, Link, Message
from agent.errors import LinkError
from agent.link.mqtt import MqttLink
from agent.link.network import BulkSource
from agent.link.settings import LinkSettings, Will

__all__ = ["BulkSource", "Handler", "Link", "LinkError", "LinkSettings", "Message", "MqttLink", "Will"]
