"""Model code for `trust_remote_code`, which is copied into exports. dualsm does not import it."""
