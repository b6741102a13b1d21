"""The pages of ``web_demo.py``: a chat with a model behind an OpenAI server, and a look at training runs."""
