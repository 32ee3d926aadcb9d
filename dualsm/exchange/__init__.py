"""Import and export of weights and tokenizers in other formats."""
