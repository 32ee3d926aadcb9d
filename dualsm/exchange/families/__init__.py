"""Model families of transformers: settings from config.json and back, and names of tensors."""
