"""The phifleet agent: what runs on the device."""
