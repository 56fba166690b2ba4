"""What an artifact is accompanied by outside of the fleet: bill of materials, model card, signature, OCI layout."""
