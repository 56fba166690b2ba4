"""Commands for the person at the device, and the conversation that `phifleet-agent chat` holds."""
