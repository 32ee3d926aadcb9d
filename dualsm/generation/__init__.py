"""Generation: causal and prefix with a cache, diffusion by iterative unmasking."""
