"""Models for other programs: GGUF for llama.cpp and Ollama, ONNX, bare ``.pth`` files, Hugging Face directories."""
