"""The MQTT 5 connection: the only owner of an MQTT client, shared with the fleet."""
