"""Models on disk: Hugging Face directories, bare state dicts, and what people call them."""
