"""Text generation: autoregressive with a key-value cache, and by iterative unmasking."""
