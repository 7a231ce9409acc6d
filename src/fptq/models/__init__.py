"""Float models, opened on the meta device and read one module at a time (needs torch and transformers)."""
